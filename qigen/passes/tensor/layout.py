"""Layout: transposes move behind the nodes that do not care for the order of axes, and cancel.

A node whose inputs are transposed alike computes in the order of their sources, and its result is
transposed instead. What begins as NCHW -> NHWC -> NCHW around every convolution ends as NHWC from
the first convolution to the last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qigen.ir import dims
from qigen.ir.graph import Graph, Node
from qigen.ir.tensor import given
from qigen.passes.tensor.elementwise import BINARY, UNARY
from qigen.passes.tensor.products import TO_NCHW, TO_NHWC, conv_window
from qigen.passes.tensor.rewrite import Rewriter
from qigen.passes.tensor.simplify import permutation, transpose

ELEMENTWISE = {
    "Loop", *UNARY, *BINARY, "onnx.Pow", "onnx.Cast", "onnx.QuantizeLinear",
    "onnx.DequantizeLinear",
}  # fmt: skip
REDUCTIONS = {
    "onnx.ReduceMean": "mean",
    "onnx.ReduceSum": "sum",
    "onnx.ReduceMax": "max",
    "onnx.ReduceMin": "min",
}


def images(graph: Graph) -> Graph:
    """Pooling of images as NHWC between transposes."""
    r = Rewriter(graph)
    for node in r.nodes():
        if node.op in ("onnx.MaxPool", "onnx.AveragePool"):
            _pool(r, node)
        elif node.op in ("onnx.GlobalAveragePool", "onnx.GlobalMaxPool"):
            rank = len(r.shape(node.inputs[0]))
            kind = "onnx.ReduceMean" if node.op == "onnx.GlobalAveragePool" else "onnx.ReduceMax"
            if r.dtype(node.inputs[0]) == "f32":
                r.replace(
                    node, kind, [node.inputs[0]], {"axes": tuple(range(2, rank)), "keepdims": 1}
                )
    return r.done()


def _pool(r: Rewriter, node: Node) -> None:
    a = node.attrs
    x = node.inputs[0]
    if len(r.shape(x)) != 4 or r.dtype(x) != "f32" or len([o for o in node.outputs if o]) != 1:
        return
    window = conv_window(r, node, tuple(a["kernel_shape"]))
    if window is None or a.get("storage_order"):
        return
    kind = "max" if node.op == "onnx.MaxPool" else "average"
    if a["ceil_mode"] and not dims.is_static(r.shape(x)):
        return
    source, result = r.name(f"{node.name}/nhwc"), r.name(f"{node.name}/image")
    r.make("onnx.Transpose", [x], [source], {"perm": TO_NHWC}, before=node)
    made = r.make(
        "Pool",
        [source],
        [result],
        {
            "kind": kind,
            "kernel": window.kernel,
            "strides": window.strides,
            "dilations": window.dilations,
            "pads": window.pads,
            "ceil": a["ceil_mode"],
            "include_pad": a.get("count_include_pad") or 0,
        },
        before=node,
    )
    wanted = r.shape(node.outputs[0])
    if tuple(r.shape(result)[i] for i in TO_NCHW) != wanted:
        r.remove(made)  # other rules for the last window: the general kernel knows them
        return
    r.replace(node, "onnx.Transpose", [result], {"perm": TO_NCHW})


def sink(graph: Graph) -> Graph:
    """Move transposes down until nothing changes."""
    r = Rewriter(graph)
    changed = True
    while changed:
        changed = False
        for node in r.nodes():
            if not r.alive(node):
                continue
            if node.op == "onnx.Transpose":
                before = r.producer(node.inputs[0], "onnx.Transpose")
                if before is not None:
                    transpose(r, node)
                    changed = True
            elif node.op in ELEMENTWISE:
                changed = _elementwise(r, node) or changed
            elif node.op in REDUCTIONS:
                changed = _reduction(r, node) or changed
            elif node.op in ("onnx.Concat", "onnx.Softmax"):
                changed = _axis(r, node) or changed
            elif node.op == "onnx.Resize":
                changed = _resize(r, node) or changed
    return r.done()


def _perm_of(r: Rewriter, name: str) -> tuple[tuple[int, ...], str] | None:
    """(permutation, source) of a value that a Transpose makes."""
    node = r.producer(name, "onnx.Transpose")
    if node is None:
        return None
    return permutation(node, len(r.shape(node.inputs[0]))), node.inputs[0]


def _inverse(perm: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(perm))


def _behind(
    r: Rewriter,
    node: Node,
    op: str,
    inputs: list[str],
    attrs: dict[str, Any],
    perm: tuple[int, ...],
) -> None:
    """``node`` computes ``op`` of other inputs, and a transpose makes its result of that."""
    result = r.name(f"{node.name}/inner")
    r.make(op, inputs, [result], attrs, before=node)
    r.replace(node, "onnx.Transpose", [result], {"perm": perm})


def _operands(
    r: Rewriter, node: Node, names: list[str], rank: int
) -> tuple[list[str], tuple[int, ...]] | None:
    """Sources of operands that are transposed alike, or can cheaply be; None if there is no use."""
    found = [_perm_of(r, n) for n in names]
    perms = [f[0] for f in found if f is not None and len(f[0]) == rank]
    if not perms:
        return None
    perm = max(set(perms), key=perms.count)
    inverse = _inverse(perm)
    sources: list[str] = []
    extra = 0
    saved = 0
    pending: list[tuple[int, str]] = []
    for name, f in zip(names, found, strict=True):
        shape = r.shape(name)
        data = r.array(name)
        if f is not None and f[0] == perm:
            sources.append(f[1])
            saved += _size(shape)
        elif data is not None:
            full = data.reshape((1,) * (rank - data.ndim) + data.shape)
            turned = full.transpose(inverse)
            sources.append(
                name if data.size == 1 and data.ndim == 0 else r.constant(f"{name}/turned", turned)
            )
        elif all(d == 1 for d in shape):
            sources.append(name)
        elif len(shape) == rank:
            pending.append((len(sources), name))
            sources.append("")
            extra += _size(shape)
        else:
            return None
    if extra >= saved:
        return None
    for index, name in pending:
        turned_name = r.name(f"{name}/turned")
        r.make("onnx.Transpose", [name], [turned_name], {"perm": inverse}, before=node)
        sources[index] = turned_name
    return sources, perm


def _size(shape: tuple[Any, ...]) -> int:
    """Elements of a shape, open sizes counted as 64."""
    return int(np.prod([d if isinstance(d, int) else 64 for d in shape], dtype=np.int64))


def _elementwise(r: Rewriter, node: Node) -> bool:
    rank = len(r.shape(node.outputs[0]))
    if len(node.outputs) != 1:
        return False
    if node.op in ("onnx.QuantizeLinear", "onnx.DequantizeLinear"):
        f = _perm_of(r, node.inputs[0])
        if f is None or any(_size(r.shape(n)) != 1 for n in node.inputs[1:] if n):
            return False
        _behind(r, node, node.op, [f[1], *node.inputs[1:]], dict(node.attrs), f[0])
        return True
    data = node.inputs if node.op in ("Loop", "onnx.Pow") or node.op in BINARY else node.inputs[:1]
    if any(not n for n in data):
        return False
    found = _operands(r, node, list(data), rank)
    if found is None:
        return False
    sources, perm = found
    _behind(r, node, node.op, [*sources, *node.inputs[len(data) :]], dict(node.attrs), perm)
    return True


def _axis(r: Rewriter, node: Node) -> bool:
    rank = len(r.shape(node.outputs[0]))
    if node.attrs.get("flatten"):
        return False
    found = _operands(r, node, list(node.inputs), rank)
    if found is None:
        return False
    sources, perm = found
    axis = perm[node.attrs["axis"] % rank]
    _behind(r, node, node.op, sources, {**node.attrs, "axis": axis}, perm)
    return True


def _reduction(r: Rewriter, node: Node) -> bool:
    f = _perm_of(r, node.inputs[0])
    axes = node.attrs["axes"]
    if f is None or axes is None or given(node, 1):
        return False
    perm, source = f
    rank = len(perm)
    if not axes and node.attrs.get("noop_with_empty_axes"):
        return False
    names = [int(a) % rank for a in axes] or list(range(rank))
    inner = tuple(sorted(perm[a] for a in names))
    if node.attrs["keepdims"]:
        _behind(r, node, node.op, [source], {**node.attrs, "axes": inner}, perm)
        return True
    kept_inner = [i for i in range(rank) if i not in inner]
    order = tuple(kept_inner.index(perm[a]) for a in range(rank) if a not in names)
    if order == tuple(range(len(order))):
        r.replace(node, node.op, [source], {**node.attrs, "axes": inner})
    else:
        _behind(r, node, node.op, [source], {**node.attrs, "axes": inner}, order)
    return True


def _resize(r: Rewriter, node: Node) -> bool:
    f = _perm_of(r, node.inputs[0])
    if f is None or (
        given(node, 1)
        and r.array(given(node, 1)) is not None
        and _size(r.shape(given(node, 1))) > 0
    ):
        return False
    perm, source = f
    inverse = _inverse(perm)
    rank = len(perm)
    attrs = dict(node.attrs)
    if attrs.get("axes"):
        return False
    inputs = [source, *node.inputs[1:]]
    for index in (2, 3):
        name = given(node, index)
        if not name:
            continue
        data = r.array(name)
        if data is None:
            return False
        if data.size == 0:
            continue
        if data.size != rank:
            return False
        inputs[index] = r.constant(f"{name}/turned", data.reshape(-1)[list(inverse)])
    if attrs.get("sizes") is not None:
        sizes = tuple(attrs["sizes"])
        if len(sizes) != rank:
            return False
        attrs["sizes"] = tuple(sizes[i] for i in inverse)
    _behind(r, node, node.op, inputs, attrs, perm)
    return True


def finish(graph: Graph) -> Graph:
    """Transposes that move nothing become views."""
    r = Rewriter(graph)
    for node in r.nodes():
        if node.op == "onnx.Transpose" and r.alive(node):
            transpose(r, node)
    return r.done()
