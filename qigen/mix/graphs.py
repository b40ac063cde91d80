"""Formats for the matrices of a model that has no tokens: an ONNX graph, on samples of its inputs.

As for language models (:mod:`qigen.mix.sensitivity`), with other measures. What a format hurts is
the error of the model's outputs, squared and relative to their square, on the mean over samples and
outputs (for a small error the cosine is 1 / sqrt(1 + error)); where the samples hold the outputs
that are expected, those, and what the float model is off already does not count. A matrix that
stays costs what the float kernel of graphs does. Matrices are probed together if they have the same
shape and lie in the same part of the graph.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qigen.backends.base import Isa
from qigen.calibration import GraphWalk, product_matrices, without_padding
from qigen.costmodel.gemm import GemmShape, choose_tiles, weight_bytes
from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import Float32Array, Format
from qigen.graph_tiles import OPEN
from qigen.ir import dims
from qigen.ir.graph import Array, Graph, Node
from qigen.mix.candidates import CANDIDATES, Cost, Matrix, costs, named
from qigen.mix.choose import Choice, Problem, Progress, Wishes, check_budget, decided, kept_names
from qigen.mix.sensitivity import (
    PARTS,
    PROBES,
    ROWS,
    Moments,
    Sensitivity,
    fitted,
    matrix_errors,
    plain_errors,
    with_choice,
)
from qigen.passes.tensor import before_products
from qigen.quantize import methods
from qigen.quantize.hessian import Statistics
from qigen.quantize.model import VERSION, Store
from qigen.quantize.rtn import quantize_rtn
from qigen.targets import Machine

LEAST_ROWS = 4096
"""Samples are taken, spread evenly, until their products have as many rows together."""


def choose_graph(
    graph: Graph,
    wishes: Wishes,
    samples: Sequence[Mapping[str, Array]],
    *,
    model: str,
    sha256: str,
    isa: Isa,
    machine: Machine,
    threads: int,
    memory: int,
    cache: Path | None = None,
    report: Progress = lambda stage, done, total: None,
) -> Choice:
    """The formats of an imported graph's matrices that keep the budget and hurt least, or, where
    the error is limited, take least time; products have float inputs.

    ``samples`` are arrays by input, perhaps also by output (none: the weights alone are looked at).
    Raises as :func:`qigen.mix.choose` does; Unsupported for a graph without matrix products, and
    for one without outputs of floats if there are samples.
    """
    check_budget(wishes.budget, "error", bool(samples))
    graph = before_products(graph)
    matrices = matrices_of_graph(graph, samples[0] if samples else {})
    if not matrices:
        raise Unsupported("the model has no matrix products with constant float weights to choose "
                          "formats for; of convolutions --weights int8 makes bytes", graph.name)
    labels = named(wishes.candidates or CANDIDATES)
    kept = kept_names(matrices, wishes.keep)
    priced = costs(matrices, labels, kept, isa=isa, machine=machine, activations="f32",
                   threads=threads, own=_Kept(matrices, isa, machine, threads))
    few = _few(samples, max(m.rows for m in matrices.values()))
    sensitivity: Sensitivity
    if not few:
        at = {n.inputs[1]: n for n in graph.nodes if n.inputs[1:2] and n.inputs[1] in matrices}
        walk = GraphWalk(graph, [], memory)
        sensitivity = plain_errors(lambda name: _rows(walk.matrix(at[name])), matrices, priced,
                                   wishes.method, report)
        sensitivity.measure = "error"
    else:
        store = Store.of(
            cache, "graph mix", VERSION, ROWS, PROBES, sha256, methods.parse(wishes.method),
            sorted((n, sorted(row)) for n, row in priced.items()), _digest(few),
        )  # fmt: skip
        some = with_choice(matrices, priced)
        trial = _Trial(graph, some, few, memory)
        known = store.get("errors")
        errors = known[1]["errors"] if known else {}
        if not errors:
            errors = trial.errors(priced, wishes.method, report)
            store.put("errors", {}, {"errors": errors})
        sensitivity = fitted(some, errors, _groups(some), trial.measure, store, report, "error")
    how = (f"{len(few)} samples, times of a run with {max(m.rows for m in matrices.values())} rows "
           f"predicted for {machine.name} ({isa.name}, {threads} threads)")
    return decided(Problem(matrices, priced, sensitivity), wishes, labels, model, sha256, how)


def matrices_of_graph(graph: Graph, sample: Mapping[str, Array]) -> dict[str, Matrix]:
    """The matrices of products in a graph as products are taken from it, for inputs as in
    ``sample`` (of an empty one open sizes are their limits, else 1 in the first dimension and
    :data:`~qigen.graph_tiles.OPEN` in others)."""
    sizes: dict[str, int] = {}
    for name, array in sample.items():
        if name in graph.inputs:
            for d, n in zip(graph.values[name].shape, array.shape, strict=True):
                if not isinstance(d, int):
                    sizes.setdefault(str(d), n)
    limits: dict[str, int] = graph.meta.get("limits", {})

    def size(d: object, axis: int) -> int:
        if isinstance(d, int):
            return d
        known = dims.subs(d, sizes)
        return known if isinstance(known, int) else limits.get(str(d)) or (OPEN if axis else 1)

    inputs = product_matrices(graph)
    found: dict[str, Matrix] = {}
    for node in graph.nodes:
        name = node.inputs[1] if len(node.inputs) > 1 else ""
        if name not in inputs or name in found or node.op not in ("onnx.MatMul", "onnx.Gemm"):
            continue
        n, k = _weights(node, np.asarray(graph.constants[name])).shape
        shape = graph.values[inputs[name][0]].shape[:-1]
        rows = int(np.prod([size(d, axis) for axis, d in enumerate(shape)], dtype=np.int64))
        found[name] = Matrix(name, n, k, len(inputs[name]), False, "f32", max(1, rows))
    return found


def _weights(node: Node, w: Array) -> Array:
    """As [N, K]."""
    return w if node.op == "onnx.Gemm" and node.attrs["transB"] else w.T


def _rows(w: Array) -> Float32Array:
    """Some of the rows of a matrix [N, K], spread evenly."""
    at = np.unique(np.linspace(0, len(w) - 1, min(ROWS, len(w))).astype(np.intp))
    return np.ascontiguousarray(w[at], np.float32)


class _Kept:
    """What a matrix costs that stays float."""

    def __init__(self, matrices: Mapping[str, Matrix], isa: Isa, machine: Machine, threads: int
                 ) -> None:
        self.isa, self.machine, self.threads = isa, machine, threads
        shapes = [self._shape(m) for m in matrices.values()]
        self.cached = weight_bytes("f32", shapes) <= machine.l3_bytes // 2
        self._us = functools.lru_cache(maxsize=None)(self._predicted)

    @staticmethod
    def _shape(m: Matrix) -> GemmShape:
        return GemmShape(m.n, m.k, 1, m.rows, 1, 1, 4 * m.k)

    def _predicted(self, shape: GemmShape) -> float:
        return choose_tiles("f32", [shape], self.isa, self.threads, self.machine, self.cached).us

    def __call__(self, m: Matrix) -> Cost:
        shape = self._shape(m)
        return Cost(weight_bytes("f32", [shape]), m.uses * self._us(shape))


def _few(samples: Sequence[Mapping[str, Array]], rows: int) -> list[Mapping[str, Array]]:
    """Some of the samples, spread evenly; ``rows`` are those of one."""
    count = min(len(samples), -(-LEAST_ROWS // rows))
    at = {round(i) for i in np.linspace(0, len(samples) - 1, count)} if count else set()
    return [samples[i] for i in sorted(at)]


def _digest(samples: Sequence[Mapping[str, Array]]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample):
            digest.update(f"{name} {sample[name].dtype} {sample[name].shape}".encode())
            digest.update(np.ascontiguousarray(sample[name]).tobytes())
    return digest.hexdigest()


def _groups(matrices: Mapping[str, Matrix]) -> dict[str, list[str]]:
    """The matrices by shape and part of the graph."""
    groups: dict[str, list[str]] = {}
    for i, (name, m) in enumerate(matrices.items()):
        part = min(PARTS, len(matrices)) * i // len(matrices)
        groups.setdefault(f"{m.n}x{m.k} {part}", []).append(name)
    return groups


class _Trial:
    """The float graph on samples, and with some of its matrices rounded."""

    def __init__(self, graph: Graph, matrices: Mapping[str, Matrix],
                 samples: Sequence[Mapping[str, Array]], memory: int) -> None:
        self.graph, self.matrices, self.samples = graph, matrices, samples
        self.walk = GraphWalk(graph, samples, memory)
        self.first: dict[str, int] = {}
        self.nodes: dict[str, Node] = {}
        for i, node in enumerate(graph.nodes):
            if node.op in ("onnx.MatMul", "onnx.Gemm") and node.inputs[1] in matrices:
                self.first.setdefault(node.inputs[1], i)
                self.nodes.setdefault(node.inputs[1], node)
        firsts = {min(self.first[n] for n in names) for names in _groups(matrices).values()}
        self._stops = firsts
        self._states: dict[int, object] = {}
        self._means: dict[str, Float32Array] = {}  # of inputs whose mean is made up for
        self._wanted: list[dict[str, Array]] = []
        self._off = 0.0

    def errors(self, priced: Mapping[str, Mapping[str, Cost]], method: str, report: Progress
               ) -> dict[str, dict[str, float]]:
        """By matrix and candidate the relative error of its output."""
        found: dict[str, dict[str, float]] = {}

        def look(name: str, w: Array, statistics: Statistics) -> None:
            m = self.matrices[name]
            found[name] = matrix_errors(_rows(w), m, priced[name], method,
                                        Moments(statistics.hessian))
            report("sensitivity", len(found), len(self.matrices))

        self._run(look)
        return found

    def _run(self, look: Callable[[str, Array, Statistics], None] | None = None) -> None:
        """The float model, from its beginning to its end."""
        seen: set[str] = set()
        for i, node in enumerate(self.graph.nodes):
            if i in self._stops:
                self._states[i] = self.walk.state()
            name = node.inputs[1] if len(node.inputs) > 1 else ""
            if name in self.nodes and name not in seen and self.first[name] == i:
                seen.add(name)
                statistics = self.walk.statistics(node.inputs[0], name)
                if self.matrices[name].uses == 1:
                    self._means[name] = statistics.mean
                    statistics = statistics.centred()
                if look is not None:
                    look(name, self.walk.matrix(node), statistics)
            self.walk.step(i)
        shown: Mapping[str, str] = self.graph.meta.get("output_names", {})
        outputs = self.walk.outputs()
        for got, sample in zip(outputs, self.samples, strict=True):
            floats = {n: a for n, a in got.items() if a.dtype.kind == "f"}
            given = {n: sample[shown.get(n, n)] for n in floats if shown.get(n, n) in sample}
            for n, array in given.items():
                if array.shape != got[n].shape:
                    raise BadInput(f"a sample has {list(array.shape)} as the expected output "
                                   f"{shown.get(n, n)}, the model makes {list(got[n].shape)}",
                                   "calibration")
            if not floats:
                raise Unsupported("formats are weighed by the error of outputs that are floats, "
                                  "and the model has none", self.graph.name)
            self._wanted.append(given or floats)
        self._off = self._missed(outputs)

    def _missed(self, outputs: Sequence[Mapping[str, Array]]) -> float:
        """The squared error of outputs, relative to the square of what is wanted."""
        errors = []
        for got, wanted, mask in zip(outputs, self._wanted, self.walk.masks, strict=True):
            for name, array in wanted.items():
                expected = without_padding(array, mask).astype(np.float64)
                missed = np.square(without_padding(got[name], mask) - expected).sum()
                power = np.square(expected).sum()
                errors.append(float(missed / power) if power else float(missed > 0))
        return float(np.mean(errors))

    def measure(self, names: Sequence[str], fmt: Format) -> float:
        """The error of the outputs with these matrices rounded to nearest."""
        if not self._wanted:
            self._run()
        start = max(stop for stop in self._stops if stop <= min(self.first[n] for n in names))
        self.walk.restart(self._states[start])
        for name in names:
            node = self.nodes[name]
            w = np.ascontiguousarray(self.walk.matrix(node), np.float32)
            rounded = quantize_rtn(w, fmt).dequantize()
            mean = self._means.get(name)
            shift = None if mean is None else np.asarray((w - rounded) @ mean, np.float32)
            self.walk.exchange(node, rounded, shift)
        for i in range(start, len(self.graph.nodes)):
            self.walk.step(i)
        return max(0.0, self._missed(self.walk.outputs()) - self._off)
