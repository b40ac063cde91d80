"""The operators between the matmuls, one translation unit a model: norms, rope, attention."""

from __future__ import annotations

from qigen.backends.base import Isa, KernelSource
from qigen.codegen.render import render


def attention_tiles(isa: Isa) -> tuple[int, int, int]:
    """(query rows, tiles of 16 positions, vectors of values) of the attention's register tiles.

    The accumulators of the scores (rows x tiles) and of the weighted sum (rows x vectors) take at
    most half of the registers; the rest holds the loads and broadcasts.
    """
    if isa.registers >= 32:
        return 4, 4, 4
    return 2, 2, 2


def render_ops(
    isa: Isa, head_dims: tuple[int, ...], kv: str, token_tiles: tuple[int, ...]
) -> KernelSource:
    """The translation unit ``ops``; ``token_tiles`` are those of the int8 matmuls."""
    queries, tiles, values = attention_tiles(isa)
    text = render(
        "cpu/ops.cpp.j2",
        isa=isa,
        token_tiles=token_tiles,
        head_dims=head_dims,
        kv=kv,
        query_tile=queries,
        position_tile=tiles,
        value_tile=values,
    )
    heads = "_".join(str(d) for d in head_dims)
    return KernelSource(f"ops_{kv}_h{heads}__{isa.name}", text, isa.name, ())
