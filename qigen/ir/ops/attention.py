"""Causal attention over the key/value cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from qigen.errors import BadInput
from qigen.ir.graph import Graph, Node, Shape, State
from qigen.ir.ops.elementwise import softcap
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

_ROWS = 128  # query rows at a time, so that the scores stay small

ATTENTION_ATTRS = (
    Attr("state", str, doc="the cache"),
    Attr("n_heads", int, minimum=1, doc="query heads"),
    Attr("n_kv_heads", int, minimum=1, doc="key and value heads; divides n_heads"),
    Attr("head_dim", int, minimum=1, doc="columns of a head"),
    Attr("scale", float, doc="multiplies the scores, usually head_dim^-0.5"),
    Attr("window", int, 0, minimum=0, doc="position p sees p-window < j <= p; 0: all j <= p"),
    Attr("softcap", float, 0.0, minimum=0.0, doc="soft cap of the scaled scores; 0: none"),
)


def state_of(node: Node, graph: Graph) -> State:
    """The state that the node names; BadInput if there is none."""
    state = graph.states.get(node.attrs["state"])
    if state is None:
        raise BadInput(f"state '{node.attrs['state']}' does not exist", node.name)
    return state


def check_heads(node: Node, graph: Graph) -> tuple[int, int]:
    """Columns of a query row and of a key row; BadInput unless they and the state agree."""
    a, state = node.attrs, state_of(node, graph)
    if a["n_heads"] % a["n_kv_heads"]:
        raise BadInput(
            f"{a['n_heads']} heads cannot share {a['n_kv_heads']} key heads evenly", node.name
        )
    if (state.n_kv_heads, state.head_dim) != (a["n_kv_heads"], a["head_dim"]):
        raise BadInput(
            f"state '{state.name}' holds {state.n_kv_heads} heads of {state.head_dim}, "
            f"not {a['n_kv_heads']} of {a['head_dim']}",
            node.name,
        )
    return a["n_heads"] * a["head_dim"], a["n_kv_heads"] * a["head_dim"]


def attend(q: Array, positions: Array, attrs: Mapping[str, Any], ev: Evaluation,
           sinks: Array | None = None) -> Array:  # fmt: skip
    """Softmax attention of ``q [T, n_heads*head_dim]`` over the cached positions.

    The row at position p sees the keys j <= p, with a window only those j > p - window.
    ``sinks [n_heads]`` are scores of a further key of every head, whose value is zero (gpt-oss).
    """
    if not len(positions):
        return q
    n_kv, hd = attrs["n_kv_heads"], attrs["head_dim"]
    shared = attrs["n_heads"] // n_kv
    cache = ev.kv(attrs["state"])
    sealed = cache.sealed(positions)
    out = np.empty_like(q)
    # rows that see the same numbers
    borders = {*range(0, len(positions), _ROWS), *(np.flatnonzero(np.diff(sealed)) + 1)}
    starts = [*sorted(int(b) for b in borders), len(positions)]
    for start, end in pairwise(starts):
        p = positions[start:end]
        last = int(p.max()) + 1
        keys, values = cache.read(last, int(sealed[start]))
        j = np.arange(last)
        hidden = j > p[:, None]
        if attrs["window"]:
            hidden |= j <= p[:, None] - attrs["window"]
        # the query heads of a key head lie below each other: one product a key head
        rows = q[start:end].reshape(-1, n_kv, shared, hd).transpose(1, 2, 0, 3)
        rows = rows.reshape(n_kv, -1, hd) * q.dtype.type(attrs["scale"])
        scores = np.matmul(rows, keys.transpose(1, 2, 0))  # [n_kv, shared * rows, last]
        if attrs["softcap"]:
            scores = softcap(scores, attrs["softcap"])
        by_head = scores.reshape(n_kv, shared, end - start, last)
        by_head += np.where(hidden, q.dtype.type(-np.inf), q.dtype.type(0))
        top = scores.max(axis=-1, keepdims=True)
        if sinks is not None:
            sink = np.repeat(sinks.reshape(n_kv, shared), end - start, axis=1)[..., None]
            top = np.maximum(top, sink)
        scores -= top
        weights = np.exp(scores, out=scores)
        total = weights.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total += np.exp(sink - top)
        mixed = weights @ values.transpose(1, 0, 2)  # [n_kv, shared * rows, hd]
        mixed /= total
        mixed = mixed.reshape(n_kv, shared, -1, hd).transpose(2, 0, 1, 3)
        out[start:end] = mixed.reshape(-1, q.shape[1])
    return out


@register
class KVAppend(Operator):
    """Write keys and values into the cache; the result only orders the attention behind it."""

    name = "KVAppend"
    inputs = "k[T,n_kv*head_dim], v[T,n_kv*head_dim], positions[T] i32"
    attrs = (Attr("state", str, doc="the cache"),)
    effect = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        arity(node, 3)
        state = state_of(node, graph)
        for i in range(2):
            columns = width(node, activation(node, graph, i, rank=2))
            if columns != state.n_kv_heads * state.head_dim:
                raise BadInput(
                    f"row of {columns} for state '{state.name}' of "
                    f"{state.n_kv_heads} heads of {state.head_dim}",
                    node.name,
                )
        activation(node, graph, 2, rank=1, dtype="i32")
        return [((), "kv")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        k, v, positions = inputs
        ev.kv(node.attrs["state"]).append(positions, k, v)
        return [np.zeros((), dtype=np.int32)]


@register
class Attention(Operator):
    """Causal, grouped-query, optionally windowed and soft-capped attention over a cache."""

    name = "Attention"
    inputs = "q[T,n_heads*head_dim], kv, positions[T] i32, sinks[n_heads] constant?"
    attrs = ATTENTION_ATTRS

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        arity(node, 3, 4)
        q = activation(node, graph, 0, rank=2)
        activation(node, graph, 1, rank=0, dtype="kv")
        activation(node, graph, 2, rank=1, dtype="i32")
        wanted, _ = check_heads(node, graph)
        if width(node, q) != wanted:
            raise BadInput(f"the query row has {q[1]} columns, not {wanted}", node.name)
        if len(node.inputs) == 4:
            vector(node, graph, 3, node.attrs["n_heads"])
        return [(q, "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        sinks = ev.vector(node.inputs[3]) if len(node.inputs) == 4 else None
        return [attend(inputs[0], inputs[2], node.attrs, ev, sinks)]
