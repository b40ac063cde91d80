"""A language model run layer by layer over many sequences at once.

Only what one layer hands to the next is kept, for all sequences; so a layer can be looked at,
changed and run again before the next one sees its results.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput
from qigen.formats.algebra import QuantizedTensor
from qigen.ir import schema
from qigen.ir.graph import Array, Graph, Node, constant_shape, load_constant

Watcher = Callable[[str, Array], None]
"""Is called with the name of a value and what it is for one sequence."""


@dataclass(frozen=True)
class Segment:
    """Nodes that follow each other and belong to one layer (or to none).

    ``takes`` are the values that come from segments before, ``gives`` those that later ones need.
    """

    layer: int | None
    nodes: tuple[Node, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]

    def products(self, graph: Graph) -> list[Node]:
        """The products with constant matrices."""
        return [n for n in self.nodes if n.op == "MatMul" and graph.is_constant(n.inputs[1])]


def segments(graph: Graph) -> list[Segment]:
    """A flat graph cut into its layers."""
    parts: list[list[Node]] = []
    for node in graph.nodes:
        if not parts or parts[-1][0].layer != node.layer:
            parts.append([])
        parts[-1].append(node)
    result = []
    given = set(graph.inputs) | set(graph.constants)
    for i, part in enumerate(parts):
        made = {name for node in part for name in node.outputs}
        read = {name for node in part for name in node.inputs if name} - made - given
        later = {name for rest in parts[i + 1 :] for node in rest for name in node.inputs}
        gives = made & later
        result.append(Segment(part[0].layer, tuple(part), tuple(sorted(read)),
                              tuple(sorted(gives))))
    return result


class _Cache:
    """Keys and values of one layer and sequence."""

    def __init__(self, heads: int, head_dim: int) -> None:
        self._shape = (-1, heads, head_dim)
        self._keys: Array = np.zeros((0, heads, head_dim), np.float32)
        self._values = self._keys

    def append(self, positions: Array, k: Array, v: Array) -> None:
        self._keys, self._values = k.reshape(self._shape), v.reshape(self._shape)

    def sealed(self, positions: Array) -> Array:
        return np.zeros(len(positions), np.int64)

    def read(self, stop: int, sealed: int = 0) -> tuple[Array, Array]:
        return self._keys[:stop], self._values[:stop]


class _Evaluation:
    """What operators ask for, in float32, with the matrices of one segment kept dense."""

    dtype: np.dtype[Any] = np.dtype(np.float32)

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.dense: dict[str, Array] = {}
        self.tables: dict[str, Array | QuantizedTensor] = {}
        self.caches: dict[str, _Cache] = {}

    def matrix(self, name: str) -> Array:
        if name not in self.dense:
            data = load_constant(self.graph.constants[name])
            dense = data.dequantize() if isinstance(data, QuantizedTensor) else data
            self.dense[name] = dense.reshape(constant_shape(self.graph.constants[name]))
        return self.dense[name]

    def matmul(self, x: Array, weight: str) -> Array:
        result: Array = x @ self.matrix(weight).T
        return result

    def vector(self, name: str) -> Array:
        return self.matrix(name).astype(np.float32, copy=False)

    def gather(self, table: str, rows: Array) -> Array:
        if table not in self.tables:
            self.tables[table] = load_constant(self.graph.constants[table])
        data = self.tables[table]
        n = constant_shape(data)[0]
        if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < n:
            raise BadInput(f"a token id is outside of 0..{n - 1}", table)
        if isinstance(data, np.ndarray):
            return data[rows]
        fields = {f.name: data.fields[f.name] if f.scope == "tensor" else data.fields[f.name][rows]
                  for f in data.format.fields}
        return QuantizedTensor(data.format, (len(rows), data.shape[1]), fields).dequantize()

    def kv(self, state: str) -> _Cache:
        if state not in self.caches:
            s = self.graph.states[state]
            self.caches[state] = _Cache(s.n_kv_heads, s.head_dim)
        return self.caches[state]

    def forget(self) -> None:
        self.dense.clear()
        self.tables.clear()


class Walk:
    """``sequences`` int32 [S, T] on their way through ``graph``, whose constants may be exchanged
    between segments.

    What lies between segments is kept in memory up to ``memory`` bytes, else in a file in
    ``scratch`` (default: the folder for temporary files).
    """

    def __init__(self, graph: Graph, sequences: npt.NDArray[np.int32], *, memory: int,
                 scratch: Path | None = None) -> None:
        self.graph = graph
        self.sequences = sequences
        self.segments = segments(graph)
        self._memory = memory
        self._scratch = scratch
        self._kept: dict[str, Array] = {}

    def run(self, segment: Segment, watch: Mapping[str, Watcher] | None = None,
            advance: bool = True, step: Callable[[int], None] = lambda done: None) -> None:
        """Run a segment for every sequence. ``watch``: what to call with values by name; if not
        ``advance``, the results are not kept and what only they need is not computed. ``step``
        hears of sequences done."""
        wanted = set(watch or ())
        nodes = _needed(segment.nodes, wanted | (set(segment.gives) if advance else set()))
        ev = _Evaluation(self.graph)
        results: dict[str, Array] = {}
        positions = np.arange(self.sequences.shape[1], dtype=np.int32)
        last = {name: i for i, node in enumerate(nodes) for name in node.inputs}
        empty = np.empty(0, np.float32)
        for s, ids in enumerate(self.sequences):
            values: dict[str, Array] = {"input_ids": ids, "positions": positions,
                                        "rows": positions,
                                        **{name: self._kept[name][s] for name in segment.takes}}
            for name in wanted & set(values):
                assert watch is not None
                watch[name](name, values[name])
            ev.caches.clear()
            for i, node in enumerate(nodes):
                arrays = [empty if self.graph.is_constant(n) else values[n] for n in node.inputs]
                outs = schema.operator(node.op, node.name).reference(node, arrays, ev)
                for name, value in zip(node.outputs, outs, strict=True):
                    values[name] = value
                    if name in wanted:
                        assert watch is not None
                        watch[name](name, value)
                for name in node.inputs:
                    if last[name] == i and name not in segment.gives:
                        values.pop(name, None)
            if advance:
                for name in segment.gives:
                    if name not in results:
                        results[name] = self._room(values[name])
                    results[name][s] = values[name]
            step(s + 1)
        if advance:
            later = {name for other in self.segments[self.segments.index(segment) + 1 :]
                     for name in other.takes}
            self._kept = {name: value for name, value in {**self._kept, **results}.items()
                          if name in later}

    def _room(self, one: Array) -> Array:
        """Memory, or a file, for a value of every sequence."""
        shape = (len(self.sequences), *one.shape)
        if one.nbytes * len(self.sequences) <= self._memory // 4:
            return np.empty(shape, one.dtype)
        # the name goes at once, the file with the last that reads it
        with tempfile.TemporaryFile(dir=self._scratch) as stream:
            return np.memmap(stream, one.dtype, "w+", shape=shape)


def _needed(nodes: Iterable[Node], wanted: Collection[str]) -> list[Node]:
    """The nodes that ``wanted`` values depend on, and the cache writes that they read."""
    found: list[Node] = []
    names = set(wanted)
    for node in reversed(list(nodes)):
        if names.intersection(node.outputs):
            found.append(node)
            names.update(node.inputs)
    return found[::-1]
