"""Row blocks: neighbouring nodes that treat every row by itself run over some rows at a time.

A product with many rows writes more than a cache holds before the next node reads it. What lies
between two attentions of an encoder (quantization, products, norms) needs no other row, so a thread
takes a block of rows through all of these nodes before the next block: intermediate values stay in
the second-level cache, in memory of the thread's own, and no node waits for another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qigen.codegen.lower import align
from qigen.ir import dims
from qigen.ir.graph import Graph, Node
from qigen.ir.ops.graph import X_SCALE, X_ZERO, X, chain_inputs
from qigen.ir.tensor import given
from qigen.ir.types import TYPES
from qigen.passes.memory import Buffer, place

LEAST_ROWS = 1024
"""With fewer rows threads share a product better by its columns: each reads its own weights."""
BLOCKS = (192, 144, 96, 72, 60, 48, 36, 24)
"""Rows of a block, the most first: whole register tiles of 12."""
CACHE_BYTES = 640 << 10
"""What the values inside a block may take: a third of a second-level cache of 2 MiB, which weights
and the rows of outer values need too."""


@dataclass(frozen=True)
class RowBlock:
    """Nodes [first, last] over blocks of ``rows`` of ``total`` rows.

    ``scratch`` has the offset of each value that only these nodes know in ``scratch_bytes`` of a
    thread; ``sliced`` the names of which each node reads or writes the rows of the block only.
    """

    first: int
    last: int
    total: int
    rows: int
    scratch: Mapping[str, int]
    scratch_bytes: int
    sliced: tuple[frozenset[str], ...]

    def row_bytes(self, graph: Graph, name: str) -> int:
        """Bytes of a row of a sliced value."""
        return _bytes(graph, name) // self.total


def find_row_blocks(graph: Graph, is_private: Callable[[str, int, int], bool]) -> list[RowBlock]:
    """The row blocks of a graph; ``is_private(name, first, last)`` tells whether only the nodes
    [first, last] touch the memory of a value."""
    found: list[RowBlock] = []
    i = 0
    while i < len(graph.nodes):
        rows, names = _rows(graph, graph.nodes[i])
        sliced = [names]
        last = i
        while rows >= LEAST_ROWS and last + 1 < len(graph.nodes):
            more, names = _rows(graph, graph.nodes[last + 1])
            if more != rows:
                break
            sliced.append(names)
            last += 1
        if last > i:
            block = _block(graph, i, last, rows, tuple(sliced), is_private)
            if block is not None:
                found.append(block)
        i = last + 1
    return found


def _block(
    graph: Graph,
    first: int,
    last: int,
    total: int,
    sliced: tuple[frozenset[str], ...],
    is_private: Callable[[str, int, int], bool],
) -> RowBlock | None:
    touched: dict[str, list[int]] = {}
    for i in range(first, last + 1):
        for name in (*graph.nodes[i].inputs, *graph.nodes[i].outputs):
            touched.setdefault(name, []).append(i)
    made = {o for i in range(first, last + 1) for o in graph.nodes[i].outputs if o}
    private = [n for n in touched if n in made and is_private(n, first, last)]
    if not private:
        return None
    for rows in BLOCKS:
        buffers = [
            Buffer([n], align(rows * _bytes(graph, n) // total), touched[n][0], touched[n][-1])
            for n in private
        ]
        placed, size = place(buffers)
        if size <= CACHE_BYTES:
            scratch = {b.values[0]: b.offset for b in placed}
            return RowBlock(first, last, total, rows, scratch, size, sliced)
    return None


def _bytes(graph: Graph, name: str) -> int:
    value = graph.values[name]
    return int(dims.whole(dims.product(value.shape))) * TYPES[value.dtype].bytes


def _rows(graph: Graph, node: Node) -> tuple[int, frozenset[str]]:
    """How many rows a node treats one by one, and the values that have them; 0 if it does not."""
    none = (0, frozenset[str]())
    names = _sliced(graph, node)
    if not names or not all(dims.is_static(graph.values[n].shape) for n in names):
        return none
    *lead, _ = graph.values[node.outputs[0]].shape
    rows = int(dims.whole(dims.product(tuple(lead))))
    for name in names:
        shape = graph.values[name].shape
        if len(shape) == 1:
            if shape != (rows,):
                return none
        elif dims.product(shape[:-1]) != rows:
            return none
    return rows, frozenset(names)


def _sliced(graph: Graph, node: Node) -> list[str]:
    outputs = [o for o in node.outputs if o]
    if len(graph.values[node.outputs[0]].shape) < 2:
        return []
    if node.op in ("QuantizeRows", "ToBf16"):
        return [node.inputs[0], *outputs]
    if node.op == "LayerNorm":
        return [n for n in (node.inputs[0], given(node, 3), *outputs) if n]
    if node.op == "Product":
        by_row = [
            given(node, i)
            for i in (X_SCALE, X_ZERO)
            if given(node, i) and dims.product(graph.values[given(node, i)].shape) != 1
        ]
        pairs = zip(chain_inputs(node), node.attrs["kinds"], strict=True)
        return [node.inputs[X], *by_row, *(n for n, kind in pairs if kind == "full"), *outputs]
    if node.op == "Loop":
        shape = graph.values[node.outputs[0]].shape
        same = [n for n in node.inputs if graph.values[n].shape == shape]
        others = [graph.values[n].shape for n in node.inputs if n not in same]
        # what is broadcast along the rows stays as it is
        if all(s in ((), (1,), shape[-1:]) for s in others):
            return [*same, *outputs]
    return []
