"""Models in float16: their products are computed in f32, for which there are kernels.

Inputs and outputs keep their type. Every value in between is at least as exact as the model asks
for.
"""

from __future__ import annotations

import numpy as np

from qigen.errors import QigenError
from qigen.ir.graph import Graph, Node
from qigen.ir.types import TYPES
from qigen.passes.tensor.rewrite import Rewriter

_PRODUCTS = ("onnx.Conv", "onnx.ConvTranspose", "onnx.MatMul", "onnx.Gemm")
_TYPED = ("to", "dtype", "output_dtype", "stash_type")


def promote_halves(graph: Graph) -> Graph:
    """The graph in f32 if it has products of f16; else as it is."""
    if not any(
        node.op in _PRODUCTS and graph.values[node.inputs[0]].dtype == "f16" for node in graph.nodes
    ):
        return graph
    try:
        return _promoted(graph)
    except QigenError as error:  # an operator that mixes types: the general kernels know f16
        noted = graph.copy()
        note = f"computed in float16 by the general kernels, which are slow: {error}"
        noted.meta["notes"] = [*graph.meta.get("notes", ()), note]
        return noted


def _promoted(graph: Graph) -> Graph:
    result = Graph(
        graph.name, meta=dict(graph.meta), known=dict(graph.known), declared=dict(graph.declared)
    )
    names: dict[str, str] = {}
    for name in graph.inputs:
        value = graph.values[name]
        result.add_input(name, value.shape, value.dtype)
        names[name] = name
        if value.dtype == "f16":
            names[name] = f"{name}/f32"
            result.add_node(
                "onnx.Cast",
                [name],
                {"to": TYPES["f32"].onnx},
                name=f"{name}/to_f32",
                outputs=[names[name]],
            )
    for name, data in graph.constants.items():
        half = isinstance(data, np.ndarray) and data.dtype == np.float16
        result.add_constant(name, data.astype(np.float32) if half else data)  # type: ignore[union-attr]
        names[name] = name
    for node in graph.nodes:
        made = {
            o: f"{o}/f32" if o in graph.outputs and _half(graph, o) else o for o in node.outputs
        }
        result.add_node(
            node.op,
            [names[n] if n else "" for n in node.inputs],
            _attributes(node),
            name=node.name,
            outputs=[made[o] if o else "" for o in node.outputs],
        )
        names.update(made)
    for name in graph.outputs:
        if names[name] != name:
            result.add_node(
                "onnx.Cast",
                [names[name]],
                {"to": TYPES["f16"].onnx},
                name=f"{name}/to_f16",
                outputs=[name],
            )
        result.outputs.append(name)
    return Rewriter(result).done()


def _half(graph: Graph, name: str) -> bool:
    return graph.values[name].dtype == "f16"


def _attributes(node: Node) -> dict[str, object]:
    """The attributes, with f32 where they name f16."""
    half = TYPES["f16"].onnx
    return {
        k: TYPES["f32"].onnx if k in _TYPED and v == half and not isinstance(v, bool) else v
        for k, v in node.attrs.items()
    }
