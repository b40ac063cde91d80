"""Normalisations."""

from __future__ import annotations

from collections.abc import Sequence

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


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """``x * weight / sqrt(mean(x^2) + eps)`` over slices of ``len(weight)`` columns of ``x [M,d]``.

    With ``len(weight) == d`` that is the usual norm of a row, else that of every attention head.
    """
    sliced = x.reshape(x.shape[0], x.shape[1] // weight.size, weight.size)
    mean = np.mean(np.square(sliced), axis=-1, keepdims=True, dtype=x.dtype)
    scale = x.dtype.type(1) / np.sqrt(mean + x.dtype.type(eps))
    result: Array = (sliced * scale * weight).reshape(x.shape)
    return result


@register
class RMSNorm(Operator):
    """Root-mean-square norm of each row, or with ``head_dim`` of each slice of that many columns.

    The weight is what multiplies: gemma's ``1 + w`` is folded in by the frontend.
    """

    name = "RMSNorm"
    inputs = "x[T,d], w[d or head_dim] constant"
    attrs = (
        Attr("eps", float, minimum=0.0, doc="added to the mean square"),
        Attr("head_dim", int, 0, minimum=0, doc="columns of a slice; 0: the whole row"),
    )
    rowwise = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        arity(node, 2)
        x = activation(node, graph, 0, rank=2)
        d = width(node, x)
        head_dim = node.attrs["head_dim"] or d
        if d % head_dim:
            raise BadInput(f"head_dim {head_dim} does not divide the row of {d}", node.name)
        vector(node, graph, 1, head_dim)
        return [(x, "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        return [rms_norm(inputs[0], ev.vector(node.inputs[1]), node.attrs["eps"])]
