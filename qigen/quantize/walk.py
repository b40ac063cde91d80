"""A language model run part by part over many sequences at once.

Only what one part hands to the next is kept, for all sequences. The parts begin with products, so
that matrices can be looked at and changed before anything sees their results, and nothing runs
twice.
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
from qigen.formats.tensor import QuantizedTensor, select_rows
from qigen.ir import schema
from qigen.ir.graph import Array, Graph, Node, constant_shape, load_constant

Watcher = Callable[[str, Array], None]
"""Is called with the name of a value and what it is for one sequence, or for some: its rows below
each other."""

_AT_ONCE = 8
"""Sequences whose values are shown at once where nothing has to be computed."""


@dataclass(frozen=True)
class Segment:
    """Nodes that run between two sets of products, all of one layer (or of none).

    ``takes`` are the values that come from segments before, ``gives`` those that later ones need.
    """

    layer: int | None
    nodes: tuple[Node, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]

    def products(self, graph: Graph) -> list[Node]:
        """The products with constant matrices; their inputs are among ``takes``."""
        return [n for n in self.nodes if n.op == "MatMul" and graph.is_constant(n.inputs[1])]


def segments(graph: Graph) -> list[Segment]:
    """A flat graph cut in front of its products, so that the inputs of all matrices of a segment
    are known before any of them is used; products that do not depend on each other go together."""
    stages = _stages(graph)
    parts: dict[int, list[Node]] = {}
    for node in graph.nodes:
        parts.setdefault(stages[node.name], []).append(node)
    result = []
    given = set(graph.inputs) | set(graph.constants)
    ordered = [parts[stage] for stage in sorted(parts)]
    later: list[set[str]] = [set(graph.outputs)]
    for part in ordered[:0:-1]:
        later.append(later[-1] | {name for node in part for name in node.inputs})
    for part, needed in zip(ordered, reversed(later), strict=True):
        made = {name for node in part for name in node.outputs}
        read = {name for node in part for name in node.inputs if name} - made - given
        gives = made & needed - set(graph.outputs)
        result.append(Segment(part[0].layer, tuple(part), tuple(sorted(read)),
                              tuple(sorted(gives))))
    return result


def _stages(graph: Graph) -> dict[str, int]:
    """How many products in a row come before a node, itself included. A write to a cache belongs to
    the stage of what reads it."""
    stages: dict[str, int] = {}
    of_value: dict[str, int] = {}
    writers: dict[str, Node] = {}
    for node in graph.nodes:
        stage = max((of_value.get(name, 0) for name in node.inputs), default=0)
        if node.op == "MatMul" and graph.is_constant(node.inputs[1]):
            stage += 1
        for name in node.inputs:
            if name in writers:
                stages[writers[name].name] = stage
        if schema.operator(node.op, node.name).effect:
            writers |= dict.fromkeys(node.outputs, node)
        stages[node.name] = stage
        of_value |= dict.fromkeys(node.outputs, stage)
    return stages


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
        fields = select_rows(data.format, data.fields, rows)
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
        watch = watch or {}
        wanted = set(watch)
        nodes = _needed(segment.nodes, wanted | (set(segment.gives) if advance else set()))
        if not nodes and wanted <= set(segment.takes):
            for s in range(0, len(self.sequences), _AT_ONCE):
                for name, function in watch.items():
                    some = self._kept[name][s : s + _AT_ONCE]
                    function(name, some.reshape(-1, *some.shape[2:]))
                step(min(s + _AT_ONCE, len(self.sequences)))
            return
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
                watch[name](name, values[name])
            ev.caches.clear()
            for i, node in enumerate(nodes):
                arrays = [empty if self.graph.is_constant(n) else values[n] for n in node.inputs]
                outs = schema.operator(node.op, node.name).reference(node, arrays, ev)
                for name, value in zip(node.outputs, outs, strict=True):
                    values[name] = value
                    if name in wanted:
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

    def kept(self) -> dict[str, Array]:
        """What the next segment starts from, of all sequences; for :meth:`restart`."""
        return dict(self._kept)

    def restart(self, kept: Mapping[str, Array]) -> None:
        """Go on from what another walk over the same sequences has :meth:`kept`."""
        self._kept = dict(kept)

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
