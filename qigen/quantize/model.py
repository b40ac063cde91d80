"""Quantization of a whole language model: layer by layer, each with the ones before it done.

For every layer the statistics of its products' inputs are collected over the calibration
sequences, its matrices quantized, and the layer run again with them, so that the next one is
calibrated on what it will get (GPTQ, section 4). What is finished is written to a folder at once; a
run that was killed goes on from there.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, QigenError, Unsupported, UsageError
from qigen.formats.algebra import Array, Format
from qigen.formats.catalog import by_name
from qigen.formats.tensor import QuantizedTensor
from qigen.ir.graph import Graph, constant_shape, load_constant
from qigen.ir.ops.experts import expert_parts
from qigen.quantize import methods
from qigen.quantize.hessian import Statistics, check_memory, output_error
from qigen.quantize.methods import Report
from qigen.quantize.prepare import Task
from qigen.quantize.walk import Segment, Walk

Progress = Callable[[str, int, int], None]

VERSION = 2
"""Of what the methods compute: results of another are not taken from the cache."""

SAMPLES = 128
"""Calibration sequences, unless the user says otherwise (GPTQ)."""

CONTEXT = 512
"""Tokens of one."""

MEMORY = 2 << 30
"""Bytes for statistics and for what lies between layers, unless the user says otherwise."""

_LEAST_TOKENS = 16
_RUNS_KEPT = 4


@dataclass(frozen=True)
class Recipe:
    """How matrices are quantized: a method of :mod:`qigen.quantize.methods` and its options.

    ``before`` are methods whose preparation of the model goes first, with their options.
    ``samples`` sequences of ``context`` tokens are looked at; ``memory`` bounds what is kept of
    them. ``sequential``: a layer sees the results of the quantized ones before it.
    """

    method: str = "rtn"
    options: Mapping[str, Any] = field(default_factory=dict)
    samples: int = SAMPLES
    context: int = CONTEXT
    memory: int = MEMORY
    sequential: bool = True
    before: tuple[methods.Step, ...] = ()

    @property
    def preparations(self) -> list[tuple[str, Callable[[Task], None]]]:
        """What changes the model first, by name and in order."""
        found: list[tuple[str, Callable[[Task], None]]] = []
        for name, options in (*self.before, (self.method, self.options)):
            row = methods.by_name(name)
            if row.prepare is not None:
                found.append((name, functools.partial(row.prepare, **row.split(options)[0])))
        return found

    def check(self) -> None:
        """Unsupported for a method that there is not, UsageError for options it does not have and
        for numbers that make no sense."""
        for name, options in (*self.before, (self.method, self.options)):
            methods.check_options(methods.by_name(name), options)
        if self.samples < 1 or self.context < _LEAST_TOKENS:
            raise UsageError(f"{self.samples} samples of {self.context} tokens are too few; take "
                             f"at least 1 of {_LEAST_TOKENS}")


def sequences_of(ids: Sequence[int] | npt.NDArray[np.integer], samples: int, context: int,
                 where: str = "calibration") -> npt.NDArray[np.int32]:
    """int32 [S, T]: up to ``samples`` sequences of ``context`` tokens, spread over the text.

    A text that is shorter than one is one sequence. BadInput if there is next to nothing.
    """
    tokens = np.asarray(ids, np.int32).reshape(-1)
    if len(tokens) < _LEAST_TOKENS:
        raise BadInput(f"the calibration text has {len(tokens)} tokens; give at least "
                       f"{_LEAST_TOKENS}, better {samples * context}", where)
    context = min(context, len(tokens))
    whole = tokens[: len(tokens) // context * context].reshape(-1, context)
    chosen = np.unique(np.linspace(0, len(whole) - 1, min(samples, len(whole))).astype(np.intp))
    return np.ascontiguousarray(whole[chosen])


class Store:
    """Finished parts of a run by name, each a file that is there whole or not at all."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            self._writing(lambda: folder.mkdir(parents=True, exist_ok=True))
            os.utime(folder)

    @classmethod
    def of(cls, root: Path | None, *key: object) -> Store:
        """The store of the run that ``key`` describes, in a folder of runs; the oldest of many
        runs go. None keeps nothing."""
        if root is None:
            return cls(None)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
        store = cls(root / digest)
        runs = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: -p.stat().st_mtime)
        for old in runs[_RUNS_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        return store

    def _writing(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            why = "the disk is full; free some space and run it again, it goes on from here" if (
                full) else f"results cannot be written there ({error.strerror})"
            raise UsageError(why, str(self.folder)) from None

    def get(self, name: str) -> tuple[dict[str, Array | QuantizedTensor], dict[str, Any]] | None:
        """What was put under a name; None if that has not happened, or the file is damaged."""
        if self.folder is None:
            return None
        file = self.folder / f"{name}.npz"
        try:
            with np.load(file, allow_pickle=False) as archive:
                about = json.loads(str(archive["about"]))
                arrays: dict[str, Array | QuantizedTensor] = {
                    n: archive[f"{n}|"] for n in about["arrays"]}
                for n, (fmt, shape) in about["tensors"].items():
                    row = by_name(fmt)
                    fields = {f.name: archive[f"{n}|{f.name}"] for f in row.fields}
                    arrays[n] = QuantizedTensor(row, (shape[0], shape[1]), fields)
            return arrays, about["notes"]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile, QigenError):
            return None

    def put(self, name: str, data: Mapping[str, Array | QuantizedTensor],
            notes: Mapping[str, Any]) -> None:
        """Keep arrays and tensors by name, with notes that JSON can hold; UsageError if the disk is
        full."""
        if self.folder is None:
            return
        arrays: dict[str, Array] = {}
        about: dict[str, Any] = {"arrays": [], "tensors": {}, "notes": dict(notes)}
        for key, value in data.items():
            if isinstance(value, QuantizedTensor):
                about["tensors"][key] = [value.format.name, list(value.shape)]
                arrays |= {f"{key}|{f}": a for f, a in value.fields.items()}
            else:
                about["arrays"].append(key)
                arrays[f"{key}|"] = value
        arrays["about"] = np.array(json.dumps(about))
        folder = self.folder

        def write() -> None:
            descriptor, temporary = tempfile.mkstemp(suffix=".part", dir=folder)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    np.savez(stream, **arrays)  # type: ignore[arg-type]
                Path(temporary).replace(folder / f"{name}.npz")
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

        self._writing(write)

    def drop(self, name: str) -> None:
        """Forget what is kept under a name."""
        if self.folder is not None:
            (self.folder / f"{name}.npz").unlink(missing_ok=True)


def matrices(graph: Graph) -> list[str]:
    """The names of a graph's matrices, in the order of their use."""
    read = dict.fromkeys(name for node in graph.nodes for name in node.inputs)
    return [name for name in read if name in graph.constants
            and len(constant_shape(graph.constants[name])) == 2]


def quantize_model(
    graph: Graph,
    formats: Mapping[str, Format],
    sequences: npt.NDArray[np.int32] | None,
    recipe: Recipe,
    *,
    store: Store | None = None,
    progress: Progress | None = None,
    by_matrix: Mapping[str, str] | None = None,
) -> tuple[Graph, list[dict[str, Any]]]:
    """The flat ``graph`` with the matrices that ``formats`` names in those formats.

    ``by_matrix`` names methods (one step as :func:`qigen.quantize.methods.parse` takes it) for
    matrices that get another than the recipe's; what changes the model first is the recipe's alone.

    ``sequences`` int32 [S, T] are what it is calibrated on; a method that needs no Hessian works
    without (None). Tables of embeddings, and the matrices of experts, are quantized without
    statistics, first. The argument is left alone. Also returns what became of every matrix
    (:class:`Report`, and its name).

    Raises what :func:`qigen.quantize.quantize_matrix` raises, naming the matrix; UsageError for a
    method that needs calibration data and has none.
    """
    recipe.check()
    method = methods.by_name(recipe.method)
    store = store or Store(None)
    report = progress or (lambda stage, done, total: None)
    unknown = set(formats) - set(graph.constants)
    if unknown:
        raise BadInput("the model has no such matrix; it is a plan for another model",
                       sorted(unknown)[0])
    own = {name: methods.parse((by_matrix or {})[name])[-1] if name in (by_matrix or {})
           else (recipe.method, recipe.options) for name in formats}
    needing = [m for m in (method, *(methods.by_name(m) for m, _ in own.values()))
               if m.needs_hessian]
    if sequences is None and needing:
        raise UsageError(f"method {needing[0].name} needs calibration data; give a text, or take "
                         "method clip or rtn")
    graph = prepared(graph, formats, sequences, recipe, store, report)
    reports: list[dict[str, Any]] = []
    # looked up, or multiplied by what only some tokens are: there are no statistics for these
    tables = {node.inputs[1] for node in graph.nodes if node.op == "Embedding"}
    tables |= {name for node in graph.nodes if node.op == "Experts"
               for names in expert_parts(node).weights.values() for name in names}
    work = _Work(graph, formats, own, recipe, store, reports)
    walk = Walk(graph, sequences, memory=recipe.memory, scratch=store.folder) if (
        sequences is not None) else None
    parts = walk.segments if walk is not None else []
    done = 0
    total = len(formats)

    def advanced(names: Iterable[str]) -> None:
        nonlocal done
        done += len(list(names))
        report("quantize", done, total)

    report("quantize", 0, total)
    first = [name for name in formats if name in tables or walk is None]
    for name in first:
        work.alone(name)
        advanced([name])
    rest = {name: fmt for name, fmt in formats.items() if name not in first}
    reached = _restarted(walk, graph, rest, store, recipe) if walk is not None else 0
    for number, segment in enumerate(parts):
        assert walk is not None
        mine = [n for n in segment.products(graph) if n.inputs[1] in rest]
        names = list(dict.fromkeys(node.inputs[1] for node in mine))
        if not rest:
            break
        found = work.known(f"{number:04}", names)
        if not found and names:
            found = work.segment(walk, segment, mine)
            if not recipe.sequential:
                walk.run(segment)
            store.put(f"{number:04}", found, {"reports": work.latest})
        elif not recipe.sequential:
            walk.run(segment)
        work.exchange(found)
        rest = {name: fmt for name, fmt in rest.items() if name not in names}
        advanced(names)
        if recipe.sequential and rest and number >= reached:
            walk.run(segment)
            if parts[number + 1].layer != segment.layer:
                _keep_place(walk, number + 1, store)
    store.drop(_PLACE)
    return graph, reports


_PLACE = "walk"
_MOST_KEPT = 1 << 30  # bytes


def _keep_place(walk: Walk, number: int, store: Store) -> None:
    """Put down what the segment ``number`` starts from, unless that is much."""
    kept = walk.kept()
    if sum(a.nbytes for a in kept.values()) <= _MOST_KEPT:
        store.put(_PLACE, kept, {"segment": number})


def _restarted(walk: Walk, graph: Graph, rest: Mapping[str, Format], store: Store, recipe: Recipe
               ) -> int:
    """Bring a walk to where a run that was killed had come with all results kept: the number of the
    first segment that it has still to run."""
    found = store.get(_PLACE) if recipe.sequential else None
    if found is None:
        return 0
    arrays, place = found
    for number, segment in enumerate(walk.segments[: place["segment"]]):
        if any(n.inputs[1] in rest for n in segment.products(graph)) and (
                store.get(f"{number:04}") is None):
            return 0
    walk.restart({name: a for name, a in arrays.items() if not isinstance(a, QuantizedTensor)})
    return int(place["segment"])


def prepared(graph: Graph, formats: Mapping[str, Format],
             sequences: npt.NDArray[np.int32] | None, recipe: Recipe, store: Store,
             progress: Progress) -> Graph:
    """A copy of the graph that computes the same, changed by the preparations of the recipe."""
    task = Task(graph.copy(), formats, sequences, recipe.memory, store, progress)
    for name, prepare in recipe.preparations:
        if any(node.op == "Experts" for node in graph.nodes):
            raise Unsupported(f"method {name} folds scales or rotations into neighbours, which is "
                              "not done for mixtures of experts; take gptq, clip or rtn")
        prepare(task)
    return task.graph


@dataclass
class _Work:
    graph: Graph
    formats: Mapping[str, Format]
    methods: Mapping[str, tuple[str, Mapping[str, Any]]]
    recipe: Recipe
    store: Store
    reports: list[dict[str, Any]]
    latest: list[dict[str, Any]] = field(default_factory=list)

    def dense(self, name: str) -> npt.NDArray[np.float32]:
        data = load_constant(self.graph.constants[name])
        return data.dequantize() if isinstance(data, QuantizedTensor) else data

    def exchange(self, found: Mapping[str, Array | QuantizedTensor]) -> None:
        """Put quantized matrices (and vectors that were changed) in their places."""
        for name, data in found.items():
            self.graph.constants[name] = data
            if isinstance(data, QuantizedTensor):
                self.graph.values[name] = replace(self.graph.values[name], dtype=data.format.name)

    def note(self, name: str, outcome: Report) -> None:
        outcome = replace(outcome, method="+".join(
            [*(name for name, _ in self.recipe.before), outcome.method]))
        self.latest.append({"matrix": name, **outcome.to_json()})

    def known(self, part: str, names: Sequence[str]) -> dict[str, Array | QuantizedTensor]:
        """What an earlier run has finished of a part; empty if nothing."""
        kept = self.store.get(part) if names else None
        if kept is None or not set(names) <= set(kept[0]):
            return {}
        self.reports.extend(kept[1]["reports"])
        return kept[0]

    def alone(self, name: str) -> None:
        """Quantize a matrix without statistics."""
        key = "table-" + hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        found = self.known(key, [name])
        if not found:
            self.latest = []
            method, options = self.methods[name]
            if methods.by_name(method).needs_hessian:
                method, options = "clip", {}
            with _naming(name):
                tensor, outcome = methods.quantize_matrix(
                    self.dense(name), self.formats[name], method, None, **options)
            self.note(name, outcome)
            found = {name: tensor}
            self.store.put(key, found, {"reports": self.latest})
            self.reports.extend(self.latest)
        self.exchange(found)

    def segment(self, walk: Walk, segment: Segment, products: Sequence[Any]
                ) -> dict[str, Array | QuantizedTensor]:
        """Collect statistics for the products of a segment and quantize their matrices."""
        self.latest = []
        found: dict[str, Array | QuantizedTensor] = {}
        inputs = list(dict.fromkeys(node.inputs[0] for node in products))
        for batch in self._batches(inputs):
            statistics = {x: Statistics.empty(self._width(x)) for x in batch}

            def watch(name: str, value: Array, into: dict[str, Statistics] = statistics) -> None:
                into[name].add(value)

            walk.run(segment, dict.fromkeys(batch, watch), advance=False)
            for x in batch:
                names = [n.inputs[1] for n in products if n.inputs[0] == x]
                found |= self._quantized(list(dict.fromkeys(names)), statistics[x])
        self.reports.extend(self.latest)
        return found

    def _width(self, value: str) -> int:
        width = self.graph.values[value].shape[-1]
        assert isinstance(width, int)
        return width

    def _batches(self, inputs: Sequence[str]) -> list[list[str]]:
        """Values whose statistics fit into the memory together; each batch is a run of its own."""
        batches: list[list[str]] = []
        room = 0
        for x in inputs:
            check_memory(self._width(x), self.recipe.memory, x)
            size = 4 * self._width(x) ** 2
            if not batches or size > room:
                batches.append([])
                room = self.recipe.memory // 2
            batches[-1].append(x)
            room -= size
        return batches

    def _quantized(self, names: Sequence[str], statistics: Statistics
                   ) -> dict[str, Array | QuantizedTensor]:
        """Matrices of one input. Those of one format and method are quantized as one, their rows
        together: rows do not know of each other, unless they share a field."""
        found: dict[str, Array | QuantizedTensor] = {}
        groups: dict[object, list[str]] = {}
        for name in names:
            fmt = self.formats[name]
            alone = not all(f.per_row and f.rows == 1 for f in fmt.fields)
            method, options = self.methods[name]
            key = (fmt.name, method, tuple(sorted(options.items())), name if alone else "")
            groups.setdefault(key, []).append(name)
        for members in groups.values():
            weights = [self.dense(name) for name in members]
            with _naming(", ".join(members)):
                method, options = self.methods[members[0]]
                tensor, outcome = methods.quantize_matrix(
                    np.concatenate(weights), self.formats[members[0]], method, statistics,
                    **options)
            at = 0
            hessian = statistics.hessian
            for name, w in zip(members, weights, strict=True):
                part = tensor.rows(at, at + len(w))
                at += len(w)
                error, relative = output_error(w, part.dequantize(), hessian)
                self.note(name, replace(outcome, error=error, relative=relative))
                found[name] = QuantizedTensor(
                    part.format, part.shape, {k: v.copy() for k, v in part.fields.items()})
        return found


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """BadInput of a matrix gets its name."""
    try:
        yield
    except BadInput as error:
        where = f"{error.where}: " if error.where else ""
        raise BadInput(f"{where}{error.message}", name) from None
