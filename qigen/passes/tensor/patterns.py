"""Groups of nodes that are one operator: layer normalisation and attention in their parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qigen.ir.graph import Graph, Node
from qigen.ir.tensor import constant
from qigen.passes.tensor.rewrite import Rewriter
from qigen.passes.tensor.simplify import permutation


def find_patterns(graph: Graph) -> Graph:
    """Replace what is recognised; all else stays."""
    r = Rewriter(graph)
    for node in r.nodes():
        if node.op == "onnx.Div" and r.alive(node):
            _layer_norm(r, node)
    for node in r.nodes():
        if node.op == "onnx.Softmax" and r.alive(node):
            _attention(r, node)
    return r.done()


def _mean_of(r: Rewriter, name: str) -> str:
    """What a value is the mean of over the last axis; '' if it is no such mean."""
    node = r.producer(name, "onnx.ReduceMean")
    if node is None or not node.attrs["keepdims"] or node.attrs["axes"] is None:
        return ""
    rank = len(r.shape(node.inputs[0]))
    axes = [int(a) % rank for a in node.attrs["axes"]]
    return node.inputs[0] if axes == [rank - 1] else ""


def _layer_norm(r: Rewriter, node: Node) -> None:
    """d / sqrt(mean(d^2) + eps) * w + b with d = x - mean(x)."""
    centred, root = node.inputs
    sub = r.producer(centred, "onnx.Sub")
    sqrt = r.producer(root, "onnx.Sqrt")
    if sub is None or sqrt is None or r.dtype(centred) != "f32":
        return
    add = r.producer(sqrt.inputs[0], "onnx.Add")
    x = sub.inputs[0]
    if add is None or _mean_of(r, sub.inputs[1]) != x:
        return
    eps = next((e for e in map(r.scalar, add.inputs) if e is not None), None)
    variance = next((n for n in add.inputs if r.scalar(n) is None), "")
    square = r.producer(_mean_of(r, variance)) if variance else None
    if eps is None or square is None:
        return
    squared = (square.op == "onnx.Pow" and r.scalar(square.inputs[1]) == 2.0) or (
        square.op == "onnx.Mul" and square.inputs[0] == square.inputs[1]
    )
    if not squared or square.inputs[0] != centred:
        return
    last, vectors = node, ["", ""]
    for i, op in enumerate(("onnx.Mul", "onnx.Add")):
        reader = r.only_consumer(last.outputs[0])
        if reader is None or reader.op != op:
            break
        other = [n for n in reader.inputs if n != last.outputs[0]]
        data = r.array(other[0]) if len(other) == 1 else None
        if data is None or data.shape != r.shape(x)[-1:]:
            break
        vectors[i], last = other[0], reader
    if not vectors[0]:
        width = r.shape(x)[-1]
        if not isinstance(width, int):
            return
        vectors[0] = r.constant(f"{node.name}/one", np.ones(width, np.float32))
    r.replace(
        last,
        "onnx.LayerNormalization",
        [x, *vectors],
        {"axis": -1, "epsilon": eps, "stash_type": 1},
    )


@dataclass(frozen=True)
class _Heads:
    """[B, S, H, d] as columns of a matrix [B, S, R] from ``offset`` on."""

    source: str
    offset: int
    heads: int
    head_dim: int


def _axis_slice(r: Rewriter, node: Node) -> tuple[str, int] | None:
    """(source, index) of a node that takes one place of axis 0 and drops the axis."""
    if node.op in ("onnx.Squeeze", "onnx.Reshape"):
        if r.shape(node.inputs[0])[:1] != (1,) or r.shape(node.inputs[0])[1:] != r.shape(
            node.outputs[0]
        ):
            return None
        part = r.producer(node.inputs[0], "onnx.Slice")
        if part is None:
            return None
        a = part.attrs
        starts, axes = a.get("starts"), a.get("axes")
        if starts is None or axes is None or tuple(axes) != (0,) or len(starts) != 1:
            return None
        index = starts[0]
        return (part.inputs[0], int(index)) if isinstance(index, int) and index >= 0 else None
    if node.op == "onnx.Gather" and node.attrs["axis"] == 0:
        index_data = constant(r.graph, node.inputs[1])
        if index_data is not None and index_data.size == 1 and index_data.ndim == 0:
            return node.inputs[0], int(index_data)
    return None


def _heads_of(r: Rewriter, name: str, order: tuple[int, ...]) -> _Heads | None:
    """Where the heads of an operand lie; ``order`` is what a transpose made of [B, S, H, d]."""
    node = r.producer(name)
    if node is None:
        return None
    if node.op == "onnx.Transpose":
        perm = permutation(node, 4)
        if perm == order:
            return _columns(r, node.inputs[0], 0)
        if order == (0, 2, 3, 1) and perm == (0, 1, 3, 2):
            return _heads_of(r, node.inputs[0], (0, 2, 1, 3))
        return None
    found = _axis_slice(r, node)
    if found is None or order != (0, 2, 1, 3):
        return None
    stacked, index = found
    turned = r.producer(stacked, "onnx.Transpose")
    if turned is None or permutation(turned, 5) != (2, 0, 3, 1, 4):
        return None
    view = r.producer(turned.inputs[0], "onnx.Reshape")
    if view is None:
        return None
    _, _, _, heads, head_dim = r.shape(turned.inputs[0])
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        return None
    if (
        len(r.shape(view.inputs[0])) != 3
        or r.shape(view.inputs[0])[:2] != r.shape(turned.inputs[0])[:2]
    ):
        return None
    return _Heads(view.inputs[0], index * heads * head_dim, heads, head_dim)


def _columns(r: Rewriter, name: str, offset: int) -> _Heads | None:
    """[B, S, H, d] that is a view of [B, S, H * d]."""
    view = r.producer(name, "onnx.Reshape")
    shape = r.shape(name)
    if view is None or len(shape) != 4 or len(r.shape(view.inputs[0])) != 3:
        return None
    heads, head_dim = shape[2], shape[3]
    source = r.shape(view.inputs[0])
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        return None
    if source[:2] != shape[:2] or source[2] != heads * head_dim:
        return None
    return _Heads(view.inputs[0], offset, heads, head_dim)


def _scaled(r: Rewriter, name: str) -> tuple[str, float]:
    """A value as another one times a number."""
    node = r.producer(name, "onnx.Mul", "onnx.Div")
    if node is None:
        return name, 1.0
    for i in (0, 1):
        number = r.scalar(node.inputs[1 - i])
        if number is not None and (i == 0 or node.op == "onnx.Mul"):
            return node.inputs[i], number if node.op == "onnx.Mul" else 1.0 / number
    return name, 1.0


def _attention(r: Rewriter, node: Node) -> None:
    scores = node.inputs[0]
    rank = len(r.shape(scores))
    if rank != 4 or node.attrs["axis"] % rank != 3 or r.dtype(scores) != "f32":
        return
    mask = ""
    add = r.producer(scores, "onnx.Add")
    if add is not None:
        products = [n for n in add.inputs if _score_product(r, n) is not None]
        if len(products) != 1:
            return
        scores = products[0]
        mask = next(n for n in add.inputs if n != scores)
    found = _score_product(r, scores)
    if found is None:
        return
    product, scale = found
    q_name, q_scale = _scaled(r, product.inputs[0])
    k_name, k_scale = _scaled(r, product.inputs[1])
    q, k = _heads_of(r, q_name, (0, 2, 1, 3)), _heads_of(r, k_name, (0, 2, 3, 1))
    apply = r.only_consumer(node.outputs[0])
    if q is None or k is None or apply is None or apply.op != "onnx.MatMul":
        return
    if apply.inputs[0] != node.outputs[0]:
        return
    v = _heads_of(r, apply.inputs[1], (0, 2, 1, 3))
    turned = r.only_consumer(apply.outputs[0])
    if v is None or turned is None or turned.op != "onnx.Transpose":
        return
    if permutation(turned, 4) != (0, 2, 1, 3) or (q.heads, q.head_dim) != (k.heads, k.head_dim):
        return
    if (v.heads, v.head_dim) != (q.heads, q.head_dim):
        return
    if mask and r.shape(mask)[-1:] != r.shape(scores)[-1:]:
        return  # broadcast over the keys: the kernel has no such mask
    q, k, v = _merged(r, q, k, v)
    attrs: dict[str, Any] = {
        "heads": q.heads,
        "head_dim": q.head_dim,
        "scale": scale * q_scale * k_scale,
        "offsets": (q.offset, k.offset, v.offset),
    }
    inputs = [q.source, k.source, v.source, mask]
    merged = r.only_consumer(turned.outputs[0])
    batch, length = r.shape(q.source)[:2]
    flat = (batch, length, q.heads * q.head_dim)
    if merged is not None and merged.op == "onnx.Reshape" and r.shape(merged.outputs[0]) == flat:
        r.replace(merged, "EncoderAttention", inputs, attrs)
        return
    rows = r.name(f"{turned.name}/rows")
    r.make("EncoderAttention", inputs, [rows], attrs, before=turned)
    r.replace(
        turned,
        "onnx.Reshape",
        [rows],
        {"shape": (batch, length, q.heads, q.head_dim), "allowzero": 1},
    )


def _merged(r: Rewriter, q: _Heads, k: _Heads, v: _Heads) -> tuple[_Heads, _Heads, _Heads]:
    """Queries, keys and values of one input as columns of one product, if they are products."""
    parts = [_linear(r, h.source) for h in (q, k, v)]
    if any(p is None or h.offset for p, h in zip(parts, (q, k, v), strict=True)):
        return q, k, v
    linears = [p for p in parts if p is not None]
    x, first = linears[0].x, linears[0]
    if len({p.x for p in linears}) != 1 or len({p.add.outputs[0] for p in linears}) != 3:
        return q, k, v
    # under the names of all three, so that whoever chooses matrices by name finds it by each
    joined = np.concatenate([p.w for p in linears], axis=1)
    weights = r.constant("+".join(p.name for p in linears), joined)
    bias = r.constant(f"{first.add.name}/qkv_bias", np.concatenate([p.bias for p in linears]))
    product, total = r.name(f"{first.add.name}/product"), r.name(f"{first.add.name}/all")
    # x is there before the first of them; a node before all readers of the three will do
    nodes = {id(n): i for i, n in enumerate(r.graph.nodes)}
    place = min((p.add for p in linears), key=lambda n: nodes[id(n)])
    r.make("onnx.MatMul", [x, weights], [product], before=place)
    r.make("onnx.Add", [product, bias], [total], before=place)
    width = q.heads * q.head_dim
    return (
        _Heads(total, 0, q.heads, q.head_dim),
        _Heads(total, width, k.heads, k.head_dim),
        _Heads(total, 2 * width, v.heads, v.head_dim),
    )


@dataclass(frozen=True)
class _Linear:
    """x times constant weights [K, N], called ``name``, plus a constant bias [N]."""

    add: Node
    x: str
    name: str
    w: Any
    bias: Any


def _linear(r: Rewriter, name: str) -> _Linear | None:
    add = r.producer(name, "onnx.Add")
    if add is None:
        return None
    for i in (0, 1):
        product, bias = r.producer(add.inputs[i], "onnx.MatMul"), r.array(add.inputs[1 - i])
        if product is None or bias is None:
            continue
        w = r.array(product.inputs[1])
        if w is not None and w.ndim == 2 and bias.shape == w.shape[1:]:
            return _Linear(add, product.inputs[0], product.inputs[1], w, bias)
    return None


def _score_product(r: Rewriter, name: str) -> tuple[Node, float] | None:
    """The product of queries and keys behind a scale, which is constant."""
    source, scale = _scaled(r, name)
    product = r.producer(source, "onnx.MatMul")
    if product is None or r.array(product.inputs[1]) is not None:
        return None
    return product, scale
