"""The passes of tensor graphs, in order."""

from __future__ import annotations

from collections.abc import Callable

from qigen.backends.cpu.elementwise import ELEMENTWISE
from qigen.ir.graph import Graph, Node
from qigen.passes.tensor import elementwise, layout, rows
from qigen.passes.tensor.halves import promote_halves
from qigen.passes.tensor.patterns import find_patterns
from qigen.passes.tensor.products import Products, Rounding, quantized_tables
from qigen.passes.tensor.quantized import folded, quantized_products, weight_only
from qigen.passes.tensor.simplify import simplify


def before_products(graph: Graph) -> Graph:
    """What products are taken from: matrices have the names and the weights that the ``rounded`` of
    :func:`optimize_graph` is asked for."""
    for run in (promote_halves, simplify, find_patterns, quantized_products, weight_only, folded):
        graph = run(graph)
    return graph


def optimize_graph(
    graph: Graph,
    activations: str | None = None,
    rounded: Rounding | None = None,
) -> Graph:
    """The graph that is lowered.

    ``activations`` is the arithmetic of products whose weights are floats: f32 (default), bf16, or
    int8 (weights by channel, activations quantized at run time). ``rounded`` brings the weights of
    matrix products to a format of the catalog (None keeps them); those of convolutions become int8
    by channel then, but for depthwise and grouped ones, which have few.
    """
    arithmetic = {None: "f32", "f32": "f32", "bf16": "bf16", "int8": "u8s8"}[activations]

    def arithmetic_of(node: Node) -> str:
        images = node.op in ("onnx.Conv", "onnx.ConvTranspose")
        return "f32s8" if rounded is not None and images and arithmetic == "f32" else arithmetic

    def unchanged(graph: Graph) -> Graph:
        return graph

    passes: tuple[Callable[[Graph], Graph], ...] = (
        before_products,
        lambda g: Products(g, arithmetic_of, rounded).run(),
        quantized_tables if activations == "int8" or rounded is not None else unchanged,
        layout.images,
        lambda g: elementwise.to_loops(g, set(ELEMENTWISE)),
        layout.sink,
        layout.finish,
        simplify,
        elementwise.codes_to_loops,
        rows.to_rows,
        elementwise.fuse,
    )
    for run in passes:
        graph = run(graph)
    return graph


__all__ = ["before_products", "optimize_graph"]
