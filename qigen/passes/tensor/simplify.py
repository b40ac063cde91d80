"""Nodes that do nothing, or that others can do."""

from __future__ import annotations

import numpy as np

from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.tensor import given
from qigen.passes.tensor.rewrite import Rewriter


def simplify(graph: Graph) -> Graph:
    """Without identities, moves of nothing, and batch normalisation as an operator of its own."""
    r = Rewriter(graph)
    for node in r.nodes():
        if not r.alive(node):
            continue
        if node.op == "onnx.BatchNormalization":
            _batch_norm(r, node)
        elif (
            (node.op in ("onnx.Dropout", "onnx.Identity") and len(node.outputs) == 1)
            or (node.op == "onnx.Cast" and r.dtype(node.inputs[0]) == r.dtype(node.outputs[0]))
            or (node.op == "onnx.Reshape" and r.shape(node.inputs[0]) == r.shape(node.outputs[0]))
        ):
            _skip(r, node)
        elif node.op == "onnx.Transpose":
            transpose(r, node)
    return r.done()


def _skip(r: Rewriter, node: Node) -> None:
    """Readers of a node read its input instead, unless the result is an output of the graph."""
    if node.outputs[0] not in r.graph.outputs:
        r.use(node.outputs[0], node.inputs[0])
        r.remove(node)


def permutation(node: Node, rank: int) -> tuple[int, ...]:
    """The permutation of a Transpose."""
    return tuple(int(p) for p in node.attrs["perm"]) or tuple(reversed(range(rank)))


def moves_nothing(perm: tuple[int, ...], shape: Shape) -> bool:
    """Whether only axes of size 1 change their order."""
    kept = [p for p in perm if shape[p] != 1]
    return kept == sorted(kept)


def transpose(r: Rewriter, node: Node) -> None:
    """Transposes in a row become one; one that moves no data becomes a view."""
    source = node.inputs[0]
    perm = permutation(node, len(r.shape(source)))
    before = r.producer(source, "onnx.Transpose")
    if before is not None:
        first = permutation(before, len(perm))
        perm = tuple(first[p] for p in perm)
        source = before.inputs[0]
    shape = r.shape(source)
    if perm == tuple(range(len(perm))) and node.outputs[0] not in r.graph.outputs:
        r.use(node.outputs[0], source)
        r.remove(node)
    elif moves_nothing(perm, shape):
        r.replace(
            node, "onnx.Reshape", [source], {"shape": tuple(shape[p] for p in perm), "allowzero": 1}
        )
    elif before is not None:
        r.replace(node, "onnx.Transpose", [source], {"perm": perm})


def _batch_norm(r: Rewriter, node: Node) -> None:
    """x * a + b with constants by channel, which convolutions take into their weights."""
    if len([o for o in node.outputs if o]) > 1 or node.attrs.get("training_mode"):
        return
    arrays = [r.array(given(node, i)) for i in range(1, 5)]
    scale, bias, mean, variance = (None if a is None else a.astype(np.float64) for a in arrays)
    if scale is None or bias is None or mean is None or variance is None:
        return
    x = node.inputs[0]
    if r.dtype(x) != "f32":
        return
    a = scale / np.sqrt(variance + node.attrs["epsilon"])
    b = bias - mean * a
    shape = (-1,) + (1,) * (len(r.shape(x)) - 2)
    factor = r.constant(f"{node.name}/scale", a.astype(np.float32).reshape(shape))
    offset = r.constant(f"{node.name}/shift", b.astype(np.float32).reshape(shape))
    product = r.name(f"{node.name}/scaled")
    r.make("onnx.Mul", [x, factor], [product], before=node)
    r.replace(node, "onnx.Add", [product, offset])


__all__ = ["moves_nothing", "permutation", "simplify", "transpose"]
