"""f32 nodes along rows that vector kernels exist for: softmax, norms, reductions, moves of axes."""

from __future__ import annotations

import numpy as np

from qigen.ir import dims
from qigen.ir.graph import Graph, Node
from qigen.ir.ops.graph import JOINED_IMAGES
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
        elif node.op == "onnx.Concat":
            _join(r, node)
    return r.done()


def _join(r: Rewriter, node: Node) -> None:
    """Images that are enlarged, joined and given borders are written once, not three times."""
    y = node.outputs[0]
    if len(r.shape(y)) != 4 or node.attrs["axis"] % 4 != 3 or len(node.inputs) > JOINED_IMAGES:
        return
    if r.dtype(y) != "f32" or not all(isinstance(r.shape(n)[3], int) for n in node.inputs):
        return
    sources: list[str] = []
    factors: list[int] = []
    for name in node.inputs:
        enlarged = _enlarged(r, name)
        source, factor = enlarged if enlarged is not None else (name, (1, 1))
        sources.append(source)
        factors.extend(factor)
    pads, last = (0, 0, 0, 0), node
    reader = r.only_consumer(y)
    if reader is not None and reader.op == "PadImage":
        a = reader.attrs
        if (a["to"], a["channels"]) == ("f32", r.shape(y)[3]):
            pads, last = a["pads"], reader
    if any(f != 1 for f in factors) or last is not node:
        r.replace(last, "JoinImages", sources, {"factors": tuple(factors), "pads": pads})


def _enlarged(r: Rewriter, name: str) -> tuple[str, tuple[int, int]] | None:
    """The image of which ``name`` repeats each pixel, and how often along its height and width."""
    node = r.producer(name, "onnx.Resize")
    if node is None or r.only_consumer(name) is None or node.attrs["mode"] != "nearest":
        return None
    coordinates, rounding = (
        node.attrs["coordinate_transformation_mode"],
        node.attrs["nearest_mode"],
    )
    # output i of a whole factor f reads i // f: by its left end, or by its middle
    by_end = (coordinates, rounding) == ("asymmetric", "floor")
    if not by_end and not (coordinates == "half_pixel" and rounding.startswith("round_prefer_")):
        return None
    source, x, y = node.inputs[0], r.shape(node.inputs[0]), r.shape(name)
    if x[0] != y[0] or x[3] != y[3] or not dims.is_static((*x[1:3], *y[1:3])):
        return None
    (h, w), (tall, wide) = ([int(str(d)) for d in s[1:3]] for s in (x, y))
    if not h or not w or tall % h or wide % w:
        return None
    scales = r.array(given(node, 2)) if given(node, 2) else None
    if scales is not None and scales.size == 4:
        if scales.reshape(-1).tolist() != [1, tall // h, wide // w, 1]:
            return None
    elif (scales is not None and scales.size) or (given(node, 2) and scales is None):
        return None
    return source, (tall // h, wide // w)


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
