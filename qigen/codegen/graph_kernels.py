"""Kernels of graph models that are translation units of their own: which, and how they are called.

Fused nodes carry a description (a chain, a shape of product); here it becomes the specification of
a kernel of the CPU backend for one ISA, and the call that the step makes.
"""

from __future__ import annotations

from typing import Any

from qigen import targets
from qigen.backends.base import Isa, KernelSource
from qigen.ir.graph import Graph, Node
from qigen.ir.tensor import Alias, Call


class GraphKernels:
    """Collects the kernels that the calls of one model need."""

    def __init__(self, isa: Isa, machine: targets.Machine) -> None:
        self.isa = isa
        self.machine = machine
        self._sources: dict[str, KernelSource] = {}
        self._declarations: dict[str, None] = {}
        self._headers: dict[str, str] = {}
        self._choices: list[dict[str, Any]] = []

    def call(self, node: Node, graph: Graph) -> Call | Alias | None:
        """The call of a node with a kernel of its own, else None."""
        return None

    def sources(self) -> list[KernelSource]:
        """The translation units."""
        return list(self._sources.values())

    def declarations(self) -> list[str]:
        """C++ declarations of their functions."""
        return list(self._declarations)

    def headers(self) -> dict[str, str]:
        """Rendered headers that the units and the model include."""
        return dict(self._headers)

    def choices(self) -> list[dict[str, Any]]:
        """What was chosen for each node and why, for the manifest."""
        return list(self._choices)
