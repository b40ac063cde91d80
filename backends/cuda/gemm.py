"""GEMM on tensor cores for 1 to 128 rows of activations: formats, fragment order, schedules.

One template (cuda/gemm.cu.j2) takes every row whose codes are affine of 4 to 8 bits (magic-number
decoding after MARLIN), small floats of 5, 6 or 8 bits (their fields moved to those of halves, after
FP6-LLM), or have a table of at most 16 values for the whole weight (pairs of codes look up pairs of
halves, after FLUTE), and f16 weights, with f16 activations; codes of 4 and 8 bits also with int8
activations (W8A8; two levels of scales after QServe), codes of 4 bits also with int4 activations,
whose outlier columns go through halves (after QUIK). Widths between powers of two lie in planes:
5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1. Of a 2:4 mask only what is kept is stored and goes through
mma.sp, which takes the sparse matrix on its left: then y^T = W x^T (after Sparse-MARLIN). Scales
are applied to the sums of a group in float32, so codes enter the tensor cores exactly. Zero points
and minima need the sum of the activations of a group, which one more mma by ones gives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qigen.codegen.render import render
from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import (
    MINIFLOATS,
    Array,
    Format,
    QuantizedTensor,
    as_float32,
    float_bits,
)

SHARED_LIMIT = 99 << 10
"""Shared memory that a block may have on every target."""

COLUMNS = 64
"""Rows of W (columns of y) that a warp takes: the unit of the packed form along N."""


@dataclass(frozen=True)
class Decoding:
    """How codes lie in a lane's words and what decodes them (cuda/decode.cuh.j2).

    A step is the K of one mma. ``words`` 32-bit words of a lane hold the codes of a step of 64
    columns (their low bits), ``high`` more the bits above, ``top`` the bits above those.
    ``sparse``: two of every four weights along K are there, and two words say which.
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
    def planes(self) -> tuple[tuple[str, str, int], ...]:
        """(section of the packed weight, registers, words of a step) of what a lane reads."""
        every = (("low", "codes", self.words), ("high", "tops", self.high),
                 ("top", "tips", self.top), ("which", "kept", 2 * self.sparse))
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
        if format.group < 32 or sparse:
            name = ""  # an mma adds up 32 products
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
    elif d.x_bits == 4:
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
            return "f16" if self.decoding.name.startswith("affine") and _fraction(self) else ""
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
    def table_entries(self) -> int:
        """Entries of the table of pairs in shared memory (fours of 2-bit codes)."""
        return {"table2": 256, "table3": 64, "table4": 256}.get(self.decoding.name, 0)

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads of a block."""
        return 32 * self.schedule.warps_n * self.schedule.warps_k, 1, 1

    def steps(self, k: int) -> int:
        """Stages along K."""
        return -(-_up(k, self.padding) // self.block_depth)

    def tiles(self, m: int, n: int) -> int:
        """Blocks of y."""
        return -(-m // self.rows) * -(-_up(n, COLUMNS) // (COLUMNS * self.schedule.warps_n))

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


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


def _fraction(spec: GemmSpec) -> bool:
    return spec.format.zero != int(spec.format.zero)


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
    columns] (they count as zero in x); the packed
    weight (:func:`pack_gemm`); float32 parts and int32 counters (:meth:`GemmSpec.workspace`); m, n,
    k, ldx and ldy (all int32). x lies at a multiple of 16 bytes and so do its rows: ldx is a
    multiple of 8 (f16), 16 (int8) or 32 (int4).
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
    if not _in_table(spec):
        factor *= fmt.scale_factor
    return render(
        "cuda/gemm.cu.j2", name=spec.name, name_of_format=fmt.name, m_tiles=s.m_tiles,
        most_tiles=spec.most_tiles,
        warps_n=s.warps_n, warps_k=s.warps_k, depth=s.depth, stages=s.stages, unit=spec.unit,
        step=d.step, decode=d.name, integer=d.integer, x_bits=d.x_bits,
        columns=spec.columns, planes=planes, sparse=d.sparse, fragments=d.fragments,
        tile=d.tile, small=small,
        first_two=f"0x{_FIRST_TWO * 0x11111111:08x}u",
        group=spec.group, padding=spec.padding, scale_kind=spec.scale_kind,
        zero_kind=spec.zero_kind, minimum=fmt.has("m"), sum_rows=spec.zero_bytes > 0,
        row_scale=fmt.has("sub"), duplicates=s.duplicates, out=spec.out,
        code_zero=0 if fmt.has("z") or _fraction(spec) else int(fmt.zero), factor=factor,
        offset=(1 << fmt.code_bits - 1) if d.integer else 0,
        ones={"signed4": "0x10101010u", "signed8": "0x01010101u",
              "signed4by4": "0x11111111u"}.get(d.name, "0x3c003c00u"),
        half_pair=half_pair)  # fmt: skip


# -- the packed form ------------------------------------------------------------------------------


def _fragments(codes: Array, step: int) -> Array:
    """[blocks of 64 columns, steps, lanes, tiles of 8 columns, codes of a lane]: the operand B of
    mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16") or k32."""
    n, k = codes.shape
    lane = np.arange(32)
    each = step // 8  # codes a register: 2 halves or 4 bytes
    index = np.arange(step // 4)
    column = lane[:, None] % 4 * each + index % each + index // each * 4 * each
    blocked = codes.reshape(n // COLUMNS, 8, 8, k // step, step)
    picked = blocked[:, :, lane[:, None] // 4, :, column]  # [32, codes, blocks, tiles, steps]
    return np.ascontiguousarray(picked.transpose(2, 4, 0, 3, 1))


def _words(parts: Array, bits: int) -> Array:
    """uint32: the last axis of ``parts`` as bit fields of one word, lowest first."""
    shifts = np.arange(parts.shape[-1], dtype=np.uint32) * np.uint32(bits)
    words: Array = np.bitwise_or.reduce(parts.astype(np.uint32) << shifts, axis=-1)
    return words


def _plane(words: Array) -> Array:
    """uint8: words [blocks, steps, lanes, words of a step] as vectors of four words a lane."""
    blocks, steps, lanes, each = words.shape
    lined = words.transpose(0, 2, 1, 3).reshape(blocks, lanes, steps * each // 4, 4)
    return np.ascontiguousarray(lined.transpose(0, 2, 1, 3)).view(np.uint8).reshape(-1)


def _sparse_fragments(codes: Array) -> Array:
    """[blocks of 64 rows of W, steps, lanes, 8, 4]: the operand A of mma.sp.m16n8k32 (PTX ISA,
    "Matrix Fragments for sparse mma.m16n8k32") from the kept codes [n, k / 2]: of each of four
    tiles of 16 rows the registers 0 and 1, then 2 and 3."""
    n, kept = codes.shape
    # blocks, tile, upper or lower rows, row, steps, half of K, quad, pair
    split = codes.reshape(n // COLUMNS, 4, 2, 8, kept // 16, 2, 4, 2)
    lanes = split.transpose(0, 4, 3, 6, 1, 5, 2, 7)
    return np.ascontiguousarray(lanes).reshape(n // COLUMNS, kept // 16, 32, 8, 4)


_FIRST_TWO = 0b0100  # the metadata that four weights have where the first two are kept


def _which(places: Array) -> Array:
    """uint8: the metadata of mma.sp.m16n8k32 from places [n, k / 2] of the kept weights. A lane has
    two words a step: of tiles 0 and 1 of 16 rows (the selector says which) and of 2 and 3; a word
    has row l / 4 and, in its upper half, row l / 4 + 8, of 16 weights along K. Words of zeros,
    which a stage past K is filled with, stand for the first two weights of every four."""
    n, kept = places.shape
    pairs = places[:, ::2].astype(np.uint32) | places[:, 1::2].astype(np.uint32) << np.uint32(2)
    fours = _words(pairs.reshape(n, -1, 4) ^ np.uint32(_FIRST_TWO), 4)
    # blocks, word, selector, upper or lower rows, row, steps, half of K
    split = fours.reshape(n // COLUMNS, 2, 2, 2, 8, kept // 16, 2)
    lanes = np.ascontiguousarray(split.transpose(0, 5, 4, 2, 6, 1, 3))
    return _plane(_words(lanes.reshape(n // COLUMNS, kept // 16, 32, 2, 2), 16))


def _pairs(parts: Array, bits: int) -> Array:
    """uint8: a plane of 1, 2 or 4 bits whose halves of words are the halves of registers: code
    2 r + h of tile j lies at bit 16 h + bits (2 j + r), modulo what a word holds."""
    blocks, steps, lanes = parts.shape[:3]
    tiles = 8 // bits  # words, registers of a word, halves
    split = parts.reshape(blocks, steps, lanes, 8 // tiles, 2 * tiles, 2)
    halves = np.concatenate([split[..., 0], split[..., 1]], axis=-1)
    return _plane(_words(halves, bits))


def _code_planes(codes: Array, d: Decoding) -> list[Array]:
    parts = _sparse_fragments(codes) if d.sparse else _fragments(codes, d.step)
    blocks, steps, lanes = parts.shape[:3]  # of [blocks, steps, lanes, 8 tiles, codes]
    if d.name == "half":
        return [_plane(_words(parts.reshape(blocks, steps, lanes, 16, 2), 16))]
    if d.name in ("affine8", "small8"):
        return [_plane(_words(parts, 8))]
    if d.name.startswith(("affine", "small")):
        found = [_pairs(parts & 15, 4)]
        if d.bits > 5:
            found.append(_pairs(parts >> 4 & 3, 2))
        if d.bits & 1:
            found.append(_pairs(parts >> d.bits - 1, 1))
        return found
    if d.name == "table4":
        return [_plane(_words(parts.reshape(blocks, steps, lanes, 4, 8), 4))]
    if d.name in ("table2", "table3"):
        low = _words((parts & 3).reshape(blocks, steps, lanes, 2, 16), 2)
        if d.name == "table2":
            return [_plane(low)]
        top = _words((parts >> 2).reshape(blocks, steps, lanes, 1, 32), 1)
        return [_plane(low), _plane(top)]
    if d.name == "signed8":
        return [_plane(_words(parts.reshape(blocks, steps, lanes, 16, 4) ^ 0x80, 8))]
    if d.name == "signed4by4":
        return [_plane(_words(parts.reshape(blocks, steps, lanes, 16, 8) ^ 8, 4))]
    # signed4: the high nibbles of the bytes are the first register, the low ones the second
    signed = parts ^ 8
    pairs = np.stack([signed[..., 4:], signed[..., :4]], -1).reshape(blocks, steps, lanes, 8, 8)
    return [_plane(_words(pairs, 4))]


def _by_rows(values: Array) -> Array:
    """uint8: values [N, groups] as [blocks of 64, groups, l / 4, tiles of 16, rows of a lane]."""
    n, groups = values.shape
    split = values.reshape(n // COLUMNS, 4, 2, 8, groups)
    return np.ascontiguousarray(split.transpose(0, 4, 3, 1, 2)).view(np.uint8).reshape(-1)


def _by_quads(values: Array) -> Array:
    """uint8: values [N, groups] as [blocks of 64, groups, quads, tiles, 2 columns of a lane]."""
    n, groups = values.shape
    split = values.reshape(n // COLUMNS, 8, 4, 2, groups)
    return np.ascontiguousarray(split.transpose(0, 4, 2, 1, 3)).view(np.uint8).reshape(-1)


def _padded(array: Array, rows: int, columns: int) -> Array:
    return np.pad(array, ((0, rows - array.shape[0]), (0, columns - array.shape[1])))


def _side(spec: GemmSpec, weight: QuantizedTensor, name: str, kind: str, below: int = 0,
          sign: int = 1) -> Array:
    """[N, groups] or [N, 1]: ``sign * value - below`` of a field of scales or zeros, as bits of
    floats of a kind that holds it exactly."""
    raw = weight.fields[name].reshape(weight.shape[0], -1)
    number = spec.format.field(name).number
    values = as_float32(number, raw) if number else raw.astype(np.float32)
    return float_bits(np.float32(sign) * values - np.float32(below), kind)


def pack_gemm(spec: GemmSpec, weight: QuantizedTensor) -> npt.NDArray[np.uint8]:
    """uint8: the weight in the order in which the kernel's lanes multiply.

    Sections, each of whole vectors of 16 bytes: codes by blocks of 64 rows of W, steps along K,
    lanes; their top bits (3 bits); scales and zeros by blocks and groups; a float factor of every
    row (two levels); the table. Rows and columns past N and K are zero. Raises BadInput for a
    weight of another format.
    """
    fmt, d = spec.format, spec.decoding
    if weight.format != fmt:
        raise BadInput(f"the weight is {weight.format.name}, the kernel takes {fmt.name}")
    n, k = weight.shape
    rows, columns = _up(n, COLUMNS), _up(k, spec.padding)
    groups = columns // spec.group if spec.group else 1
    kept = columns // (2 if d.sparse else 1)
    codes = weight.fields["codes"].reshape(n, -1)[:, :kept]
    sections = _code_planes(_padded(codes, rows, kept), d)
    if d.sparse:
        places = np.tile(np.array([0, 1], np.uint8), (rows, kept // 2))
        places[:n, : codes.shape[1]] = weight.fields["ix"].reshape(n, -1)[:, :kept]
        sections.append(_which(places))
    if not spec.scale_kind:
        return np.concatenate(sections)
    in_order = _by_rows if d.sparse else _by_quads
    if fmt.has("e"):
        e = weight.fields["e"].reshape(n, -1).astype(np.uint16)
        scale = np.where(e == 255, 0x7FC0, np.where(e, e << 7, 0x40)).astype(np.uint16)
    else:
        scale = _side(spec, weight, "sub" if fmt.has("sub") else "d", spec.scale_kind)
    sections.append(in_order(_padded(scale[:, :groups], rows, groups)))
    if spec.zero_kind and _fraction(spec):
        sections.append(_by_quads(np.full((rows, groups), fmt.zero, np.float16)))
    elif spec.zero_kind:
        below = (1 << fmt.code_bits - 1) if d.integer and fmt.has("z") else 0
        zero = _side(spec, weight, "m" if fmt.has("m") else "z", spec.zero_kind, below,
                     fmt.min_sign if fmt.has("m") else 1)
        sections.append(_by_quads(_padded(zero[:, :groups], rows, groups)))
    if fmt.has("sub"):
        factor = _side(spec, weight, "d", "f32")
        sections.append(_by_quads(_padded(factor, rows, 1)))
    if spec.table_entries:
        sections.append(_table(spec, weight).view(np.uint8))
    if spec.columns:
        # whole weights: what int4 activations leave out; a column that is named twice counts once
        places = weight.fields["qc"].reshape(-1).astype(np.int64)
        halves = weight.dequantize()[:, places].astype(np.float16)
        halves[:, 1:][:, places[1:] == places[:-1]] = 0
        sections += _code_planes(_padded(halves.view(np.uint16), rows, spec.columns),
                                 DECODINGS["half"])
    return np.concatenate(sections)


def gemm_bytes(spec: GemmSpec, n: int, k: int) -> int:
    """Bytes of :func:`pack_gemm` of a weight [n, k]."""
    rows, columns = _up(n, COLUMNS), _up(k, spec.padding)
    groups = columns // spec.group if spec.group else 1
    d = spec.decoding
    total = sum(words for _, _, words in d.planes) * columns // d.step * rows * 2
    total += rows * groups * (spec.scale_bytes + spec.zero_bytes)
    total += 4 * rows * spec.format.has("sub") + 2 * rows * spec.columns
    return total + (2 * max(1 << spec.format.code_bits, 8) if spec.table_entries else 0)


def _in_table(spec: GemmSpec) -> bool:
    """Whether the table's halves take in the constant factor of the scales: a power of two."""
    return spec.table_entries > 0 and math.frexp(spec.format.scale_factor)[0] == 0.5


def _table(spec: GemmSpec, weight: QuantizedTensor) -> npt.NDArray[np.float16]:
    """f16 [2^bits]: what the codes stand for, a power of two of the scales included."""
    fmt = spec.format
    if fmt.has("lut"):
        values: Array = weight.fields["lut"].reshape(-1).view(np.float16).astype(np.float32)
    elif fmt.table is None and fmt.values is None and fmt.minifloat is None:
        values = np.arange(1 << fmt.code_bits) - np.float32(fmt.zero)
    else:
        values = fmt.levels
    if _in_table(spec):
        values = values * np.float32(fmt.scale_factor)
    table = np.zeros(max(1 << fmt.code_bits, 8), np.float16)
    table[: len(values)] = values.astype(np.float16)
    return table


# -- and back -------------------------------------------------------------------------------------


def _unplane(data: Array, blocks: int, steps: int, each: int) -> Array:
    """uint32 [blocks, steps, lanes, words of a step]: the inverse of :func:`_plane`."""
    lined = data.view(np.uint32).reshape(blocks, steps * each // 4, 32, 4).transpose(0, 2, 1, 3)
    words: Array = lined.reshape(blocks, 32, steps, each).transpose(0, 2, 1, 3)
    return words


def _unwords(words: Array, bits: int) -> Array:
    """uint32 [..., 32 / bits]: the fields of words, lowest first."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    fields: Array = words[..., None] >> shifts & np.uint32((1 << bits) - 1)
    return fields


def _unpairs(words: Array, bits: int) -> Array:
    """[blocks, steps, lanes, 8 tiles, 4 codes]: the inverse of :func:`_pairs`."""
    halves = _unwords(words, bits).reshape(*words.shape, 2, 16 // bits)
    return np.moveaxis(halves, -2, -1).reshape(*words.shape[:3], 8, 4)


def _unfragments(parts: Array, d: Decoding) -> Array:
    """[n, kept columns]: codes from [blocks, steps, lanes, tiles of 8 columns, codes]."""
    blocks, steps = parts.shape[:2]
    if d.sparse:
        split = parts.reshape(blocks, steps, 8, 4, 4, 2, 2, 2)
        lined = split.transpose(0, 4, 6, 2, 1, 5, 3, 7)
    else:  # quads, tiles, register and element of it
        split = parts.reshape(blocks, steps, 8, 4, 8, 2, d.step // 8)
        lined = split.transpose(0, 4, 2, 1, 5, 3, 6)
    codes: Array = lined.reshape(blocks * COLUMNS, -1)
    return codes


def _codes_of(planes: list[Array], d: Decoding) -> Array:
    """[blocks, steps, lanes, 8, codes]: the inverse of :func:`_code_planes` from words."""
    low = planes[0]
    shape = (*low.shape[:3], 8, -1)
    codes: Array
    if d.name == "half":
        codes = _unwords(low, 16).reshape(shape)
        return codes
    if d.name in ("affine8", "small8"):
        codes = _unwords(low, 8).reshape(shape)
        return codes
    if d.name.startswith(("affine", "small")):
        codes = _unpairs(low, 4)
        if d.bits > 5:
            codes = codes | _unpairs(planes[1], 2) << np.uint32(4)
        if d.bits & 1:
            codes = codes | _unpairs(planes[-1], 1) << np.uint32(d.bits - 1)
        return codes
    if d.name.startswith("table"):
        codes = _unwords(low, min(d.bits & ~1, 4)).reshape(shape)
        if d.name == "table3":
            codes = codes | _unwords(planes[1], 1).reshape(shape) << np.uint32(2)
        return codes
    if d.name == "signed8":
        codes = _unwords(low, 8).reshape(shape) ^ np.uint32(0x80)
        return codes
    pairs = _unwords(low, 4).reshape(*shape[:4], 4, 2)
    codes = np.concatenate([pairs[..., 1], pairs[..., 0]], axis=-1) ^ np.uint32(8)
    return codes


def unpack_gemm(spec: GemmSpec, shape: tuple[int, int],
                packed: npt.NDArray[np.uint8]) -> QuantizedTensor:
    """The exact inverse of :func:`pack_gemm` for kernels of f16 activations."""
    fmt, d, (n, k) = spec.format, spec.decoding, shape
    if packed.size != gemm_bytes(spec, n, k):
        raise BadInput(f"a {n}x{k} weight for tensor cores takes {gemm_bytes(spec, n, k)} bytes, "
                       f"but {packed.size} are here; pack it again", fmt.name)
    rows, columns = _up(n, COLUMNS), _up(k, spec.padding)
    blocks, steps = rows // COLUMNS, columns // d.step
    groups = columns // spec.group if spec.group else 1
    packed, at = np.ascontiguousarray(packed), 0

    def section(nbytes: int) -> Array:
        nonlocal at
        at += nbytes
        taken: Array = packed[at - nbytes : at].copy()
        return taken

    planes = [_unplane(section(blocks * steps * 128 * words), blocks, steps, words)
              for _, _, words in d.planes]
    nblocks = -(-k // fmt.block)
    fields: dict[str, Array] = {}

    def fill(name: str, values: Array) -> None:
        """A field from values [rows, elements of a row]: what is past K is padding, or zero."""
        field = fmt.field(name)
        want = field.shape(n, nblocks)
        flat = np.zeros((n, want[1] * want[2]), field.dtype)
        given = values[:n, : flat.shape[1]]
        flat[:, : given.shape[1]] = given
        fields[name] = flat.reshape(want)

    fill("codes", _unfragments(_codes_of(planes, d), d))
    if d.sparse:
        lanes = _unwords(planes[-1], 16).reshape(blocks, steps, 8, 2, 2, 2, 2)
        fours = lanes.transpose(0, 5, 3, 6, 2, 1, 4).reshape(rows, steps * 2)
        pairs = _unwords(fours, 4)[..., :4].reshape(rows, -1) ^ np.uint32(_FIRST_TWO)
        fill("ix", np.stack([pairs & 3, pairs >> 2], axis=-1).reshape(rows, -1))
    if not spec.scale_kind:
        return QuantizedTensor(fmt, shape, fields)

    def side(kind: str, count: int) -> Array:
        """Bits [rows, count] of floats of a kind."""
        raw = section(rows * count * (4 if kind == "f32" else 2))
        bits = raw.view(np.uint32 if kind == "f32" else np.uint16)
        if d.sparse:
            bits = bits.reshape(blocks, count, 8, 4, 2).transpose(0, 3, 4, 2, 1)
        else:
            bits = bits.reshape(blocks, count, 4, 8, 2).transpose(0, 3, 2, 4, 1)
        lined: Array = bits.reshape(rows, count)
        return lined

    def restored(name: str, bits: Array, kind: str, sign: int = 1) -> None:
        """A field from the floats that stand for it exactly."""
        number, values = fmt.field(name).number, np.float32(sign) * as_float32(kind, bits)
        if number in MINIFLOATS:
            codes = np.zeros(1 << 16, np.uint8)
            every = np.arange(1 << MINIFLOATS[number].bits)
            codes[float_bits(MINIFLOATS[number].values(every), kind)] = every
            fill(name, codes[bits])
        elif number:
            fill(name, bits if number == kind and sign == 1 else float_bits(values, number))
        else:
            fill(name, values.astype(np.int64))

    scale = side(spec.scale_kind, groups)
    if fmt.has("e"):
        fill("e", scale >> np.uint16(7) & np.uint16(0xFF))
    else:
        restored("sub" if fmt.has("sub") else "d", scale, spec.scale_kind)
    if spec.zero_kind:
        zero = side(spec.zero_kind, groups)
        if fmt.has("m"):
            restored("m", zero, spec.zero_kind, fmt.min_sign)
        elif fmt.has("z"):
            restored("z", zero, spec.zero_kind)
    if fmt.has("sub"):
        restored("d", side("f32", 1), "f32")
    if fmt.has("lut"):
        count = fmt.field("lut").count
        fields["lut"] = section(2 * max(count, 8)).view(np.uint16)[:count].reshape(1, 1, count)
    return QuantizedTensor(fmt, shape, fields)
