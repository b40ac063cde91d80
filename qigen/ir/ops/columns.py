"""The operator that reorders columns, for weights that store theirs in an order of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qigen.errors import BadInput
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.schema import Array, Evaluation, Operator, activation, arity, register, width


@register
class SelectColumns(Operator):
    """``out[t, j] = x[t, columns[j]]``: every column once, in another order.

    GPTQ with act-order stores the columns of a group apart. Its weights are packed with the groups
    contiguous, and their activations are put in that order once.
    """

    name = "SelectColumns"
    inputs = "x[T,d], columns[d] i32 constant"
    rowwise = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        arity(node, 2)
        x = activation(node, graph, 0, rank=2)
        d = width(node, x)
        value = graph.value(node.inputs[1], node.name)
        data = graph.constants.get(value.name)
        if not isinstance(data, np.ndarray) or data.dtype != np.int32 or data.shape != (d,):
            raise BadInput(f"input {value} must be an i32 constant of the shape [{d}]", node.name)
        if not np.array_equal(np.sort(data), np.arange(d)):
            raise BadInput(f"constant {value.name} must name every column once", node.name)
        return [(x, "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        return [inputs[0][:, ev.vector(node.inputs[1]).astype(np.intp)]]
