"""Operators that the passes make; their references are composed of the flat ones.

They are what the code generator knows: ``Embedding``, ``SelectRows`` and ``GatedAct`` of the flat
graph, and the three of this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qigen.errors import BadInput
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.ops.attention import ATTENTION_ATTRS, attend, check_heads
from qigen.ir.ops.elementwise import ACTIVATIONS, activate, softcap
from qigen.ir.ops.matmul import linear
from qigen.ir.ops.norm import rms_norm
from qigen.ir.ops.rope import ROPE_ATTRS, check_rope, rotate
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


@dataclass(frozen=True)
class GroupParts:
    """The inputs of a MatMulGroup by role, and their indices in ``node.inputs``."""

    x: str
    norm: str | None
    weights: tuple[str, ...]
    biases: tuple[str | None, ...]
    residual: str | None


def group_parts(node: Node) -> GroupParts:
    """Take the inputs of a MatMulGroup apart; BadInput if their number contradicts the attributes.

    The order is: x, norm weight (prologue 'rmsnorm'), the weights, the biases of the segments that
    the attribute ``biases`` lists, residual (epilogue 'add').
    """
    a = node.attrs
    norm, residual = a["prologue"] == "rmsnorm", a["epilogue"] == "add"
    arity(node, 1 + norm + a["n_weights"] + len(a["biases"]) + residual)
    names = iter(node.inputs)
    x = next(names)
    norm_weight = next(names) if norm else None
    weights = tuple(next(names) for _ in range(a["n_weights"]))
    with_bias = {segment: next(names) for segment in a["biases"]}
    biases = tuple(with_bias.get(i) for i in range(a["n_weights"]))
    return GroupParts(x, norm_weight, weights, biases, next(names) if residual else None)


@register
class MatMulGroup(Operator):
    """Products of one x with several constant matrices, with what stands before and after them.

    ``h = x`` or ``rmsnorm(x, norm)``; ``y_i = h W_i^T + bias_i``. Then by the epilogue

    - ``store``: one output a weight, ``y_i``, soft-capped if ``softcap`` is not 0 (one weight);
    - ``add``: one weight, one output ``residual + y_0`` (it may overwrite the residual);
    - ``gated``: two weights of the same format and shape, one output ``act(y_0) * y_1``.
    """

    name = "MatMulGroup"
    inputs = (
        "x[T,K], norm[K] constant (rmsnorm), W0[N0,K] .. constants, bias constants of the segments "
        "in `biases`, residual[T,N0] (add)"
    )
    attrs = (
        Attr("prologue", str, "none", ("none", "rmsnorm"), doc="what is done to x first"),
        Attr("eps", float, 0.0, minimum=0.0, doc="of the prologue's norm"),
        Attr("n_weights", int, 1, minimum=1, doc="number of segments"),
        Attr("biases", tuple, (), doc="segments that have a bias, ascending"),
        Attr("epilogue", str, "store", ("store", "add", "gated"), doc="what is done to y"),
        Attr("act", str, "none", ("none", *ACTIVATIONS), doc="activation of epilogue 'gated'"),
        Attr("softcap", float, 0.0, minimum=0.0, doc="soft cap of the output; 0: none"),
    )
    fused = True
    rowwise = True

    def n_outputs(self, node: Node) -> int:
        return int(node.attrs["n_weights"]) if node.attrs["epilogue"] == "store" else 1

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        a = node.attrs
        if list(a["biases"]) != [i for i in range(a["n_weights"]) if i in a["biases"]]:
            raise BadInput(f"biases {a['biases']} are no ascending segment numbers", node.name)
        needed = {"add": 1, "gated": 2}.get(a["epilogue"], a["n_weights"])
        if a["n_weights"] != needed:
            raise BadInput(f"epilogue '{a['epilogue']}' takes {needed} weights", node.name)
        if (a["epilogue"] == "gated") != (a["act"] != "none"):
            raise BadInput("epilogue 'gated' and an activation go together", node.name)
        if a["softcap"] and (a["epilogue"] != "store" or a["n_weights"] != 1):
            raise BadInput("a soft cap needs one weight and the epilogue 'store'", node.name)
        parts = group_parts(node)
        x = activation(node, graph, 0, rank=2)
        k = width(node, x)
        first = 1 if parts.norm is None else 2
        if parts.norm is not None:
            vector(node, graph, 1, k)
        columns = [matrix(node, graph, first + i, k)[0] for i in range(a["n_weights"])]
        for i, segment in enumerate(a["biases"]):
            vector(node, graph, first + a["n_weights"] + i, columns[segment])
        rows = x[0]
        if a["epilogue"] == "add":
            residual = activation(node, graph, len(node.inputs) - 1, rank=2)
            if residual != (rows, columns[0]):
                raise BadInput(f"the residual has the shape {residual}", node.name)
        if a["epilogue"] == "gated":
            gate, up = (graph.value(w) for w in parts.weights)
            if (gate.shape, gate.dtype) != (up.shape, up.dtype):
                raise BadInput(f"gate {gate} and up {up} differ in shape or format", node.name)
            return [((rows, columns[0]), "f32")]
        return [((rows, n), "f32") for n in columns]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        a, parts, x = node.attrs, group_parts(node), inputs[0]
        if parts.norm is not None:
            x = rms_norm(x, ev.vector(parts.norm), a["eps"])
        y = [linear(x, w, b, ev) for w, b in zip(parts.weights, parts.biases, strict=True)]
        if a["epilogue"] == "add":
            return [inputs[-1] + y[0]]
        if a["epilogue"] == "gated":
            return [activate(y[0], a["act"]) * y[1]]
        return [softcap(y[0], a["softcap"])] if a["softcap"] else y


@dataclass(frozen=True)
class AttentionParts:
    """The inputs of a RopeAttention by role."""

    q: str
    k: str
    v: str
    positions: str
    q_norm: str | None
    k_norm: str | None
    freq_factors: str | None
    sinks: str | None


def attention_parts(node: Node) -> AttentionParts:
    """Take the inputs of a RopeAttention apart; BadInput if their number is wrong.

    The order is: q, k, v, positions, q_norm and k_norm (attribute ``qk_norm``), freq_factors
    (attribute ``freq_factors``), sinks (attribute ``sinks``).
    """
    norms, factors, sinks = (node.attrs[a] for a in ("qk_norm", "freq_factors", "sinks"))
    arity(node, 4 + 2 * norms + factors + sinks)
    names = node.inputs
    q, k, v, positions = names[:4]
    after = 4 + 2 * norms
    return AttentionParts(
        q,
        k,
        v,
        positions,
        q_norm=names[4] if norms else None,
        k_norm=names[5] if norms else None,
        freq_factors=names[after] if factors else None,
        sinks=names[-1] if sinks else None,
    )


@register
class RopeAttention(Operator):
    """Norm of query and key heads (optional), rotation, cache write and attention.

    ``rotary_dim`` 0 means no rotation. The order is that of the flat graph: norm, then rope, then
    the cache write of the rotated keys and the values, then attention.
    """

    name = "RopeAttention"
    inputs = (
        "q[T,n_heads*head_dim], k[T,n_kv*head_dim], v[T,n_kv*head_dim], positions[T] i32, "
        "q_norm[head_dim], k_norm[head_dim] constants (qk_norm), "
        "freq_factors[rotary_dim/2] constant (freq_factors), sinks[n_heads] constant (sinks)"
    )
    attrs = (
        *ATTENTION_ATTRS,
        *(a for a in ROPE_ATTRS if a.name != "head_dim"),
        Attr("freq_factors", bool, False, doc="there is an input of frequency factors"),
        Attr("qk_norm", bool, False, doc="there are inputs of norm weights for q and k heads"),
        Attr("sinks", bool, False, doc="there is an input of scores without a value"),
        Attr("eps", float, 0.0, minimum=0.0, doc="of the head norms"),
    )
    fused = True
    effect = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        parts = attention_parts(node)
        shapes = [activation(node, graph, i, rank=2) for i in range(3)]
        activation(node, graph, 3, rank=1, dtype="i32")
        q_width, kv_width = check_heads(node, graph)
        for role, shape, columns in zip(
            ("query", "key", "value"), shapes, (q_width, kv_width, kv_width), strict=True
        ):
            if shape != (shapes[0][0], columns):
                raise BadInput(f"the {role} has the shape {shape}, not {columns} wide", node.name)
        check_rope(node, [q_width, kv_width])
        if parts.q_norm is not None:
            vector(node, graph, 4, node.attrs["head_dim"])
            vector(node, graph, 5, node.attrs["head_dim"])
        if parts.freq_factors is not None:
            factors = node.inputs.index(parts.freq_factors)
            vector(node, graph, factors, node.attrs["rotary_dim"] // 2)
        if parts.sinks is not None:
            vector(node, graph, len(node.inputs) - 1, node.attrs["n_heads"])
        return [(shapes[0], "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        a, parts = node.attrs, attention_parts(node)
        q, k, v, positions = inputs[:4]
        if parts.q_norm is not None and parts.k_norm is not None:
            q = rms_norm(q, ev.vector(parts.q_norm), a["eps"])
            k = rms_norm(k, ev.vector(parts.k_norm), a["eps"])
        if a["rotary_dim"]:
            factors = None if parts.freq_factors is None else ev.vector(parts.freq_factors)
            q, k = (rotate(t, positions, a, factors) for t in (q, k))
        ev.kv(a["state"]).append(positions, k, v)
        sinks = None if parts.sinks is None else ev.vector(parts.sinks)
        return [attend(q, positions, a, ev, sinks)]


@register
class NormAdd(Operator):
    """``x + rmsnorm(t, w)``: a post-norm and its residual connection (gemma). May overwrite x."""

    name = "NormAdd"
    inputs = "x[T,d], t[T,d], w[d] constant"
    attrs = (Attr("eps", float, minimum=0.0, doc="added to the mean square"),)
    fused = True
    rowwise = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        arity(node, 3)
        x, t = (activation(node, graph, i, rank=2) for i in range(2))
        if x != t:
            raise BadInput(f"the inputs differ in shape: {x} and {t}", node.name)
        vector(node, graph, 2, width(node, x))
        return [(x, "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        return [inputs[0] + rms_norm(inputs[1], ev.vector(node.inputs[2]), node.attrs["eps"])]
