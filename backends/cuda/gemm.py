"""GEMM on tensor cores for 1 to 128 rows of activations: formats, fragment order, schedules.

One template (cuda/gemm.cu.j2) takes every row whose codes are affine of 4 to 8 bits (magic-number
decoding after MARLIN), small floats of 5, 6 or 8 bits (their fields moved to those of halves, after
FP6-LLM), or have a table of at most 16 values for the whole weight (pairs of codes look up pairs of
halves, after FLUTE), and f16 weights, with f16 activations; codes of 4 and 8 bits also with int8
activations (W8A8; two levels of scales after QServe), codes of 4 bits also with int4 activations,
whose outlier columns go through halves (after QUIK). Widths between powers of two lie in planes:
5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1. Of a 2:4 mask only what is kept is stored and goes through
mma.sp (of halves or bytes), which takes the sparse matrix on its left: then y^T = W x^T (after
Sparse-MARLIN). Scales are applied to the sums of a group in float32, so codes enter the tensor
cores exactly. Zero points and minima need the sum of the activations of a group, which one more mma
by ones gives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qigen.codegen.render import render
from qigen.errors import Unsupported
from qigen.formats.algebra import Format

FIRST_TWO = 0b0100
"""The metadata that four weights of a 2:4 mask have where the first two are kept."""

SHARED_LIMIT = 99 << 10
"""Shared memory that a block may have on every target."""

COLUMNS = 64
"""Rows of W (columns of y) that a warp takes: the unit of the packed form along N."""


@dataclass(frozen=True)
class Decoding:
    """How codes lie in a lane's words and what decodes them (cuda/decode.cuh.j2).

    A step is the K of one mma. ``words`` 32-bit words of a lane hold the codes of a step of 64
    columns (their low bits), ``high`` more the bits above, ``top`` the bits above those.
    ``sparse``: two of every four weights along K are there, and ``which`` words say which.
    """

    name: str
    bits: int
    step: int
    words: int
    high: int = 0
    top: int = 0
    sparse: bool = False

    @property
    def integer(self) -> bool:
        """Whether it feeds the integer tensor cores."""
        return self.name.startswith("signed")

    @property
    def x_bits(self) -> int:
        """Bits of an activation."""
        return 4 if self.name == "signed4by4" else 8 if self.integer else 16

    @property
    def which(self) -> int:
        """Words of a lane that say which weights of a step a mask keeps: 32 along K each."""
        return self.step // 16 if self.sparse else 0

    @property
    def planes(self) -> tuple[tuple[str, str, int], ...]:
        """(section of the packed weight, registers, words of a step) of what a lane reads."""
        every = (("low", "codes", self.words), ("high", "tops", self.high),
                 ("top", "tips", self.top), ("which", "kept", self.which))
        return tuple(plane for plane in every if plane[2])

    @property
    def tile(self) -> int:
        """Rows of x of a tile."""
        return 8 if self.sparse else 16

    @property
    def fragments(self) -> int:
        """Results of an mma that cover 64 columns."""
        return 4 if self.sparse else 8


DECODINGS: Mapping[str, Decoding] = {
    d.name: d
    for d in (
        Decoding("half", 16, 16, 16),
        Decoding("affine4", 4, 16, 4),
        Decoding("affine5", 5, 16, 4, 1),
        Decoding("affine6", 6, 16, 4, 2),
        Decoding("affine7", 7, 16, 4, 2, 1),
        Decoding("affine8", 8, 16, 8),
        Decoding("small5", 5, 16, 4, 1),
        Decoding("small6", 6, 16, 4, 2),
        Decoding("small8", 8, 16, 8),
        Decoding("table2", 2, 16, 2),
        Decoding("table3", 3, 16, 2, 1),
        Decoding("table4", 4, 16, 4),
        Decoding("signed4", 4, 32, 8),
        Decoding("signed8", 8, 32, 16),
        Decoding("signed4by4", 4, 64, 16),
    )
}


@dataclass(frozen=True)
class Schedule:
    """The shape of a block: tiles of 16 rows, warps along N and K, K of a warp's part of a stage,
    stages of the pipeline, copies of a table (of one bank each)."""

    m_tiles: int = 1
    warps_n: int = 2
    warps_k: int = 2
    depth: int = 64
    stages: int = 4
    duplicates: int = 8


def _affine(format: Format) -> bool:
    return (format.table is None and format.values is None and format.minifloat is None
            and not format.has("lut"))


def decoding(format: Format, activations: str = "f16") -> Decoding:
    """How the GEMM decodes a row of the catalog; Unsupported, with a way out, if it does not."""
    fields = {f.name for f in format.fields}
    sparse = format.mask == (2, 4) and format.has("ix")
    apart = {"qc", "qv"} if activations == "s4" else set()
    known = (
        fields - apart <= {"codes", "d", "m", "z", "e", "sub", "lut", "ix"}
        and not (format.float_kind or format.base3 or format.vector)
        and (format.mask is None or (sparse and not format.has("sub")))
        and (not format.has("lut") or format.field("lut").scope == "tensor")
        # two levels: a whole number or small float of the group times a float of the row
        and (not format.has("sub") or format.field("d").scope == "row")
        and (format.has("d") or format.has("e"))
    )
    bits, whole = format.code_bits, format.zero == int(format.zero)
    name = ""
    if known and activations == "s8":
        name = f"signed{bits}" if _affine(format) and whole and bits in (4, 8) else ""
        if not format.has("z") and not format.has("m") and format.zero != 1 << bits - 1:
            name = ""
        if not format.channel and format.group < (64 if sparse else 32):
            name = ""  # an mma adds up the products of so many
    elif known and activations == "s4":
        symmetric = not (format.has("z") or format.has("m") or format.has("sub") or sparse)
        if _affine(format) and bits == 4 and symmetric and format.zero == 8:
            wide = format.channel or format.group >= 64  # an mma adds up 64 products
            columns = format.field("qc").count if format.has("qc") else 0
            name = "signed4by4" if wide and columns % 16 == 0 else ""
    elif activations == "f16" and format.float_kind == "f16":
        name = "half"
    elif known and activations == "f16":
        if format.minifloat is not None and bits >= 5:
            name = f"small{bits}"
        elif _affine(format) and bits >= 4 and (whole or bits > 4):
            name = f"affine{bits}"
        elif bits <= 4 and bits >= 2:
            name = f"table{bits}"
    if not name:
        raise Unsupported(
            f"the format has no tensor-core kernel for {activations} activations; take GEMV, or "
            "requantize to a row such as s4g128 or nf4g64", format.name)
    found = DECODINGS[name]
    return replace(found, step=2 * found.step, sparse=True) if sparse else found


def supports(format: Format, activations: str = "f16") -> bool:
    """Whether :func:`decoding` has an answer."""
    try:
        decoding(format, activations)
    except Unsupported:
        return False
    return True


def usual_schedule(format: Format, activations: str = "f16", m_tiles: int = 1) -> Schedule:
    """A schedule that every target can take; of more ``m_tiles`` than there are registers for as
    many as there are."""
    d = decoding(format, activations)
    tried = Schedule(m_tiles)
    if d.name == "half":
        tried = Schedule(m_tiles, depth=32, stages=4 if m_tiles < 4 else 3)
    elif d.step == 64:  # an mma takes twice as much of K: as many of them to a stage
        tried = Schedule(m_tiles, depth=128)
    tried = replace(tried, m_tiles=min(m_tiles, GemmSpec(format, activations).most_tiles))
    while GemmSpec(format, activations, schedule=tried).shared_bytes > SHARED_LIMIT:
        tried = replace(tried, stages=tried.stages - 1)
    return tried


@dataclass(frozen=True)
class GemmSpec:
    """One kernel: format of the weight, kind of activations ('f16', 's8' or 's4') and of y,
    schedule."""

    format: Format
    activations: str = "f16"
    out: str = "f32"
    schedule: Schedule = Schedule()

    @functools.cached_property
    def decoding(self) -> Decoding:
        """How the codes are decoded."""
        return decoding(self.format, self.activations)

    @property
    def name(self) -> str:
        """Name of the kernel and of its module."""
        s = self.schedule
        return (f"gemm_{self.format.name}_{self.activations}_{self.out}_m{16 * s.m_tiles}"
                f"n{s.warps_n}k{s.warps_k}x{s.depth}s{s.stages}"
                + (f"d{s.duplicates}" if self.table_entries else ""))

    @property
    def rows(self) -> int:
        """Rows of x that a block takes."""
        return self.decoding.tile * self.schedule.m_tiles

    @property
    def block_depth(self) -> int:
        """K of a stage."""
        return self.schedule.warps_k * self.schedule.depth

    @property
    def group(self) -> int:
        """Weights that share a scale; 0 for a whole row."""
        grouped = any(f.name in ("d", "e", "sub") and f.scope == "block"
                      for f in self.format.fields)
        return self.format.group if grouped else 0

    @property
    def columns(self) -> int:
        """Columns of W that are multiplied as halves."""
        return self.format.field("qc").count if self.format.has("qc") else 0

    def x_bytes(self, k: int) -> int:
        """Bytes of ``k`` activations, an even number."""
        return k * self.decoding.x_bits // 8

    @property
    def unit(self) -> int:
        """K of the sums that a scale is applied to: a group, or as many as a warp has at a time."""
        s = self.schedule
        most = 32 if s.m_tiles > 2 else s.depth
        return max(min(self.group or most, most, s.depth), self.decoding.step)

    @property
    def most_tiles(self) -> int:
        """Tiles of 16 rows of x that the registers of a warp have room for."""
        if not self.group or self.decoding.sparse:
            return 4
        return 2 + self.decoding.integer + (not self.zero_bytes)

    @property
    def padding(self) -> int:
        """K is padded to a multiple of this many weights."""
        return max(64, self.group)

    @property
    def scale_kind(self) -> str:
        """Kind of the packed scales, of a group or of the row if there are no groups; '' without. A
        power of two (e8m0) is a bf16 as it is, its 2^-127 and NaN too."""
        if self.format.float_kind:
            return ""
        if self.format.has("e"):
            return "bf16"
        if self.format.has("sub"):
            return "f16"  # integers of a byte, and e4m3, are exact
        return self.format.field("d").number

    @property
    def zero_kind(self) -> str:
        """Kind of the packed zero points or minima, '' without."""
        if self.format.has("m"):
            return self.format.field("m").number
        if not self.format.has("z"):
            # a zero with a fraction is exact in a half of its own, but not above 1024
            return "f16" if self.decoding.name.startswith("affine") and self.fraction else ""
        # int8 kernels count from the middle of the codes: exact for integers only
        return "f32" if self.format.field("z").number else "f16"

    @property
    def scale_bytes(self) -> int:
        """Bytes of a packed scale."""
        return {"": 0, "f32": 4}.get(self.scale_kind, 2)

    @property
    def zero_bytes(self) -> int:
        """Bytes of a packed zero point or minimum, 0 without."""
        return {"": 0, "f32": 4}.get(self.zero_kind, 2)

    @property
    def fraction(self) -> bool:
        """Whether the zero of all codes has a fraction."""
        return self.format.zero != int(self.format.zero)

    @property
    def scaled_table(self) -> bool:
        """Whether the table's halves take in the constant factor of the scales: a power of two."""
        return self.table_entries > 0 and math.frexp(self.format.scale_factor)[0] == 0.5

    @property
    def table_entries(self) -> int:
        """Entries of the table of pairs in shared memory (fours of 2-bit codes)."""
        return {"table2": 256, "table3": 64, "table4": 256}.get(self.decoding.name, 0)

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads of a block."""
        return 32 * self.schedule.warps_n * self.schedule.warps_k, 1, 1

    def steps(self, k: int) -> int:
        """Stages along K."""
        return -(-up(k, self.padding) // self.block_depth)

    def tiles(self, m: int, n: int) -> int:
        """Blocks of y."""
        return -(-m // self.rows) * -(-up(n, COLUMNS) // (COLUMNS * self.schedule.warps_n))

    def grid(self, m: int, n: int, k: int, blocks: int = 0) -> tuple[int, int, int]:
        """Blocks of a launch: one a tile, or ``blocks`` that share the tiles along K (Stream-K)."""
        return min(blocks or self.tiles(m, n), self.tiles(m, n) * self.steps(k)), 1, 1

    @property
    def table_bytes(self) -> int:
        """Shared memory of the table."""
        entry = 8 if self.decoding.name == "table2" else 4
        return self.table_entries * entry * self.schedule.duplicates

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage: x, codes, scales, zeros."""
        d, depth = self.decoding, self.block_depth
        x = self.rows * self.x_bytes(depth)
        words = sum(plane[2] for plane in d.planes) * depth // d.step * 128
        groups = max(depth // self.group, 1) if self.group else 0
        side = groups * COLUMNS * (self.scale_bytes + self.zero_bytes)
        return x + self.schedule.warps_n * (words + side)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a launch."""
        s = self.schedule
        partial = (s.warps_k - 1) * s.warps_n * s.m_tiles * self.decoding.fragments * 512
        return self.table_bytes + max(s.stages * self.stage_bytes, partial, 16)

    def workspace(self, m: int, n: int, blocks: int) -> tuple[int, int]:
        """Bytes of the parts of shared tiles, and number of int32 counters, zero before a launch
        (and after it)."""
        part = self.schedule.warps_n * self.schedule.m_tiles * self.decoding.fragments * 512
        return 2 * blocks * part, self.tiles(m, n)


def up(value: int, to: int) -> int:
    """``value`` rounded up to a multiple of ``to``."""
    return -(-value // to) * to


def half_pair(value: float) -> str:
    """The C literal of two halves ``value``; it must be exact."""
    half = np.float16(value)
    assert float(half) == value, value
    return f"0x{int(half.view(np.uint16)) * 0x10001:08x}u"


def check_schedule(spec: GemmSpec) -> None:
    """Unsupported if the template cannot take the schedule with the format."""
    s, d = spec.schedule, spec.decoding
    if spec.out not in ("f16", "f32"):
        raise Unsupported(f"y may be f16 or f32, not {spec.out}", spec.format.name)
    least = 1024 // d.x_bits  # rows of x of 128 bytes: eight parts to swizzle
    if s.depth % d.step or spec.unit % d.step or spec.block_depth < least:
        raise Unsupported(f"a stage of {s.warps_k} x {s.depth} is no whole number of steps of "
                          f"{d.step} and at least {least}", spec.format.name)
    if not 1 <= s.m_tiles <= spec.most_tiles:
        raise Unsupported(f"{s.m_tiles} tiles of 16 rows: the registers have room for 1 to "
                          f"{spec.most_tiles}", spec.format.name)
    if spec.x_bytes(spec.block_depth) > 16 * spec.block[0]:
        raise Unsupported(f"a stage is deeper ({spec.block_depth}) than its {spec.block[0]} "
                          "threads copy at once", spec.format.name)
    if spec.shared_bytes > SHARED_LIMIT:
        raise Unsupported(f"the schedule takes {spec.shared_bytes} bytes of shared memory; all "
                          "targets have 99 KiB", spec.format.name)


def render_gemm(spec: GemmSpec) -> str:
    """CUDA text of ``spec.name``; its parameters, in order:

    y [m, ldy] f32 or f16; x [m, ldx] f16, or int8 (int4, two a byte,
    low first) followed by its float32 scales [m] and, with columns apart, those of x as f16 [m,
    columns] (they count as zero in x); the packed weight
    (:func:`qigen.backends.cuda.gemm_packing.pack_gemm`); float32 parts and int32 counters
    (:meth:`GemmSpec.workspace`); m, n, k, ldx and ldy (all int32). x lies at a multiple of 16
    bytes and so do its rows: ldx is a multiple of 8 (f16), 16 (int8) or 32 (int4).
    Raises Unsupported for formats and schedules that the template does not take.
    """
    check_schedule(spec)
    fmt, s, d = spec.format, spec.schedule, spec.decoding
    factor = (0.0625 if d.name == "signed4" else 1.0)
    small = fmt.minifloat if d.name.startswith("small") else None
    if small is not None:
        # the same fields in a half stand for a number that is less by the biases
        factor *= small.factor * 2.0**-112
    vectors = [spec.block_depth // d.step * words // 4 for _, _, words in d.planes]
    planes = [
        {"source": source, "to": to, "words": words, "vectors": vectors[i],
         "at": spec.x_bytes(spec.rows * spec.block_depth) + 512 * s.warps_n * sum(vectors[:i])}
        for i, (source, to, words) in enumerate(d.planes)
    ]
    if not spec.scaled_table:
        factor *= fmt.scale_factor
    return render(
        "cuda/gemm.cu.j2", name=spec.name, name_of_format=fmt.name, m_tiles=s.m_tiles,
        most_tiles=spec.most_tiles,
        warps_n=s.warps_n, warps_k=s.warps_k, depth=s.depth, stages=s.stages, unit=spec.unit,
        step=d.step, decode=d.name, integer=d.integer, x_bits=d.x_bits,
        columns=spec.columns, planes=planes, sparse=d.sparse, fragments=d.fragments,
        tile=d.tile, small=small,
        first_two=f"0x{FIRST_TWO * 0x11111111:08x}u",
        group=spec.group, padding=spec.padding, scale_kind=spec.scale_kind,
        zero_kind=spec.zero_kind, minimum=fmt.has("m"), sum_rows=spec.zero_bytes > 0,
        row_scale=fmt.has("sub"), duplicates=s.duplicates, out=spec.out,
        code_zero=0 if fmt.has("z") or spec.fraction else int(fmt.zero), factor=factor,
        offset=(1 << fmt.code_bits - 1) if d.integer else 0,
        ones={"signed4": "0x10101010u", "signed8": "0x01010101u",
              "signed4by4": "0x11111111u"}.get(d.name, "0x3c003c00u"),
        half_pair=half_pair)  # fmt: skip
