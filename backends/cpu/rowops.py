"""Operators along rows of f32, one translation unit a model: what no product or loop computes.

The functions and their arguments are in ``templates/cpu/rowops.h.j2``:

- ``softmax``, ``log_softmax``: with a scale and an additive mask that is broadcast by strides.
- ``layer_norm``, ``rms_norm``: of x, or of the sum of x and a residual, which can be stored too.
- ``reduce``: sums, means, extremes, norms over the last or a middle axis.
- ``transpose``: two axes change places; elements of 1, 2, 4 or 8 bytes.
- ``max_pool`` (f32, u8, s8), ``average_pool``, ``join_images``: NHWC images.
- ``encoder_attention``: softmax(scale q k^T + mask) v, the keys in blocks that stay in the cache.

The linker drops those that a model does not call.
"""

from __future__ import annotations

from dataclasses import dataclass

from qigen.backends.base import Isa, KernelSource
from qigen.codegen.render import render

ENTRIES: dict[str, str] = {
    "softmax": "SoftmaxArgs", "log_softmax": "SoftmaxArgs", "layer_norm": "NormArgs",
    "rms_norm": "NormArgs", "reduce": "ReduceArgs", "transpose": "TransposeArgs",
    "max_pool": "PoolArgs", "max_pool_u8": "PoolArgs", "max_pool_s8": "PoolArgs",
    "average_pool": "PoolArgs", "join_images": "JoinImagesArgs",
    "encoder_attention": "EncoderAttentionArgs",
}  # fmt: skip
"""Functions and the struct that each takes."""

MAX_HEAD_DIM = 512
"""The longest head whose blocks of keys fit the buffers of ``encoder_attention``."""


@dataclass(frozen=True)
class AttentionTiles:
    """Register tiles of the products in attention: up to ``rows[0]`` queries by ``columns``
    vectors; what is left of the queries takes the smaller numbers of rows."""

    rows: tuple[int, ...]
    columns: int


def encoder_tiles(isa: Isa) -> AttentionTiles:
    """The tiles that fill the registers: sums, a row of the right operand, a broadcast."""
    if not isa.features:
        return AttentionTiles((2, 1), 1)
    if isa.registers >= 32:
        return AttentionTiles((12, 6, 2, 1), 2)
    return AttentionTiles((6, 2, 1), 1)


def render_rowops(isa: Isa) -> KernelSource:
    """The translation unit ``rowops``. It includes kernels.h, rowops.h, epilogue.h and the header
    of the ISA."""
    text = render("cpu/rowops.cpp.j2", isa=isa, tiles=encoder_tiles(isa))
    return KernelSource(f"rowops__{isa.name}", text, isa.name, tuple(ENTRIES))
