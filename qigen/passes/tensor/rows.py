"""f32 nodes along rows that vector kernels exist for: softmax, norms, reductions, moves of axes."""

from __future__ import annotations

import numpy as np

from qigen.ir.graph import Graph, Node
from qigen.ir.tensor import given
from qigen.passes.tensor.layout import REDUCTIONS
from qigen.passes.tensor.rewrite import Rewriter
from qigen.passes.tensor.simplify import permutation


def to_rows(graph: Graph) -> Graph:
    """Replace general nodes by those with vector kernels, where these apply."""
    r = Rewriter(graph)
    for node in r.nodes():
        if node.op in ("onnx.Softmax", "onnx.LogSoftmax"):
            _softmax(r, node)
        elif node.op == "onnx.LayerNormalization":
            _layer_norm(r, node)
        elif node.op in REDUCTIONS:
            _reduction(r, node)
        elif node.op == "onnx.Transpose":
            _transpose(r, node)
    return r.done()


def _softmax(r: Rewriter, node: Node) -> None:
    rank = len(r.shape(node.inputs[0]))
    axis = node.attrs["axis"] % rank if rank else 0
    flat = node.attrs.get("flatten") and not 0 <= node.attrs["axis"] == rank - 1
    if r.dtype(node.inputs[0]) != "f32" or not rank or axis != rank - 1 or flat:
        return
    r.replace(node, "SoftmaxRows", [node.inputs[0]], {"log": int(node.op == "onnx.LogSoftmax")})


def _layer_norm(r: Rewriter, node: Node) -> None:
    x = node.inputs[0]
    rank = len(r.shape(x))
    if r.dtype(x) != "f32" or len([o for o in node.outputs if o]) != 1 or rank < 1:
        return
    if node.attrs["axis"] % rank != rank - 1:
        return
    width = r.shape(x)[-1]
    vectors = [given(node, i) for i in (1, 2)]
    for name in vectors:
        if name and (r.shape(name) != (width,) or r.dtype(name) != "f32"):
            return
    residual = ""
    producer = r.producer(x, "Loop")
    if (
        producer is not None
        and r.only_consumer(x) is node
        and producer.attrs["chain"] == (("add", ("in0", "in1"), ()),)
        and all(r.shape(n) == r.shape(x) for n in producer.inputs)
    ):
        x, residual = producer.inputs
    r.replace(
        node,
        "LayerNorm",
        [x, *vectors, residual],
        {"eps": float(np.float32(node.attrs["epsilon"]))},
    )


def _reduction(r: Rewriter, node: Node) -> None:
    axes = node.attrs["axes"]
    x = node.inputs[0]
    rank = len(r.shape(x))
    if r.dtype(x) != "f32" or given(node, 1) or not rank:
        return
    if not axes and node.attrs.get("noop_with_empty_axes"):
        return
    named = sorted(int(a) % rank for a in axes) if axes else list(range(rank))
    if named != list(range(named[0], named[-1] + 1)):
        return
    r.replace(
        node,
        "ReduceAxes",
        [x],
        {
            "kind": REDUCTIONS[node.op],
            "first": named[0],
            "last": named[-1] + 1,
            "keep": node.attrs["keepdims"],
        },
    )


def _transpose(r: Rewriter, node: Node) -> None:
    """Two groups of adjacent axes that change places, everything around them staying."""
    shape = r.shape(node.inputs[0])
    perm = permutation(node, len(shape))
    rank = len(perm)
    first = next((i for i in range(rank) if perm[i] != i), rank)
    last = next((i for i in reversed(range(rank)) if perm[i] != i), -1) + 1
    if first >= last:
        return
    middle = perm[first:last]
    cut = middle[0]
    # middle must be (cut..last-1, first..cut-1)
    if middle != (*range(cut, last), *range(first, cut)):
        return
    r.replace(node, "SwapAxes", [node.inputs[0]], {"perm": perm, "axes": (first, cut, last)})
