"""GEMV for 1 to 8 rows of activations, from the same decode plan as the CPU's kernels."""

from __future__ import annotations

from dataclasses import dataclass

from qigen.backends.cpu.decode import decode_plan
from qigen.codegen.render import render
from qigen.errors import Unsupported
from qigen.formats.algebra import Format
from qigen.formats.layout import Layout, field_planes, kblock_bytes

LAYOUT = Layout(rows=16, blocks=1)
"""Weights lie on the GPU as they do on the CPU: one packing for both."""

_TYPES = {8: "char", 16: "short", 32: "int"}


_FIELDS = {"codes", "d", "m", "dmin", "sub", "submin", "e"}


def supports(format: Format) -> bool:
    """Whether the template decodes ``format``: scalar codes or an integer table, with f16 or e8m0
    scales and minima of blocks, and dense floats."""
    if format.float_kind:
        return True
    fields = format.fields
    return (
        {f.name for f in fields} <= _FIELDS
        and (format.has("d") or format.has("e"))
        and all(f.scope == "block" for f in fields)
        and all(f.number in ("", "f16") for f in fields)
        and not (format.values or format.minifloat or format.vector or format.mask)
        and format.zero == int(format.zero)
    )


@dataclass(frozen=True)
class GemvSpec:
    """One kernel: the weight format, the rows of x that it takes, the warps of a block."""

    format: Format
    m: int = 1
    warps: int = 4

    @property
    def name(self) -> str:
        """Name of the kernel and of its module."""
        return f"gemv_{self.format.name}_m{self.m}_w{self.warps}"

    def grid(self, n: int) -> tuple[int, int, int]:
        """Blocks that a weight of ``n`` rows takes."""
        return -(-n // 32), 1, 1

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads of a block."""
        return 32 * self.warps, 1, 1


def render_gemv(spec: GemvSpec) -> str:
    """CUDA text of ``spec.name(float* y[m, n], float* x[m, k], packed weight, n, k, kblocks)``.

    Accumulates in float32 in a fixed order. Raises Unsupported for m outside of 1 to 8 and
    for formats that :func:`supports` refuses.
    """
    if not supports(spec.format):
        raise Unsupported(
            "the format has no GPU kernel yet; requantize to a GGUF or group format such as u4g32",
            spec.format.name,
        )
    if not 1 <= spec.m <= 8:
        raise Unsupported(f"GEMV takes 1 to 8 rows of activations, not {spec.m}", spec.format.name)
    dense = spec.format.float_kind is not None
    codes = field_planes(spec.format, spec.format.field("codes"))
    return render(
        "cuda/gemv.cu.j2",
        name=spec.name,
        m=spec.m,
        warps=spec.warps,
        format=spec.format,
        plan=None if dense else decode_plan(spec.format, LAYOUT),
        lane_bits=codes[0].word_bits,
        kblock=spec.format.block * LAYOUT.blocks,
        kblock_bytes=kblock_bytes(spec.format, LAYOUT),
        types=_TYPES,
    )
