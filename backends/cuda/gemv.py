"""GEMV for 1 to 8 rows of activations, and the lookup of rows: from the CPU's decode plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qigen.backends.cpu.decode import decode_plan
from qigen.codegen.render import render
from qigen.errors import Unsupported
from qigen.formats.algebra import MINIFLOATS, Format
from qigen.formats.layout import (
    Layout,
    field_offsets,
    field_planes,
    head_bytes,
    kblock_bytes,
    packed_shape,
    row_offsets,
    shared_offsets,
)

LAYOUT = Layout(rows=16, blocks=1)
"""Weights lie on the GPU as they do on the CPU: one packing for both."""

MAX_M = 8
"""Rows of activations that a GEMV takes at most."""

_TYPES = {8: "char", 16: "short", 32: "int"}


@dataclass(frozen=True)
class GemvSpec:
    """One kernel: the weight format, the rows of x that it takes, the warps of a block.

    ``bias`` adds a vector [n] to every row, ``residual`` a matrix [m, n] (which y may be).
    ``tail``: k is any number; else a multiple of the format's block, and rows of x are aligned.
    """

    format: Format
    m: int = 1
    warps: int = 4
    bias: bool = False
    residual: bool = False
    tail: bool = False

    @property
    def name(self) -> str:
        """Name of the kernel and of its module."""
        extra = "_bias" * self.bias + "_add" * self.residual + "_tail" * self.tail
        return f"gemv_{self.format.name}_m{self.m}_w{self.warps}{extra}"

    def grid(self, n: int) -> tuple[int, int, int]:
        """Blocks that a weight of ``n`` rows takes."""
        return -(-n // 32), 1, 1

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads of a block."""
        return 32 * self.warps, 1, 1


def render_gemv(spec: GemvSpec) -> str:
    """CUDA text of ``spec.name(float* y, int y_stride, float* x, int x_stride, packed weight, n, k,
    kblocks[, bias][, residual, residual_stride])`` for y [m, n] and x [m, k], strides in floats.

    Every row of the format catalog has a kernel, but for those with low-rank residuals, words of a
    dictionary or columns that rows share. Accumulates in float32 in a fixed order. Raises
    Unsupported for m outside of 1 to 8 and such rows.
    """
    if not 1 <= spec.m <= MAX_M:
        raise Unsupported(f"GEMV takes 1 to 8 rows of activations, not {spec.m}", spec.format.name)
    return render(
        "cuda/gemv.cu.j2",
        name=spec.name,
        m=spec.m,
        warps=spec.warps,
        bias=spec.bias,
        residual=spec.residual,
        tail=spec.tail,
        **decoding(spec.format),
    )


@dataclass(frozen=True)
class EmbeddingSpec:
    """The lookup of rows of a packed table."""

    format: Format
    threads: int = 64

    @property
    def name(self) -> str:
        """Name of the kernel and of its module."""
        return f"embedding_{self.format.name}"

    def grid(self, tokens: int, k: int) -> tuple[int, int, int]:
        """Blocks for rows of ``k`` columns."""
        kblocks = packed_shape(self.format, (16, k), LAYOUT)[1]
        return -(-kblocks // self.threads), tokens, 1

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads of a block."""
        return self.threads, 1, 1


def render_embedding(spec: EmbeddingSpec) -> str:
    """CUDA text of ``spec.name(float* y, int y_stride, packed table, int* tokens, k, kblocks,
    float factor)``: y[t] = factor * row tokens[t]."""
    return render(
        "cuda/embedding.cu.j2", name=spec.name, threads=spec.threads, **decoding(spec.format)
    )


@dataclass(frozen=True)
class HalvesSpec:
    """Rows of a packed weight as halves in the order of the tensor cores."""

    format: Format

    @property
    def name(self) -> str:
        """Name of the kernel and of its module."""
        return f"halves_{self.format.name}"

    def grid(self, rows: int, k: int) -> tuple[int, int, int]:
        """Blocks for ``rows`` rows, a multiple of 64, of ``k`` columns."""
        kblocks = -(-(-(-k // 64) * 64) // (self.format.block * LAYOUT.blocks))
        return -(-kblocks // 8), rows // LAYOUT.rows, 1

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads of a block."""
        return 8 * LAYOUT.rows, 1, 1


def render_halves(spec: HalvesSpec) -> str:
    """CUDA text of ``spec.name(halves, packed weight, n, k, kblocks, first)``: the rows from
    ``first`` on, a multiple of 16, as the kernel of f16 weights takes them
    (:func:`qigen.backends.cuda.gemm_packing.pack_gemm`)."""
    return render("cuda/halves.cu.j2", name=spec.name, threads=spec.block[0], kblocks_a_block=8,
                  **decoding(spec.format))


def supports(format: Format) -> bool:
    """Whether :func:`decoding` has an answer."""
    try:
        decoding(format)
    except Unsupported:
        return False
    return True


def decoding(format: Format) -> dict[str, Any]:
    """The parameters of templates/cuda/decode.j2; Unsupported for what the algebra has and GPUs
    have not."""
    if format.sharing:
        raise Unsupported("masks with columns that rows share have no kernel on GPUs; compile for "
                          "a CPU, or take a mask such as _2of8", format.name)
    if format.rank:
        raise Unsupported("low-rank residuals have no kernel on GPUs; compile for a CPU, or take "
                          "the row without _lr", format.name)
    if format.words:
        raise Unsupported("words of a dictionary have no kernel on GPUs; compile for a CPU, or "
                          "take a ternary row such as ternary5", format.name)
    rows, blocks = row_offsets(format, LAYOUT), field_offsets(format, LAYOUT)
    first, first_bytes = shared_offsets(format)
    codes = field_planes(format, format.field("codes"))
    return {
        "format": format,
        "plan": None if format.float_kind else decode_plan(format, LAYOUT),
        "lane_bits": codes[0].word_bits,
        "kblock": format.block * LAYOUT.blocks,
        "kblock_bytes": kblock_bytes(format, LAYOUT),
        "head_bytes": head_bytes(format, LAYOUT),
        "first_bytes": first_bytes,
        "offsets": {
            "tensor_lut": first.get("lut"),
            "row_lut": rows.get(("lut", 0)),
            "block_lut": blocks.get(("lut", 0, 0)),
            "book": first.get("book"),
            "book_bytes": 2 * format.field("book").count if format.has("book") else 0,
            "columns": first.get("qc"),
            "column_values": rows.get(("qv", 0)),
        },
        "small_floats": MINIFLOATS,
        "types": _TYPES,
    }
