"""The operators between the matmuls, one translation unit a model: norms, rope, attention."""

from __future__ import annotations

from collections.abc import Sequence

from qigen.backends.base import Isa, KernelSource
from qigen.codegen.render import render
from qigen.formats.kv import KvFormat


def attention_tiles(isa: Isa) -> tuple[int, int, int]:
    """(query rows, tiles of 16 positions, vectors of values) of the attention's register tiles.

    The accumulators of the scores (rows x tiles) and of the weighted sum (rows x vectors) take at
    most half of the registers; the rest holds the loads and broadcasts.
    """
    if isa.registers >= 32:
        return 4, 4, 4
    return 4, 1, 1


def code_tiles(isa: Isa) -> tuple[int, int]:
    """(tiles of 16 keys, tiles of 16 channels of values) of the attention over codes.

    Each tile has an accumulator for every row (two where a row is two planes of bytes). Eight of
    them hide the latency of the byte dot product.
    """
    if isa.registers >= 32:
        return 2, 2
    return 1, 1


def row_tiles(isa: Isa, groups: Sequence[int]) -> tuple[int, ...]:
    """Numbers of query rows that read a key/value head together while one token is decoded, where
    ``groups`` heads share one: whole tiles, and what is left of a group."""
    most = attention_tiles(isa)[0]
    whole = {most for g in groups if g >= most}
    return tuple(sorted(whole | {g % most for g in groups if g % most}))


def wide_factors(isa: Isa, kv: KvFormat) -> bool:
    """Whether codes of 8 bits are multiplied by numbers of 16: the byte dot product would have to
    widen after every step, twice for the 15 bits that a factor needs beside such codes."""
    return kv.bits == 8 and isa.dot_limit is not None


def flush_steps(isa: Isa, kv: KvFormat) -> int:
    """Vectors of codes that the byte dot product adds up before it must widen; 0: any number.

    A lane takes two products of a code and an activation of up to 127 a step.
    """
    if not kv.integer or isa.dot_limit is None or wide_factors(isa, kv):
        return 0
    most = 127 if kv.bits == 8 else (1 << kv.bits) - 1
    steps = isa.dot_limit // (2 * most * 127) // (8 // kv.bits)
    assert steps, f"one vector of {kv.name} overflows a lane of {isa.name}"
    return steps


def render_ops(
    isa: Isa,
    head_dims: tuple[int, ...],
    kv: KvFormat,
    token_tiles: tuple[int, ...],
    groups: tuple[int, ...],
) -> KernelSource:
    """The translation unit ``ops``; ``token_tiles`` are those of the int8 matmuls, ``groups`` the
    numbers of query heads that share a key/value head."""
    queries, tiles, values = attention_tiles(isa)
    key_tile, code_tile = code_tiles(isa)
    text = render(
        "cpu/ops.cpp.j2",
        isa=isa,
        token_tiles=token_tiles,
        head_dims=head_dims,
        kv=kv,
        query_tile=queries,
        row_tiles=row_tiles(isa, groups),
        position_tile=tiles,
        value_tile=values,
        key_tile=key_tile,
        code_tile=code_tile,
        groups={d: kv.group(d) for d in head_dims},
        flush=flush_steps(isa, kv),
        signed_codes=kv.bits == 8 and isa.signed_dot,
        wide=wide_factors(isa, kv),
        planes=2 if kv.bits == 8 else 1,
    )
    heads = "_".join(str(d) for d in head_dims)
    shared = "_".join(str(g) for g in groups)
    return KernelSource(f"ops_{kv.name}_h{heads}_g{shared}__{isa.name}", text, isa.name, ())


def render_experts(isa: Isa) -> KernelSource:
    """The translation unit ``experts``: what mixtures of experts do between their products."""
    name = f"experts__{isa.name}"
    return KernelSource(name, render("cpu/experts.cpp.j2", isa=isa), isa.name, ())
