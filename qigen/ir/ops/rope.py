"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qigen.errors import BadInput
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.schema import (
    Array,
    Attr,
    Evaluation,
    Operator,
    activation,
    arity,
    register,
    vector,
    width,
)

STYLES = ("interleaved", "half")

ROPE_ATTRS = (
    Attr("head_dim", int, minimum=1, doc="columns of a head"),
    Attr("rotary_dim", int, minimum=0, doc="rotated columns of a head, the first ones; even"),
    Attr("base", float, 10000.0, minimum=1e-30, doc="theta_i = pos * base^(-2i/rotary_dim)"),
    Attr("style", str, "half", STYLES, doc="pairs (2i, 2i+1), or (i, i + rotary_dim/2)"),
    Attr("position_scale", float, 1.0, doc="linear scaling: multiplies the position"),
    Attr("attn_factor", float, 1.0, doc="YaRN: multiplies cosine and sine"),
)


def rope_angles(positions: Array, attrs: Mapping[str, Any], factors: Array | None) -> Array:
    """Angles ``[T, rotary_dim/2]`` in float64, whatever the arithmetic's type."""
    half = attrs["rotary_dim"] // 2
    power = -2.0 * np.arange(half, dtype=np.float64) / max(attrs["rotary_dim"], 1)
    frequency = attrs["base"] ** power
    if factors is not None:
        frequency = frequency / factors.astype(np.float64)
    position = positions.astype(np.float64) * attrs["position_scale"]
    result: Array = position[:, None] * frequency[None, :]
    return result


def rotate(x: Array, positions: Array, attrs: Mapping[str, Any], factors: Array | None) -> Array:
    """Rotate the first ``rotary_dim`` columns of every head of ``x [T, H*head_dim]``."""
    heads = x.reshape(x.shape[0], -1, attrs["head_dim"])
    angle = rope_angles(positions, attrs, factors)[:, None, :]
    cos = (np.cos(angle) * attrs["attn_factor"]).astype(x.dtype)
    sin = (np.sin(angle) * attrs["attn_factor"]).astype(x.dtype)
    rot = attrs["rotary_dim"]
    first, second = (
        (slice(0, rot, 2), slice(1, rot, 2))
        if attrs["style"] == "interleaved"
        else (slice(0, rot // 2), slice(rot // 2, rot))
    )
    a, b = heads[..., first], heads[..., second]
    out = heads.copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    result: Array = out.reshape(x.shape)
    return result


def check_rope(node: Node, columns: Sequence[int]) -> None:
    """BadInput unless the attributes fit each other and rows of so many columns."""
    head_dim, rot = node.attrs["head_dim"], node.attrs["rotary_dim"]
    if rot % 2 or rot > head_dim:
        raise BadInput(f"rotary_dim {rot} must be even and at most {head_dim}", node.name)
    for n in columns:
        if n % head_dim:
            raise BadInput(f"head_dim {head_dim} does not divide the row of {n}", node.name)


@register
class Rope(Operator):
    """Rotate pairs of columns of every head by an angle that grows with the position."""

    name = "Rope"
    inputs = "x[T,H*head_dim], positions[T] i32, freq_factors[rotary_dim/2] constant?"
    attrs = ROPE_ATTRS

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        arity(node, 2, 3)
        x = activation(node, graph, 0, rank=2)
        activation(node, graph, 1, rank=1, dtype="i32")
        check_rope(node, [width(node, x)])
        if len(node.inputs) == 3:
            vector(node, graph, 2, node.attrs["rotary_dim"] // 2)
        return [(x, "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        factors = ev.vector(node.inputs[2]) if len(node.inputs) == 3 else None
        return [rotate(inputs[0], inputs[1], node.attrs, factors)]
