"""Formats for all matrices of a model: costs, sensitivities, the solver, the curve."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen import toolchain
from qigen.backends.base import Isa
from qigen.errors import Unsupported, UsageError
from qigen.formats.catalog import by_name
from qigen.ir.graph import Graph
from qigen.mix.allocate import MOST_VALUE, Infeasible, Item, allocate
from qigen.mix.budget import Budget
from qigen.mix.candidates import CANDIDATES, KEEP, Cost, Matrix, costs, matrices_of, named
from qigen.mix.plan import MatrixPlan, WeightPlan
from qigen.mix.sensitivity import (
    PROBES,
    ROWS,
    Sensitivity,
    calibrated_errors,
    method_for,
    plain_errors,
    rows_of,
)
from qigen.planner import Measured, Product
from qigen.quantize import methods
from qigen.quantize.model import MEMORY, VERSION, Store
from qigen.targets import Machine

Progress = Callable[[str, int, int], None]

SEQUENCES = 8
"""Calibration sequences that the errors of the candidates are estimated on."""

CURVE = 24
"""Points of the curve."""

_UNIT_US = 1e-4  # times are whole numbers of this, rounded up


@dataclass(frozen=True)
class Wishes:
    """What is asked for: a budget, the candidates (none: those of the table), the method that
    brings a matrix to a format, and whether the curve of all budgets is wanted too."""

    budget: Budget
    method: str
    candidates: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    curve: bool = False


@dataclass(frozen=True)
class Point:
    """A mix of formats as a whole: stored bits a weight, bytes, microseconds of a token's products
    (or a run's), expected divergence or error of the outputs (a mere sum of relative errors if
    nothing was measured)."""

    bits: float
    bytes: int
    us: float
    kl: float
    label: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"bits": self.bits, "bytes": self.bytes, "us": self.us, "kl": self.kl,
                "label": self.label}


@dataclass(frozen=True)
class Choice:
    """The plan, and what could be had instead: the best for other budgets, and single formats."""

    plan: WeightPlan
    point: Point
    curve: tuple[Point, ...] = ()
    uniform: tuple[Point, ...] = ()
    measured: bool = False
    probes: list[dict[str, Any]] = field(default_factory=list)
    measure: str = "kl"

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {
            "budget": self.plan.budget, "how": self.plan.how, "expected": self.point.to_json(),
            "measure": self.measure, "divergence_measured": self.measured,
            "curve": [p.to_json() for p in self.curve],
            "uniform": [p.to_json() for p in self.uniform], "probes": self.probes,
        }  # fmt: skip


def choose(
    graph: Graph,
    wishes: Wishes,
    sequences: npt.NDArray[np.int32] | None,
    *,
    model: str,
    sha256: str,
    isa: Isa,
    machine: Machine,
    activations: str,
    threads: int,
    measured: Callable[[Sequence[Product]], Measured] | None = None,
    memory: int = MEMORY,
    cache: Path | None = None,
    report: Progress = lambda stage, done, total: None,
) -> Choice:
    """The formats of a flat graph's matrices that keep the budget and hurt least (or, where the
    divergence is limited, take least time).

    ``sequences`` int32 [S, T] are calibration data (None: the weights alone are looked at).
    ``sha256`` names the model in the plan and in the ``cache`` of sensitivities. Raises UsageError
    for a budget that no mix keeps, naming the least that one does, and for a divergence as the
    budget without calibration data; Unsupported for a mixture of experts; what
    :mod:`qigen.mix.candidates` raises for candidates.
    """
    check_budget(wishes.budget, "kl", sequences is not None)
    if any(node.op == "Experts" for node in graph.nodes):
        raise Unsupported("formats are not chosen for mixtures of experts yet, whose experts need "
                          "the same one; name it with --weights")
    matrices = matrices_of(graph)
    labels = named(wishes.candidates or CANDIDATES)
    kept = kept_names(matrices, wishes.keep)
    priced = costs(matrices, labels, kept, isa=isa, machine=machine, activations=activations,
                   threads=threads, measured=measured)
    if sequences is None:
        sensitivity = plain_errors(lambda name: rows_of(graph, name), matrices, priced,
                                   wishes.method, report)
    else:
        few = _few(sequences)
        store = Store.of(
            cache, "mix", VERSION, ROWS, PROBES, sha256, methods.parse(wishes.method),
            sorted((n, sorted(row)) for n, row in priced.items()),
            hashlib.sha256(few.tobytes()).hexdigest(),
        )  # fmt: skip
        sensitivity = calibrated_errors(graph, matrices, priced, wishes.method, few, memory, store,
                                        report)
    how = (f"{sequences.size if sequences is not None else 0} calibration tokens, times predicted "
           f"for {machine.name} ({isa.name}, {threads} threads)")
    return decided(Problem(matrices, priced, sensitivity), wishes, labels, model, sha256, how)


def check_budget(budget: Budget, measure: str, calibrated: bool) -> None:
    """UsageError for a budget that says nothing, or what cannot be known of such a model."""
    if budget == Budget():
        raise UsageError("--weights auto needs a --budget, such as bits=4, or a --plan")
    budget.check(measure)
    if budget.hurt is not None and not calibrated:
        raise UsageError(f"a budget of {'divergence' if measure == 'kl' else 'error'} has to be "
                         f"measured; give a --calibration {'text' if measure == 'kl' else 'file'}")


def decided(problem: Problem, wishes: Wishes, labels: Sequence[str], model: str, sha256: str,
            how: str) -> Choice:
    """The best choice for the budget, as a plan, and what could be had instead."""
    matrices, priced, sensitivity = problem.matrices, problem.costs, problem.sensitivity
    chosen = problem.solve(wishes.budget)
    point = problem.point(chosen)
    entries = {
        name: MatrixPlan(
            label,
            "" if label == KEEP else method_for(by_name(label), matrices[name], wishes.method),
            round(8 * priced[name][label].bytes / (matrices[name].n * matrices[name].k), 4),
            round(priced[name][label].us, 3),
            **{sensitivity.measure: problem.share(name, label, chosen)},
        )
        for name, label in chosen.items()
    }
    plan = WeightPlan(model, sha256, entries, wishes.budget.text,
                      {"bits": point.bits, "bytes": point.bytes, "us": point.us,
                       sensitivity.measure: point.kl}, how)
    curve, uniform = problem.curve(labels) if wishes.curve else ((), ())
    return Choice(plan, point, curve, uniform, sensitivity.measured, sensitivity.probes,
                  sensitivity.measure)


def kept_names(matrices: Mapping[str, Matrix], patterns: Sequence[str]) -> tuple[str, ...]:
    """The matrices whose names a pattern fits; UsageError for a pattern that fits none."""
    from fnmatch import fnmatchcase

    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in matrices):
            raise UsageError(f"no matrix is called {pattern}; there are "
                             f"{', '.join(list(matrices)[:3])} ...")
    return tuple(n for n in matrices if any(fnmatchcase(n, p) for p in patterns))


def _few(sequences: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Some of the sequences, spread evenly."""
    at = np.linspace(0, len(sequences) - 1, min(SEQUENCES, len(sequences))).astype(np.intp)
    return np.ascontiguousarray(sequences[np.unique(at)])


@dataclass
class Problem:
    """What a choice costs and how much it hurts, and the best choice for a budget."""

    matrices: Mapping[str, Matrix]
    costs: Mapping[str, Mapping[str, Cost]]
    sensitivity: Sensitivity

    def __post_init__(self) -> None:
        self.weights = sum(m.n * m.k for m in self.matrices.values())
        worst = sum(max(self._hurt(name, c) for c in row) for name, row in self.costs.items())
        self._per_hurt = (MOST_VALUE // 4) / worst if worst > 0 else 1.0

    def _hurt(self, name: str, label: str) -> float:
        return 0.0 if label == KEEP else self.sensitivity.of(name, label)

    def _whole(self, name: str, label: str) -> int:
        """The hurt as a whole number, rounded up."""
        return math.ceil(self._hurt(name, label) * self._per_hurt)

    def solve(self, budget: Budget) -> dict[str, str]:
        """The best choice: by matrix a candidate. UsageError if none keeps the budget."""
        tables: dict[str, Callable[[str, str], int]] = {
            "bytes": lambda n, c: self.costs[n][c].bytes,
            "latency": lambda n, c: math.ceil(self.costs[n][c].us / _UNIT_US),
            "kl": self._whole,
        }
        limits: dict[str, int] = {}
        sizes = [] if budget.bytes is None else [budget.bytes]
        if budget.bits is not None:
            sizes.append(int(budget.bits * self.weights / 8))
        if sizes:
            limits["bytes"] = min(sizes)
        objective = "kl"
        if budget.hurt is not None:
            objective = "latency"
            limits["kl"] = math.floor(self.sensitivity.total(budget.hurt) * self._per_hurt)
        if budget.us is not None and objective != "latency":
            limits["latency"] = math.floor(budget.us / _UNIT_US)
        items = []
        for name, row in self.costs.items():
            value = np.array([tables[objective](name, c) for c in row], np.int64)
            cost = np.array([[tables[of](name, c) for of in limits] for c in row], np.int64)
            items.append(Item(value, cost))
        try:
            picks = allocate(items, list(limits.values()))
        except Infeasible:
            raise self._impossible(budget) from None
        chosen = {name: list(row)[j] for (name, row), j in zip(self.costs.items(), picks,
                                                               strict=True)}
        if budget.us is not None and self.point(chosen).us > budget.us:
            raise self._impossible(budget)
        return chosen

    def _impossible(self, budget: Budget) -> UsageError:
        """The error that says what could be had."""
        def least(of: Callable[[str, str], float]) -> Point:
            return self.point({n: min(row, key=lambda c, n=n: of(n, c))  # type: ignore[misc]
                               for n, row in self.costs.items()})

        small, fast = (least(lambda n, c: self.costs[n][c].bytes),
                       least(lambda n, c: self.costs[n][c].us))
        exact = least(self._hurt)
        known = ""
        if self.sensitivity.measured:
            known = f", {self.sensitivity.measure}={exact.kl:.3g}"
        several = "; each of them alone" if budget.text.count("=") > 1 else ""
        return UsageError(
            f"no mix of the candidates keeps the budget {budget.text}; the least that there is is "
            f"bits={small.bits:.3f} (bytes={small.bytes}), latency={fast.us:.4g}us{known}{several}")

    def point(self, chosen: Mapping[str, str], label: str = "") -> Point:
        """What a choice comes to."""
        size = sum(self.costs[n][c].bytes for n, c in chosen.items())
        total = sum(self._hurt(n, c) for n, c in chosen.items())
        return Point(8 * size / self.weights, size,
                     sum(self.costs[n][c].us for n, c in chosen.items()),
                     self.sensitivity.divergence(total), label)

    def share(self, name: str, label: str, chosen: Mapping[str, str]) -> float:
        """A matrix's part of the divergence of a choice."""
        total = sum(self._hurt(n, c) for n, c in chosen.items())
        if not total:
            return 0.0
        return self.sensitivity.divergence(total) * self._hurt(name, label) / total

    def curve(self, labels: Sequence[str]) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
        """(the best mixes from the least bits to the most, single formats that can be had)."""
        uniform = []
        for label in labels:
            if label != KEEP and any(label in row for row in self.costs.values()):
                chosen = {n: label if label in row else KEEP for n, row in self.costs.items()}
                if all(c in self.costs[n] for n, c in chosen.items()):
                    uniform.append(self.point(chosen, label))
        low = self.point({n: min(row, key=lambda c, row=row: row[c].bytes)  # type: ignore[misc]
                          for n, row in self.costs.items()})
        high = self.point({
            n: min(row, key=lambda c, n=n: (  # type: ignore[misc]
                self._hurt(n, c), self.costs[n][c].bytes))
            for n, row in self.costs.items()
        })
        points = []
        for bits in np.linspace(low.bits, max(low.bits, high.bits), CURVE):
            budget = Budget(bits=float(bits) + 1e-6)
            points.append(self.point(self.solve(budget), f"bits={bits:.2f}"))
        return tuple(points), tuple(uniform)


def cache_folder() -> Path:
    """Where sensitivities are kept."""
    return toolchain.cache_folder() / "sensitivity"
