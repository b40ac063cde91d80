"""Operators that pick rows: the embedding table and the rows whose logits are wanted."""

from __future__ import annotations

from collections.abc import Sequence

from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.schema import (
    Array,
    Attr,
    Evaluation,
    Operator,
    activation,
    arity,
    matrix,
    register,
)


@register
class Embedding(Operator):
    """``out[t] = scale * table[ids[t]]``; gemma scales by sqrt(d)."""

    name = "Embedding"
    inputs = "ids[T] i32, table[V,d] constant"
    attrs = (Attr("scale", float, 1.0, doc="factor of the row"),)

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        arity(node, 2)
        ids = activation(node, graph, 0, rank=1, dtype="i32")
        _, d = matrix(node, graph, 1)
        return [((ids[0], d), "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        rows = ev.gather(node.inputs[1], inputs[0])
        return [rows * ev.dtype.type(node.attrs["scale"])]


@register
class SelectRows(Operator):
    """``out[r] = x[rows[r]]``."""

    name = "SelectRows"
    inputs = "x[T,d], rows[R] i32"

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        arity(node, 2)
        x = activation(node, graph, 0, rank=2)
        rows = activation(node, graph, 1, rank=1, dtype="i32")
        return [((rows[0], x[1]), "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        return [inputs[0][inputs[1]]]
