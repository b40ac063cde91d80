"""The matmul family: y[M, N] = x[M, K] W[N, K]^T for every weight format, f32 or int8 activations.

M = 1 is a GEMV bound by the stream of packed weights; larger M reuse each decoded vector for a tile
of tokens. The two templates are ``matmul_int8`` and ``matmul_f32``; what differs between formats
and ISAs is data (the decode plan, the ISA row).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qigen.backends.base import Isa, KernelSource
from qigen.backends.cpu.decode import ACTIVATION_GROUP, STEP, DecodePlan, decode_plan
from qigen.codegen.render import render
from qigen.errors import Unsupported
from qigen.formats.algebra import MINIFLOATS, SELECTED, Format
from qigen.formats.layout import (
    Layout,
    factor_bytes,
    field_offsets,
    head_bytes,
    kblock_bytes,
    row_offsets,
    shared_offsets,
)
from qigen.formats.words import ENTRY

ACTIVATION_MAX = 127
"""Largest magnitude of a quantized activation."""

I32_MAX = 2**31 - 1
DEFAULT_PREFETCH = 4096
"""Bytes ahead of the stream of weights that an int8 kernel of one token prefetches."""

MATRIX_TOKENS = 4
"""Tokens from which on tile registers multiply bf16: fewer would leave most of a tile empty."""

MATRIX_TILE = 16
"""Tokens of a tile of an int8 kernel whose sums lie in a tile register."""

PANEL = 128
"""Weights along K that the f32 kernels decode at a time: 16 rows x 128 x 4 bytes is 8 KiB of L1."""

PANEL_WEIGHTS = 1024
"""Weights along K of the panels of an int8 kernel, all its row-blocks together: 20 KiB of L1."""

PANEL_FROM = 12
"""Tokens of whole tiles (two at least) from which on an int8 kernel unpacks into a panel. Without
one each tile goes through all of K, and its activations with what it reads fill level 1: where
others share that, tiles of 6 and 8 tokens took 1.3 to 1.9 times as long (Zen 3, 16 tokens)."""

PANEL_TILES_TWO_LEVEL = 2
"""The same where scales have two levels: they cost as much as the codes."""

PANEL_TOKENS = 128
"""Tokens at most that share the panels of an int8 kernel: their totals are 8 KiB a row-block."""

TURN_BYTES = 640
"""Bytes of the weights at most that one token reads of a row-block before it is the next one's
turn: longer turns read from one place of the memory at a time (u6g32 on Zen 3, 2 threads: turns of
448 bytes take 0.65 ms, of 3584 bytes 1.1 ms)."""

RANK_TOKENS = 128
"""Tokens at most whose products with the first factor of a low-rank residual are kept."""


_ARITHMETIC = {"f32": "a32", "bf16": "a16", "int8": "a8", "int8-token": "a8t", "int4": "a4",
               "int4-token": "a4t"}  # fmt: skip

INTEGER_ACTIVATIONS = ("int8", "int8-token", "int4", "int4-token")
"""Kinds of quantized activations: bytes with a scale for each 32 values, or for each token. Those
of 4 bits are bytes from -7 to 7 but for the columns that a format keeps apart, which have 8 bits in
the same scale (QUIK, Ashkboos et al. 2023, arXiv:2310.09259)."""


def activation_top(activations: str) -> int:
    """Largest magnitude of a quantized activation that is in no column apart."""
    return 7 if activations.startswith("int4") else ACTIVATION_MAX


@dataclass(frozen=True)
class Bound:
    """The proven worst case of an integer accumulator.

    ``lane`` is the largest magnitude that a lane reaches before ``flush`` steps are widened
    (None: the lane is 32 bits wide from the start), ``segment`` the largest 32-bit sum.
    """

    signed: bool
    table_zero: int
    zero: int
    flush: int | None
    lane: int | None
    segment: int


def accumulator_bound(plan: DecodePlan, isa: Isa) -> Bound:
    """Prove that no accumulator of a segment overflows; Unsupported if a schedule could not."""
    f = plan.format
    low, high = f.mapped_range
    table_zero = max(0, -low)  # makes the table's values unsigned
    top = high + table_zero
    # a zero with a fraction is taken off with the minimum
    fixed = int(f.zero) if f.zero == int(f.zero) else 0
    zero = fixed + table_zero
    signed = False
    flush = None
    lane = None
    limit = isa.dot_limit
    # a 16-bit lane adds two products a step
    if top > isa.code_max or (limit is not None and 2 * top * ACTIVATION_MAX > limit):
        # code - centre instead, as a signed byte
        signed = True
        centre = 0 if f.byte_table else 1 << (f.code_bits - 1)
        table_zero, zero = 0, fixed - centre
        top = max(abs(low - centre), abs(high - centre))
    if limit is not None:
        step = 2 * top * ACTIVATION_MAX
        if step > limit:
            raise Unsupported(f"{f.name} overflows the 16-bit lanes of {isa.name}")
        flush = min(limit // step, plan.segment_length // STEP)
        lane = flush * step
    segment = plan.segment_length * (top + abs(zero)) * ACTIVATION_MAX
    assert segment <= I32_MAX, "a segment has at most 32 weights of 8 bits"
    return Bound(signed, table_zero, zero, flush, lane, segment)


@dataclass(frozen=True)
class MatmulSpec:
    """One kernel of the family: (format row, ISA row, schedule)."""

    format: Format
    layout: Layout
    isa: Isa
    activations: str  # "f32", "bf16", or one of INTEGER_ACTIVATIONS
    tiles: tuple[int, ...]
    prefetch: int = DEFAULT_PREFETCH  # 0: none
    streams: int = 1  # row-blocks that a tile of one token reads side by side

    @property
    def name(self) -> str:
        """E.g. ``matmul_q4_0_a8__avx512vnni_16x8_kb1``; another prefetch distance and number
        of streams are named too."""
        ahead = f"_pf{self.prefetch}" if self.prefetch != DEFAULT_PREFETCH else ""
        ahead += f"_s{self.streams}" if self.streams > 1 else ""
        return (
            f"matmul_{self.format.name}_{_ARITHMETIC[self.activations]}__{self.isa.name}"
            f"_{self.layout.rows * self.row_tile}x{self.tiles[0]}_kb{self.layout.blocks}{ahead}"
        )

    @property
    def row_tile(self) -> int:
        """Row-blocks of a tile of several tokens: they share the loads of the activations."""
        return self.isa.row_tile if self.integer else 1

    @property
    def integer(self) -> bool:
        """Whether the activations are quantized."""
        return self.activations in INTEGER_ACTIVATIONS

    @property
    def single(self) -> bool:
        """Whether one token by float activations has a loop of its own, which needs no panel."""
        f = self.format
        return bool(self.activations == "f32" and not f.float_kind and not f.vector
                    and self.isa.features)

    @property
    def token_scale(self) -> bool:
        """Whether quantized activations have one scale for a whole token."""
        return self.activations.endswith("-token")

    @property
    def panel(self) -> bool:
        """Whether many tokens share a panel of unpacked weights: it pays where codes must be
        unpacked at all. Weights that are kept apart have no place in it."""
        if not self.integer or self.tiles[0] == 1 or self.format.has("oc") or self.format.has("qc"):
            return False
        plan = decode_plan(self.format, self.layout)
        if plan.words or plan.kblock % ACTIVATION_GROUP:
            return False
        return plan.unpack_instructions > 0 or self._wide

    @property
    def _wide(self) -> bool:
        return self.isa.tiles and self.tiles[0] == MATRIX_TILE

    @property
    def matrix(self) -> bool:
        """Whether tile registers multiply a panel by the largest tile of tokens."""
        return self._wide and self.panel

    @property
    def panel_tiles(self) -> int:
        """Tiles of tokens from which on the panel is used."""
        if self.matrix:
            return 1
        if self.format.has("sub"):
            return PANEL_TILES_TWO_LEVEL
        return max(2, -(-PANEL_FROM // self.tiles[0]))

    def entry(self, epilogue: str) -> str:
        """The function that computes with an epilogue: store, add, silu or gelu_tanh."""
        return f"{self.name}__{epilogue}"


def turn_weights(format: Format, layout: Layout) -> int:
    """Weights along K of a turn: as many whole segments as TURN_BYTES hold, a part of a K-block."""
    kblock = format.block * layout.blocks
    weights, size = kblock, kblock_bytes(format, layout)
    while size > TURN_BYTES and weights % (2 * ACTIVATION_GROUP) == 0:
        weights, size = weights // 2, size // 2
    return weights


def chains(isa: Isa) -> int:
    """Sums of one token by float activations that run side by side, to hide the latency of one."""
    return 4 if isa.registers >= 32 else 2


def render_matmul(
    spec: MatmulSpec,
    epilogues: tuple[str, ...],
    decode_rows: bool = False,
    notes: tuple[str, ...] = (),
) -> KernelSource:
    """The translation unit of a kernel; ``decode_rows`` adds the embedding lookup (f32 only)."""
    f = spec.format
    plan = None if f.float_kind else decode_plan(f, spec.layout)
    bytes_, kblock = kblock_bytes(f, spec.layout), f.block * spec.layout.blocks
    lines = [
        f"{spec.name}: format {f.name} ({f.bits_per_weight:.4g} bits a weight), "
        f"activations {spec.activations}, {spec.isa.name}.",
        f"Template: cpu/matmul_{'int8' if spec.integer else 'f32'}.cpp.j2; "
        f"token tiles {list(spec.tiles)}, {spec.layout.rows * spec.row_tile} rows, K-block of "
        f"{spec.layout.blocks * f.block} weights in {bytes_} bytes.",
        *notes,
    ]
    common = {
        "kernel": spec.name,
        "isa": spec.isa,
        "tiles": spec.tiles,
        "plan": plan,
        "kblock_bytes": bytes_,
        "epilogues": epilogues,
        "head_bytes": head_bytes(f, spec.layout),
        "shared_bytes": shared_offsets(f)[1],
        "rank": f.rank,
        "rank_tokens": RANK_TOKENS // spec.tiles[0] * spec.tiles[0],
        "factors": shared_offsets(f)[1],
        "factor_bytes": factor_bytes(f, spec.layout),
        "row_factors": row_offsets(f, spec.layout).get(("lb", 0), 0),
        "kblock": kblock,
        "minifloats": MINIFLOATS,
        "byte_table": f.byte_table if spec.integer else f.table,
        "scale_factor": f.scale_factor * (f.byte_step if spec.integer else 1),
        "columns": f.field("qc").count if f.has("qc") else 0,
        "column_values": row_offsets(f, spec.layout).get(("qv", 0), 0),
        "vector_shift": f.vector.bit_length() if f.vector else 0,  # bytes of f16 entries
        "book_bytes": (2 * f.vector << f.code_bits) if f.vector else 0,
        "chains": chains(spec.isa),
        "turns": plan.turns(turn_weights(f, spec.layout) if spec.streams > 1 else kblock)
        if plan
        else (),
        "zero_code": int(f.zero) if f.has("dict") else 0,
        "entry_bytes": ENTRY,
        "pick_controls": _pick_controls(),
        "lut_offset": field_offsets(f, spec.layout).get(("lut", 0, 0), 0),
    }
    entries = tuple(spec.entry(e) for e in epilogues)
    if not spec.integer:
        assert spec.layout.blocks == 1 or plan is not None
        text = render(
            "cpu/matmul_f32.cpp.j2",
            banner=_banner(lines),
            format=f,
            bf16=spec.activations == "bf16",
            table_zero=0,
            panel=max(PANEL // kblock, 1) * kblock,
            decode_rows=decode_rows,
            matrix=MATRIX_TOKENS if spec.isa.tiles and spec.activations == "bf16" else 0,
            prefetch=spec.prefetch,
            streams=spec.streams,
            single=spec.single,
            **common,
        )
        if decode_rows:
            entries += (f"{spec.name}__rows",)
        return KernelSource(spec.name, text, spec.isa.name, entries)
    if plan is None or not f.integer:
        raise Unsupported(f"{f.name} has no integer codes: its activations must be f32 or bf16")
    bound = accumulator_bound(plan, spec.isa)
    lane = (
        f"16-bit lane {bound.lane} of {spec.isa.dot_limit} over {bound.flush} steps, "
        if bound.flush
        else ""
    )
    lines.append(f"Proven accumulator bound: {lane}segment sum {bound.segment} of {I32_MAX}.")
    text = render(
        "cpu/matmul_int8.cpp.j2",
        banner=_banner(lines),
        signed=bound.signed,
        table_zero=bound.table_zero,
        zero=bound.zero,
        flush=bound.flush or 0,
        row_tile=spec.row_tile,
        token_scale=spec.token_scale,
        prefetch=spec.prefetch,
        streams=spec.streams,
        panel=spec.panel,
        panel_weights=PANEL_WEIGHTS // spec.row_tile,
        panel_tiles=spec.panel_tiles,
        panel_tokens=PANEL_TOKENS,
        matrix=spec.matrix,
        **common,
    )
    return KernelSource(spec.name, text, spec.isa.name, entries)


def _pick_controls() -> tuple[int, ...]:
    """int32 [5 * 16]: for each number of codes used before, and each selection of four places, the
    byte of a vector of four codes that comes to every place; 0x80 where there is none."""
    controls = []
    for before in range(SELECTED + 1):
        for bits in range(1 << STEP):
            at, control = before, 0
            for place in range(STEP):
                chosen = bits >> place & 1
                control |= (at % STEP if chosen else 0x80) << 8 * place
                at += chosen
            controls.append(control - (1 << 32) if control >= 1 << 31 else control)
    return tuple(controls)


def _banner(lines: list[str]) -> str:
    return "\n".join(f"// {line}" for line in lines)


@dataclass(frozen=True)
class ActivationRecord:
    """Layout of one quantized activation row: bytes, scales, then what its consumers correct by.

    ``k`` is the padded length. Offsets are in bytes from the row's start; every array begins on a
    64-byte line. ``zeros`` holds (segment length, zero point) pairs, ``sums`` segment lengths.
    """

    k: int
    token_scale: bool
    zeros: tuple[tuple[int, int], ...]
    sums: tuple[int, ...]

    @property
    def scale_offset(self) -> int:
        return _align(self.k)

    def _arrays(self) -> list[tuple[str, int, int]]:
        """(kind, segment length, zero) in storage order."""
        return [("zero", n, z) for n, z in self.zeros] + [("sum", n, 0) for n in self.sums]

    def offset(self, kind: str, length: int, zero: int = 0) -> int:
        """Byte offset of the correction array of ``kind`` 'zero' or 'sum'."""
        at = self.scale_offset + _align(4 * max(1, self.k // ACTIVATION_GROUP))
        for array in self._arrays():
            if array == (kind, length, zero):
                return at
            at += _align(4 * (self.k // array[1]))
        raise KeyError((kind, length, zero))

    @property
    def nbytes(self) -> int:
        """Bytes of a row, kept off multiples of 1 KiB so that rows fall in different L1 sets."""
        at = self.scale_offset + _align(4 * max(1, self.k // ACTIVATION_GROUP))
        at += sum(_align(4 * (self.k // n)) for _, n, _ in self._arrays())
        return at + 64 * (at % 1024 == 0)


def interleaved(
    records: npt.NDArray[np.uint8], tiles: tuple[int, ...]
) -> npt.NDArray[np.uint8]:
    """uint8 [m, nbytes]: activation records as the int8 kernels read them.

    Tokens are cut greedily into register tiles (descending ``tiles``, ending in 1). Within a tile
    the records are interleaved by words of 4 bytes, so that everything a step reads is contiguous.
    """
    m, nbytes = records.shape
    out = np.empty_like(records)
    first = 0
    for size in tiles:
        while m - first >= size:
            words = records[first : first + size].reshape(size, nbytes // 4, 4)
            out[first : first + size] = words.transpose(1, 0, 2).reshape(size, nbytes)
            first += size
    return out


def _align(n: int) -> int:
    return -(-n // 64) * 64


def activation_needs(spec: MatmulSpec) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """The (segment length, zero) and sum arrays that a kernel reads from its activation rows."""
    plan = decode_plan(spec.format, spec.layout)
    bound = accumulator_bound(plan, spec.isa)
    zeros = ((plan.segment_length, bound.zero),) if bound.zero else ()
    sums = (plan.segment_length,) if plan.has_minimum else ()
    return zeros, sums
