"""How much a format hurts a matrix of a language model, in expected divergence of the whole.

Two factors. The first is the error of the matrix's own output, relative to that output's square:
for rounding (rtn, clip) the weights' error weighted by the Hessian of the inputs; for methods with
feedback (gptq) the errors of the columns weighted by what the later columns cannot make up for,
which is the diagonal D of H = L D L^T. Both are taken on some of the rows.

The second is what such an error does to the model's probabilities. It is measured: all matrices of
one role (the same name but for its numbers) in one part of the depth are rounded, the model is run
over some tokens, and the divergence divided by the sum of the errors is the factor of them all.
Divergences of several such groups add up as long as they are small; how the whole model departs
from the sum is fitted as a power law to the whole model rounded to 3 and to 4 bits.

Without calibration data the first factor is that of the plain weights and the second is 1: an order
of what to round last, but no divergence. (Models that have no tokens: :mod:`qigen.mix.graphs`.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput
from qigen.evaluate import divergence_rows, log_softmax
from qigen.formats.algebra import Float32Array, Format
from qigen.formats.catalog import by_name
from qigen.formats.tensor import QuantizedTensor, select_rows
from qigen.ir.graph import Array, Graph, load_constant
from qigen.mix.candidates import KEEP, Cost, Matrix, method_of
from qigen.quantize.hessian import Statistics, factor, importance, output_error
from qigen.quantize.model import Store
from qigen.quantize.rtn import Clip, quantize_rtn
from qigen.quantize.walk import Segment, Walk

Progress = Callable[[str, int, int], None]

ROWS = 48
"""Rows of a matrix that its errors are estimated on."""

PROBE_TOKENS = 256
"""Tokens that the divergence of a probe is measured on, in two sequences."""

PROBES = ("u3g64", "u4g64")
"""Formats of the probes: groups are rounded to the first, the whole model to both."""

LEAST_TOKENS = 256
"""Calibration tokens below which an order of the matrices is no more than a guess."""

PARTS = 4
"""Of the depth, that are probed apart."""

_HEAD = 64  # rows of logits in float64 at a time


@dataclass
class Sensitivity:
    """``errors``: by matrix and candidate the relative error of the output; ``factors``: by matrix
    the divergence of an error of 1 (1 where nothing was measured). The divergence of the model is
    ``gain * total ** power`` of the sum of the matrices' products of both. ``measure`` says what
    the divergence is: 'kl', or 'error' of the outputs.
    """

    errors: dict[str, dict[str, float]]
    factors: dict[str, float]
    gain: float = 1.0
    power: float = 1.0
    measured: bool = False
    probes: list[dict[str, Any]] = field(default_factory=list)
    measure: str = "kl"

    def of(self, name: str, candidate: str) -> float:
        """What a candidate adds to the sum."""
        return self.factors[name] * self.errors[name][candidate]

    def divergence(self, total: float) -> float:
        """Nats a token, of a sum."""
        return self.gain * total**self.power if total > 0 else 0.0

    def total(self, divergence: float) -> float:
        """The sum that has a divergence."""
        return float((divergence / self.gain) ** (1 / self.power))


def method_for(fmt: Format, m: Matrix, wanted: str) -> str:
    """The method that a matrix gets: the wanted one, or clipping where that cannot be."""
    row = method_of(wanted)
    if row.needs_hessian and (m.table or row.fits(fmt)):
        return "clip"
    return wanted


def plain_errors(rows: Callable[[str], Float32Array], matrices: Mapping[str, Matrix],
                 options: Mapping[str, Mapping[str, Cost]], method: str,
                 report: Progress) -> Sensitivity:
    """The errors of the weights alone; ``rows`` gives some of a matrix's [rows, K]."""
    errors = {}
    for done, (name, m) in enumerate(matrices.items()):
        w = rows(name)
        errors[name] = {c: 0.0 if c == KEEP else error_of(w, by_name(c), m, method, None)
                        for c in options[name]}
        report("sensitivity", done + 1, len(matrices))
    return Sensitivity(errors, dict.fromkeys(matrices, 1.0))


def calibrated_errors(
    graph: Graph,
    matrices: Mapping[str, Matrix],
    options: Mapping[str, Mapping[str, Cost]],
    method: str,
    sequences: npt.NDArray[np.int32],
    memory: int,
    store: Store,
    report: Progress,
) -> Sensitivity:
    """The errors by the inputs that ``sequences`` int32 [S, T] make, and measured factors.

    Layers that an earlier run has finished are taken from ``store``. BadInput if there are too few
    tokens to measure anything.
    """
    if sequences.size < LEAST_TOKENS:
        raise BadInput(f"{sequences.size} tokens of calibration are too few to weigh formats "
                       f"against each other; give at least {LEAST_TOKENS}, better 4096",
                       "calibration")
    matrices = with_choice(matrices, options)
    walk = Walk(graph, sequences, memory=memory, scratch=store.folder)
    errors: dict[str, dict[str, float]] = {}
    wanted = {c for row in options.values() for c in row if c != KEEP} | set(PROBES)
    reached = 0  # by the walk: it only goes where an earlier run has not been
    for number, segment in enumerate(walk.segments):
        names = list(dict.fromkeys(
            n.inputs[1] for n in segment.products(graph) if n.inputs[1] in matrices))
        part = f"errors-{number:04}"
        kept = store.get(part)
        if kept is None and names:
            for passed in walk.segments[reached:number]:
                walk.run(passed)
            reached = number
            found = _segment_errors(walk, segment, names, matrices, options, method)
            store.put(part, {}, {"errors": found})
        elif kept is not None:
            found = kept[1]["errors"]
        else:
            found = {}
        errors |= found
        report("sensitivity", number + 1, len(walk.segments))
    for name, m in matrices.items():
        if name not in errors:  # only looked up in
            w = rows_of(graph, name)
            errors[name] = {c: error_of(w, by_name(c), m, method, None) for c in wanted
                            if c in options[name] or c in PROBES}
            errors[name][KEEP] = 0.0
    probing = _Probing(graph, sequences, memory, store)
    return fitted(matrices, errors, _groups(graph, matrices), probing.measure, store, report)


def _segment_errors(walk: Walk, segment: Segment, names: Sequence[str],
                    matrices: Mapping[str, Matrix], options: Mapping[str, Mapping[str, Cost]],
                    method: str) -> dict[str, dict[str, float]]:
    graph = walk.graph
    inputs: dict[str, list[str]] = {}
    for node in segment.products(graph):
        if node.inputs[1] in names:
            inputs.setdefault(node.inputs[0], []).append(node.inputs[1])
    found: dict[str, dict[str, float]] = {}
    for x, readers in inputs.items():
        statistics = Statistics.empty(matrices[readers[0]].k)
        walk.run(segment, {x: lambda _, value, s=statistics: s.add(value)},  # type: ignore[misc]
                 advance=False)
        moments = Moments(statistics.hessian)
        for name in dict.fromkeys(readers):
            found[name] = matrix_errors(rows_of(graph, name), matrices[name], options[name],
                                        method, moments)
    return found


def matrix_errors(w: Float32Array, m: Matrix, options: Iterable[str], method: str,
                  moments: Moments) -> dict[str, float]:
    """The errors of a matrix, from some of its rows ``w`` [rows, K], in each of its candidates and
    in the formats of the probes; those merely rounded as 'rtn FORMAT'."""
    wanted = sorted({c for c in options if c != KEEP} | set(PROBES))
    found = {c: error_of(w, by_name(c), m, method, moments) for c in wanted}
    for c in PROBES:
        found[f"rtn {c}"] = error_of(w, by_name(c), m, "rtn", moments)
    return {**found, KEEP: 0.0}


class Moments:
    """What is known of an input: the Hessian, and what feedback leaves of its diagonal."""

    def __init__(self, hessian: Float32Array) -> None:
        self.hessian = hessian
        self._left: npt.NDArray[np.float64] | None = None

    @property
    def left(self) -> npt.NDArray[np.float64]:
        """float64 [K]: of every column the variance that the columns after it do not explain."""
        if self._left is None:
            upper = factor(self.hessian).upper
            self._left = 1.0 / np.square(np.diagonal(upper).astype(np.float64))
        return self._left


def error_of(w: Float32Array, fmt: Format, m: Matrix, wanted: str,
             moments: Moments | None) -> float:
    """The relative error of a matrix's output, from some of its rows ``w`` [rows, K]."""
    row = method_of(method_for(fmt, m, wanted))
    hessian = moments.hessian if moments is not None else None
    search = None if row.name == "rtn" else Clip(importance(None if m.table else hessian))
    rounded = quantize_rtn(w, fmt, search).dequantize()
    if not row.needs_hessian or moments is None:
        return output_error(w, rounded, hessian)[1]
    power = np.einsum("nk,nk->", w @ moments.hessian, w, dtype=np.float64)
    missed = np.square(w - rounded).sum(axis=0, dtype=np.float64) @ moments.left
    return float(missed / power) if power else 0.0


def rows_of(graph: Graph, name: str, most: int = ROWS) -> Float32Array:
    """float32: some of the rows of a matrix of a language model, spread evenly."""
    data = load_constant(graph.constants[name])
    n = data.shape[0]
    chosen = np.unique(np.linspace(0, n - 1, min(most, n)).astype(np.intp))
    if isinstance(data, QuantizedTensor):
        fields = select_rows(data.format, data.fields, chosen)
        data = QuantizedTensor(data.format, (len(chosen), data.shape[1]), fields).dequantize()
        return np.ascontiguousarray(data, np.float32)
    return np.ascontiguousarray(data[chosen], np.float32)


def with_choice(matrices: Mapping[str, Matrix], options: Mapping[str, Mapping[str, Cost]]
                ) -> dict[str, Matrix]:
    """The matrices that do not merely stay as they are: of others nothing has to be known."""
    return {name: m for name, m in matrices.items() if set(options[name]) != {KEEP}}


Measure = Callable[[Sequence[str], Format], float]
"""What the model is off with the named matrices rounded to nearest."""


def fitted(
    matrices: Mapping[str, Matrix],
    errors: dict[str, dict[str, float]],
    groups: Mapping[str, Sequence[str]],
    measure: Measure,
    store: Store,
    report: Progress,
    name: str = "kl",
) -> Sensitivity:
    """The factors of the matrices, from what is measured where all of a group are rounded to the
    first of the probes' formats, and all together to both. What a run before has measured is taken
    from ``store``; ``name`` is that of the measure.
    """
    if not matrices:
        return Sensitivity({}, {}, measured=True, measure=name)
    todo = [*((PROBES[0], group) for group in groups.values()),
            *((fmt, list(matrices)) for fmt in PROBES)]
    labels = [*groups, "all", "all"]
    part = f"probes-{PROBE_TOKENS}"
    known = store.get(part)
    divergences: list[float] = list(known[1]["divergences"]) if known else []
    for fmt, group in todo[len(divergences) :]:
        divergences.append(measure(group, by_name(fmt)))
        store.put(part, {}, {"divergences": divergences})  # a run may be killed
        report("probes", len(divergences), len(todo))
    factors: dict[str, float] = {}
    probes = []
    for (fmt, group), label, measured in zip(todo, labels, divergences, strict=True):
        error = sum(_rounding(errors[m], fmt) for m in group)
        probes.append({"group": label, "format": fmt, "matrices": len(group), "error": error,
                       name: measured})
        if label != "all":
            factors |= dict.fromkeys(group, measured / error if error else 0.0)
    sums = [sum(factors[m] * _rounding(errors[m], fmt) for m in factors) for fmt in PROBES]
    gain, power = _law(sums, divergences[-2:])
    return Sensitivity(errors, factors, gain, power, True, probes, name)


def _rounding(errors: Mapping[str, float], fmt: str) -> float:
    """The error of a matrix in a probe."""
    return errors.get(f"rtn {fmt}", errors[fmt])


def _law(sums: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """(gain, power) of the whole model's divergence, from the sums of its parts."""
    if min(*sums, *measured) <= 0 or math.isclose(sums[0], sums[1], rel_tol=0.05):
        return 1.0, 1.0
    power = math.log(measured[0] / measured[1]) / math.log(sums[0] / sums[1])
    power = min(2.0, max(0.5, power))
    middle = [math.log(m) - power * math.log(s) for m, s in zip(measured, sums, strict=True)]
    return math.exp(sum(middle) / 2), power


def _groups(graph: Graph, matrices: Mapping[str, Matrix]) -> dict[str, list[str]]:
    """The matrices by role and part of the depth."""
    layers = {n.inputs[1]: n.layer for n in graph.nodes if n.op in ("MatMul", "Embedding")}
    depth = 1 + max((layer for layer in layers.values() if layer is not None), default=0)
    groups: dict[str, list[str]] = {}
    for name in matrices:
        layer = layers.get(name)
        role = re.sub(r"\d+", "*", name)
        part = "" if layer is None else f" {min(PARTS, depth) * layer // depth}"
        groups.setdefault(f"{role}{part}", []).append(name)
    return groups


class _Probing:
    """Divergences of the model with some of its matrices rounded."""

    def __init__(self, graph: Graph, sequences: npt.NDArray[np.int32], memory: int, store: Store
                 ) -> None:
        self.graph, self.store, self.memory = graph, store, memory
        length = min(sequences.shape[1], PROBE_TOKENS // 2)
        count = max(1, min(len(sequences), PROBE_TOKENS // length))
        at = np.linspace(0, len(sequences) - 1, count).astype(np.intp)
        self.sequences = np.ascontiguousarray(sequences[at, :length])
        self._starts: list[dict[str, Array]] = []

    def _reference(self) -> None:
        """The model as it is: log probabilities, and what every segment starts from."""
        walk = Walk(self.graph, self.sequences, memory=self.memory, scratch=self.store.folder)
        for segment in walk.segments[:-1]:
            self._starts.append(walk.kept())
            walk.run(segment)
        self._starts.append(walk.kept())
        self._segments = walk.segments
        self._expected = [log_softmax(x).astype(np.float32) for x in self._logits(walk)]

    def _logits(self, walk: Walk) -> list[Float32Array]:
        """Logits of the sequences."""
        found: list[Float32Array] = []
        walk.run(walk.segments[-1], {"logits": lambda _, x: found.append(x.copy())}, advance=False)
        return found

    def measure(self, names: Sequence[str], fmt: Format) -> float:
        """Mean divergence of the model with these matrices rounded to nearest."""
        if not self._starts:
            self._reference()
        graph = self.graph.copy()
        for name in names:
            data = load_constant(self.graph.constants[name])
            dense = data.dequantize() if isinstance(data, QuantizedTensor) else data
            graph.constants[name] = quantize_rtn(np.ascontiguousarray(dense, np.float32), fmt)
        wanted = set(names)
        first = next(i for i, s in enumerate(self._segments)
                     if any(wanted.intersection(n.inputs) for n in s.nodes))
        walk = Walk(graph, self.sequences, memory=self.memory, scratch=self.store.folder)
        walk.restart(self._starts[first])
        for segment in walk.segments[first:-1]:
            walk.run(segment)
        total, count = 0.0, 0
        for expected, got in zip(self._expected, self._logits(walk), strict=True):
            for a in range(0, len(got), _HEAD):
                rows = divergence_rows(expected[a : a + _HEAD].astype(np.float64),
                                       log_softmax(got[a : a + _HEAD]))
                total += float(rows.sum())
                count += len(rows)
        return total / count
