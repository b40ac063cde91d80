"""Operators that work number by number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qigen.errors import BadInput
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.schema import Array, Attr, Evaluation, Operator, activation, arity, register

ACTIVATIONS = ("silu", "gelu_tanh")


def activate(x: Array, kind: str) -> Array:
    """``silu``: x / (1 + e^-x). ``gelu_tanh``: the tanh form of GELU, as gemma's GeGLU uses it."""
    one, half = x.dtype.type(1), x.dtype.type(0.5)
    if kind == "silu":
        # x * sigmoid(x) through tanh: no overflow for large negative x.
        silu: Array = x * (half + half * np.tanh(half * x))
        return silu
    c, b = x.dtype.type(np.sqrt(2.0 / np.pi)), x.dtype.type(0.044715)
    gelu: Array = half * x * (one + np.tanh(c * (x + b * x * x * x)))
    return gelu


def softcap(x: Array, cap: float) -> Array:
    """``cap * tanh(x / cap)``."""
    c = x.dtype.type(cap)
    capped: Array = c * np.tanh(x / c)
    return capped


def _same_shape(node: Node, graph: Graph) -> Shape:
    arity(node, 2)
    a, b = (activation(node, graph, i, rank=2) for i in range(2))
    if a != b:
        raise BadInput(f"the inputs differ in shape: {a} and {b}", node.name)
    return a


@register
class Add(Operator):
    """``a + b`` of equal shapes: the residual connection."""

    name = "Add"
    inputs = "a[T,d], b[T,d]"
    rowwise = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        return [(_same_shape(node, graph), "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        return [inputs[0] + inputs[1]]


@register
class GatedAct(Operator):
    """``act(gate) * up``: SwiGLU (silu) and GeGLU (gelu_tanh)."""

    name = "GatedAct"
    inputs = "gate[T,f], up[T,f]"
    attrs = (Attr("kind", str, choices=ACTIVATIONS, doc="the activation"),)
    rowwise = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        return [(_same_shape(node, graph), "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        return [activate(inputs[0], node.attrs["kind"]) * inputs[1]]


@register
class Softcap(Operator):
    """``cap * tanh(x / cap)``: gemma2's soft capping of the logits."""

    name = "Softcap"
    inputs = "x[T,d]"
    attrs = (Attr("cap", float, minimum=1e-30, doc="the bound"),)
    rowwise = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        arity(node, 1)
        return [(activation(node, graph, 0, rank=2), "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        return [softcap(inputs[0], node.attrs["cap"])]
