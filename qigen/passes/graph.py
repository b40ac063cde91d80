"""The passes of tensor graphs, in order."""

from __future__ import annotations

from qigen.ir.graph import Graph


def optimize_graph(graph: Graph, weights: str = "keep", activations: str | None = None) -> Graph:
    """The graph that is lowered."""
    return graph
