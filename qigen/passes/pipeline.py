"""The passes in their order, with the verifier between them."""

from __future__ import annotations

from collections.abc import Callable

from qigen.errors import Unsupported
from qigen.ir.graph import Graph
from qigen.ir.verify import verify
from qigen.passes import fuse

PASSES: tuple[Callable[[Graph], Graph], ...] = (
    fuse.select_rows_early,
    fuse.columns_before_norms,
    fuse.fuse_attention,
    fuse.fuse_norm_add,
    fuse.fuse_experts,
    fuse.group_matmuls,
    fuse.fuse_epilogues,
)

KERNEL_OPERATORS = frozenset(
    {
        "Embedding",
        "SelectRows",
        "SelectColumns",
        "MatMulGroup",
        "RopeAttention",
        "NormAdd",
        "GatedAct",
        "RoutedExperts",
    }
)
"""What a graph consists of after the passes: the operators that the code generator knows."""


def optimize(graph: Graph) -> Graph:
    """The graph in the operators that kernels exist for; the argument is left alone.

    Raises what :func:`qigen.ir.verify.verify` raises, and Unsupported for a node that no fusion
    covers.
    """
    verify(graph)
    for run in PASSES:
        graph = run(graph)
        verify(graph)
    for node in graph.nodes:
        if node.op not in KERNEL_OPERATORS:
            raise Unsupported(
                f"operator {node.op} stands where no kernel covers it; report the model", node.name
            )
    return graph
