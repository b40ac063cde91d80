"""The product with a constant matrix."""

from __future__ import annotations

from collections.abc import Sequence

from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.schema import (
    Array,
    Evaluation,
    Operator,
    activation,
    arity,
    matrix,
    register,
    vector,
    width,
)


def linear(x: Array, weight: str, bias: str | None, ev: Evaluation) -> Array:
    """``x W^T + bias``; ``weight`` and ``bias`` are names of constants."""
    y = ev.matmul(x, weight)
    return y if bias is None else y + ev.vector(bias)


@register
class MatMul(Operator):
    """``out[t,n] = sum_k x[t,k] * W[n,k] + bias[n]``."""

    name = "MatMul"
    inputs = "x[T,K], W[N,K] constant, bias[N] constant?"
    rowwise = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        arity(node, 2, 3)
        x = activation(node, graph, 0, rank=2)
        n, _ = matrix(node, graph, 1, columns=width(node, x))
        if len(node.inputs) == 3:
            vector(node, graph, 2, n)
        return [((x[0], n), "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        bias = node.inputs[2] if len(node.inputs) == 3 else None
        return [linear(inputs[0], node.inputs[1], bias, ev)]
