"""Mixtures of experts: which of them a row goes to, and what they make of it.

A feed-forward part has E experts, each a gated part of its own, and a router: a product that gives
every row a logit an expert. The k experts of the greatest logits compute the row, and their results
are added with weights that are a softmax of the logits (Mixtral, Jiang et al. 2024,
arXiv:2401.04088; Qwen3, arXiv:2505.09388; gpt-oss, arXiv:2508.10925).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qigen.errors import BadInput
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.ops.elementwise import ACTIVATIONS, activate
from qigen.ir.ops.matmul import linear
from qigen.ir.ops.norm import rms_norm
from qigen.ir.schema import (
    Array,
    Attr,
    Evaluation,
    Operator,
    activation,
    arity,
    matrix,
    register,
    vector,
    width,
)

SOFTMAX = ("chosen", "all")

ROUTER_ATTRS = (
    Attr("k", int, minimum=1, doc="experts of a row"),
    Attr("softmax", str, "chosen", SOFTMAX, doc="over the logits of the chosen, or of all experts; "
         "the latter, made to add up to 1, is the former"),
)  # fmt: skip

EXPERT_ATTRS = (
    Attr("n_experts", int, minimum=1, doc="E"),
    Attr("biases", bool, False, doc="every product has a bias"),
    Attr("act", str, choices=(*ACTIVATIONS, "clamped_swiglu"), doc="what gate and up become"),
    Attr("alpha", float, 1.0, doc="of clamped_swiglu: steepness of the sigmoid"),
    Attr("limit", float, 1.0, minimum=1e-30, doc="of clamped_swiglu: where gate and up are cut"),
)

ROLES = ("gate", "up", "down")


@dataclass(frozen=True)
class ExpertParts:
    """The constants of the experts by role, one an expert; ``biases`` are empty or as many."""

    weights: Mapping[str, tuple[str, ...]]
    biases: Mapping[str, tuple[str, ...]]


def expert_parts(node: Node) -> ExpertParts:
    """The inputs of an Experts or RoutedExperts node behind its first two or three; BadInput if
    their number contradicts the attributes.

    The order is: the gate matrices of all experts, the up matrices, the down matrices, then the
    biases alike.
    """
    a = node.attrs
    first = 2 if node.op == "Experts" else 3
    count = a["n_experts"]
    arity(node, first + 3 * count * (1 + a["biases"]))
    names = node.inputs[first:]
    groups = [tuple(names[i : i + count]) for i in range(0, len(names), count)]
    weights = dict(zip(ROLES, groups[:3], strict=True))
    biases = dict(zip(ROLES, groups[3:] or ((), (), ()), strict=True))
    return ExpertParts(weights, biases)


def gates(logits: Array, k: int, softmax: str) -> Array:
    """``[T,E]``: the weight of every expert for every row, 0 for all but the ``k`` chosen ones. Of
    equal logits the first is chosen."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(logits, order, axis=1)
    top = chosen[:, :1]
    weights = np.exp(chosen - top)
    over = weights if softmax == "chosen" else np.exp(logits - top)
    result = np.zeros_like(logits)
    np.put_along_axis(result, order, weights / over.sum(axis=1, keepdims=True), axis=1)
    return result


def gated(gate: Array, up: Array, attrs: Mapping[str, Any]) -> Array:
    """``act(gate) * up``, or gpt-oss's ``g sigmoid(alpha g) (u + 1)`` of a gate that is cut from
    above and an ``u`` that is cut on both sides."""
    if attrs["act"] != "clamped_swiglu":
        return activate(gate, attrs["act"]) * up
    limit, alpha = gate.dtype.type(attrs["limit"]), gate.dtype.type(attrs["alpha"])
    half, one = gate.dtype.type(0.5), gate.dtype.type(1)
    g, u = np.minimum(gate, limit), np.clip(up, -limit, limit)
    # the sigmoid through tanh does not overflow
    result: Array = g * (half + half * np.tanh(half * alpha * g)) * (u + one)
    return result


def mixed(node: Node, x: Array, weights: Array, ev: Evaluation) -> Array:
    """``[T,d]``: the results of the experts of ``x [T,d]``, added with ``weights [T,E]``."""
    parts = expert_parts(node)
    out = np.zeros_like(x)
    for e in range(node.attrs["n_experts"]):
        rows = np.flatnonzero(weights[:, e] != 0)
        if not rows.size:
            continue

        def product(h: Array, role: str, e: int = e) -> Array:
            bias = parts.biases[role][e] if node.attrs["biases"] else None
            return linear(h, parts.weights[role][e], bias, ev)

        mine = x[rows]
        h = gated(product(mine, "gate"), product(mine, "up"), node.attrs)
        out[rows] += weights[rows, e, None] * product(h, "down")
    return out


def _check_experts(node: Node, graph: Graph, x: Shape, columns: Shape) -> None:
    """BadInput unless the matrices fit ``x [T,d]`` and each other, and there are as many logits
    (``columns [T,E]``) as experts."""
    a, parts = node.attrs, expert_parts(node)
    if columns != (x[0], a["n_experts"]):
        raise BadInput(f"{a['n_experts']} experts need as many logits for every row, not "
                       f"{list(columns)}", node.name)  # fmt: skip
    d = width(node, x)
    hidden = graph.value(parts.weights["gate"][0], node.name).shape[0]
    places = {name: i for i, name in enumerate(node.inputs)}
    for role, names in parts.weights.items():
        n, k = (d, hidden) if role == "down" else (hidden, d)
        formats = set()
        for name in names:
            if matrix(node, graph, places[name])[:2] != (n, k):
                raise BadInput(f"{graph.values[name]} must have the shape [{n}, {k}]", node.name)
            formats.add(graph.values[name].dtype)
        if len(formats) > 1:
            raise BadInput(f"the {role} matrices of the experts have different formats "
                           f"({', '.join(sorted(formats))}); one kernel multiplies them all: bring "
                           "them to one with --weights", node.name)  # fmt: skip
        for name in parts.biases[role]:
            assert isinstance(n, int)
            vector(node, graph, places[name], n)


@register
class Router(Operator):
    """The weight of every expert for every row: 0, but for the k of the greatest logits."""

    name = "Router"
    inputs = "logits[T,E]"
    attrs = ROUTER_ATTRS
    rowwise = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        arity(node, 1)
        logits = activation(node, graph, 0, rank=2)
        _check_k(node, width(node, logits))
        return [(logits, "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        return [gates(inputs[0], node.attrs["k"], node.attrs["softmax"])]


def _check_k(node: Node, experts: int) -> None:
    if node.attrs["k"] > experts:
        raise BadInput(f"{node.attrs['k']} of {experts} experts cannot be chosen", node.name)


@register
class Experts(Operator):
    """``sum_e gates[t,e] * (act(x W_gate_e^T, x W_up_e^T) W_down_e^T)``, each product with its
    bias if ``biases``. An expert whose gate is 0 is not computed."""

    name = "Experts"
    inputs = (
        "x[T,d], gates[T,E], W_gate[f,d] of every expert, W_up[f,d] .., W_down[d,f] .. constants, "
        "biases alike (biases)"
    )
    attrs = EXPERT_ATTRS
    rowwise = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        x, weights = (activation(node, graph, i, rank=2) for i in range(2))
        _check_experts(node, graph, x, weights)
        return [(x, "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        return [mixed(node, inputs[0], inputs[1], ev)]


@register
class RoutedExperts(Operator):
    """``x + experts(rmsnorm(x, norm))`` with gates by the router's logits. May overwrite x."""

    name = "RoutedExperts"
    inputs = "x[T,d], logits[T,E], norm[d] constant, then as Experts"
    attrs = (
        *ROUTER_ATTRS,
        *EXPERT_ATTRS,
        Attr("eps", float, minimum=0.0, doc="of the norm"),
    )
    fused = True
    rowwise = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        x, logits = (activation(node, graph, i, rank=2) for i in range(2))
        vector(node, graph, 2, width(node, x))
        _check_k(node, width(node, logits))
        _check_experts(node, graph, x, logits)
        return [(x, "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        a = node.attrs
        h = rms_norm(inputs[0], ev.vector(node.inputs[2]), a["eps"])
        return [inputs[0] + mixed(node, h, gates(inputs[1], a["k"], a["softmax"]), ev)]
