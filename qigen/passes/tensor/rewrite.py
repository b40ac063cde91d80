"""What the passes of tensor graphs share: finding producers and consumers, making nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qigen.ir import schema
from qigen.ir.graph import Array, Graph, Node, Shape
from qigen.ir.tensor import constant


class Rewriter:
    """Edits a copy of a graph; :meth:`done` gives the result.

    A pass goes over ``nodes()`` and calls :meth:`replace`; producers and consumers are always those
    of the current state.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph.copy()
        self._names = {n.name for n in graph.nodes}
        self._index()

    def _index(self) -> None:
        """Note that nodes changed: producers and consumers are found anew when asked for."""
        self._found: tuple[dict[str, Node], dict[str, list[Node]]] | None = None

    def _maps(self) -> tuple[dict[str, Node], dict[str, list[Node]]]:
        if self._found is None:
            self._found = self.graph.producers(), self.graph.consumers()
        return self._found

    # -- reading ----------------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """The nodes as they are now; editing does not disturb the list."""
        return list(self.graph.nodes)

    def alive(self, node: Node) -> bool:
        """Whether a node of an earlier list is still there."""
        return any(self._maps()[0].get(o) is node for o in node.outputs if o)

    def producer(self, name: str, *ops: str) -> Node | None:
        """The node that makes a value, if it is one of ``ops`` (default: any)."""
        node = self._maps()[0].get(name)
        return node if node is not None and (not ops or node.op in ops) else None

    def consumers(self, name: str) -> list[Node]:
        """The nodes that read a value, once per use."""
        return self._maps()[1].get(name, [])

    def only_consumer(self, name: str) -> Node | None:
        """The node that alone reads a value (any number of times), if it is no output."""
        if name in self.graph.outputs:
            return None
        readers = self.consumers(name)
        first = readers[0] if readers else None
        return first if first is not None and all(r is first for r in readers) else None

    def shape(self, name: str) -> Shape:
        """The shape of a value."""
        return self.graph.values[name].shape

    def dtype(self, name: str) -> str:
        """The type of a value."""
        return self.graph.values[name].dtype

    def array(self, name: str) -> Array | None:
        """The array of a plain constant."""
        return constant(self.graph, name)

    def scalar(self, name: str) -> float | None:
        """The number of a constant with one element."""
        data = self.array(name)
        return float(data.reshape(-1)[0]) if data is not None and data.size == 1 else None

    # -- writing ----------------------------------------------------------------------------------

    def name(self, stem: str) -> str:
        """A name that no value or node has."""
        result, i = stem, 1
        while result in self.graph.values or result in self._names:
            result, i = f"{stem}.{i}", i + 1
        self._names.add(result)
        return result

    def constant(self, stem: str, data: Any) -> str:
        """A new constant; its name."""
        array = np.asarray(data)
        return self.graph.add_constant(
            self.name(stem), np.ascontiguousarray(array).reshape(array.shape)
        )

    def make(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attrs: dict[str, Any] | None = None,
        name: str = "",
        before: Node | None = None,
        after: Node | None = None,
    ) -> Node:
        """Insert a node (default: at the end). Values for its outputs are inferred."""
        operator = schema.operator(op)
        node = Node(op, name or self.name(outputs[0] or op), _trimmed(inputs), list(outputs))
        node.attrs = operator.complete(node, attrs or {})
        for value in schema.infer(node, self.graph):
            if value.name:
                self.graph.values[value.name] = value
        at = len(self.graph.nodes)
        if before is not None:
            at = self._at(before)
        if after is not None:
            at = self._at(after) + 1
        self.graph.nodes.insert(at, node)
        self._index()
        return node

    def _at(self, node: Node) -> int:
        return next(i for i, n in enumerate(self.graph.nodes) if n is node)

    def remove(self, node: Node) -> None:
        """Take a node out; its values stay until another node makes them or nobody reads them."""
        del self.graph.nodes[self._at(node)]
        self._index()

    def replace(
        self, node: Node, op: str, inputs: Sequence[str], attrs: dict[str, Any] | None = None
    ) -> Node:
        """Another node in the place of one, with the same outputs and name."""
        operator = schema.operator(op)
        new = Node(op, node.name, _trimmed(inputs), list(node.outputs), layer=node.layer)
        new.attrs = operator.complete(new, attrs or {})
        for value in schema.infer(new, self.graph):
            if value.name:
                self.graph.values[value.name] = value
        self.graph.nodes[self._at(node)] = new
        self._index()
        return new

    def use(self, old: str, new: str) -> None:
        """All who read ``old`` read ``new`` from now on. A graph output keeps its name."""
        for node in self.graph.nodes:
            node.inputs = [new if n == old else n for n in node.inputs]
        self._index()

    def done(self) -> Graph:
        """The rewritten graph, without what nobody needs."""
        return self.graph.rebuilt(self.graph.nodes)


def _trimmed(inputs: Sequence[str]) -> list[str]:
    result = list(inputs)
    while result and not result[-1]:
        result.pop()
    return result

