"""The planner: which kernel, with which schedule, for every matrix of a model.

The space is small and enumerated exactly. What may differ from weight to weight is its layout; the
register tiles are one list for all int8 kernels of a model, because they all read the same records
of quantized activations, and one list for each format with f32 activations. Times come from the
cost model, or from measurements where there are any.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from qigen.backends.base import Isa
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.isa import by_name as isa_by_name
from qigen.backends.cpu.matmul import INTEGER_ACTIVATIONS, MatmulSpec
from qigen.costmodel import Prediction, Situation, predict, resources, schedules, space
from qigen.costmodel.matmul import (
    activation_bytes,
    registers,
    tile_lists,
    token_tiles,
)
from qigen.errors import BadInput, QigenError, UsageError
from qigen.formats.algebra import Format
from qigen.formats.catalog import by_name
from qigen.formats.layout import Layout
from qigen.formats.layout import packed_bytes as weight_bytes
from qigen.ir.graph import Graph, constant_shape
from qigen.ir.ops.experts import expert_parts
from qigen.ir.ops.fused import group_parts
from qigen.ir.plan import Alternative, KernelChoice, Plan, ScheduleValue
from qigen.targets import Machine

BUCKETS = (1, 4, 16, 128)
"""Numbers of tokens that every matrix is planned for: decoding, small batches, prefill."""

ACTIVATIONS = ("auto", "f32", "bf16", *INTEGER_ACTIVATIONS)

Measured: TypeAlias = Mapping[tuple[MatmulSpec, int, int, int], float]
"""Microseconds of a call by (kernel, n, k, m), measured with the plan's number of threads; infinity
if the kernel crashed or was wrong, so that it is never chosen."""

_OP = "matmul"
_WEIGHTS = {1: 2.0, 4: 1.0, 16: 1.0, 128: 2.0}
_TOLERANCE = 1.05  # differences below are smaller than the model's error: take the simpler schedule
_BLOCKS_OF_TOKENS = (16, 32, 64, 128, 256, 512)
_RUNNERS_UP = 4
_EQUAL = 5e-4  # shown as 0.0%


@dataclass(frozen=True)
class Product:
    """A kind of matrix of a model: ``uses`` matrices of this format and shape are multiplied by a
    token (of a mixture of experts, those of as many as are chosen), each by a ``share`` of the
    tokens of a step."""

    format: Format
    n: int
    k: int
    uses: int
    share: float = 1.0

    @property
    def key(self) -> tuple[str, int, int]:
        return self.format.name, self.n, self.k


def isa_candidates(machine: Machine) -> tuple[Isa, ...]:
    """The ISA rows that the machine can run, the fastest first."""
    return tuple(isa for isa in reversed(ISAS.values()) if machine.has(isa.features))


def products(graph: Graph) -> list[Product]:
    """The distinct matrices that the kernels of a fused graph read, in the order of use.

    A matrix that only an Embedding reads has no uses, but needs a layout all the same.
    """
    uses: dict[tuple[str, int, int], int] = {}
    shares: dict[tuple[str, int, int], float] = {}
    for node in graph.nodes:
        each, share = 1, 1.0
        if node.op == "MatMulGroup":
            names: Sequence[str] = group_parts(node).weights
        elif node.op == "RoutedExperts":  # a token is multiplied by the chosen experts alone
            names = [some[0] for some in expert_parts(node).weights.values()]
            each, share = node.attrs["k"], node.attrs["k"] / node.attrs["n_experts"]
        elif node.op == "Embedding":
            names, each = node.inputs[1:2], 0
        else:
            continue
        for name in names:
            n, k = constant_shape(graph.constants[name])
            key = graph.values[name].dtype, n, k
            uses[key] = uses.get(key, 0) + each
            shares[key] = max(shares.get(key, 0.0), share)
    return [
        Product(by_name(name), n, k, count, shares[name, n, k])
        for (name, n, k), count in uses.items()
    ]


def activations_for(format: Format, asked: str) -> str:
    """The arithmetic of a matmul: 'auto' is int8, and f32 for formats of floats, whose codes are no
    integers to multiply."""
    if asked not in ACTIVATIONS:
        raise UsageError(f"activations '{asked}' are not one of {', '.join(ACTIVATIONS)}")
    if not format.integer and asked != "bf16":
        return "f32"
    return "int8" if asked == "auto" else asked


def plan_model(
    graph: Graph,
    *,
    isa: Isa,
    machine: Machine,
    activations: str = "auto",
    kv: str = "f16",
    threads: int = 1,
    max_tokens: int | None = None,
    max_seq: int = 2048,
    max_batch: int = 1,
    measured: Measured | None = None,
    layouts: Mapping[tuple[str, int, int], Layout] | None = None,
) -> Plan:
    """The plan of a fused graph for ``threads`` threads of a machine.

    ``max_tokens`` bounds the tokens of a step (default: as many as pay, see :func:`step_tokens`);
    it is never below ``max_batch``, nor above the greater of that and ``max_seq``. ``measured``
    times replace predictions, and correct those of the same product. ``layouts`` fixes how weights
    (format, N, K) lie, see :func:`shared_layouts`. Raises UsageError for unknown
    activations, Unsupported if no kernel of the ISA can multiply a format.
    """
    if min(threads, max_batch, max_tokens or 1) < 1:
        raise UsageError("threads, max_batch and max_tokens are at least 1")
    search = _Search(products(graph), isa, machine, activations, threads, measured or {})
    search.layouts = layouts or {}
    chosen = search.choose()
    wanted = max_tokens or search.step_tokens(chosen)
    return Plan(
        target=machine.name,
        isa=isa.name,
        activations=activations,
        kv=kv,
        threads_hint=threads,
        max_tokens=max(max_batch, min(wanted, max_seq)),
        kernels=tuple(
            search.choice(p, chosen[p.key], m) for p in search.products for m in BUCKETS
        ),
    )


LAYOUT_LOSS = 0.05
"""A variant keeps the layout of another unless that makes it slower by more than this."""


def shared_layouts(
    graph: Graph, plan: Plan, isa: Isa, machine: Machine, activations: str, threads: int
) -> dict[tuple[str, int, int], tuple[Layout, float]]:
    """The layouts of ``plan`` that another target can use too, by (format, N, K), and what each
    costs it: predicted time of a token with this layout over that with its own, less one."""
    wanted = products(graph)
    layouts = {p.key: spec_for(plan, *p.key).layout for p in wanted}
    return shared_product_layouts(wanted, layouts, isa, machine, activations, threads)


def shared_product_layouts(
    products: Sequence[Product],
    layouts: Mapping[tuple[str, int, int], Layout],
    isa: Isa,
    machine: Machine,
    activations: str,
    threads: int,
) -> dict[tuple[str, int, int], tuple[Layout, float]]:
    """:func:`shared_layouts` of matrices that lie in ``layouts``."""
    own = _Search(list(products), isa, machine, activations, threads, {})
    other = _Search(own.products, isa, machine, activations, threads, {})
    other.layouts = layouts
    best, bound = own.choose(), other.choose()
    losses = {
        p.key: own.us(bound[p.key], p, 1) / own.us(best[p.key], p, 1) - 1 for p in own.products
    }
    return {
        key: (other.layouts[key], loss) for key, loss in losses.items() if loss <= LAYOUT_LOSS
    }


def plan_products(
    products: Sequence[Product],
    isa: Isa,
    machine: Machine,
    activations: str,
    threads: int,
    measured: Measured | None = None,
    layouts: Mapping[tuple[str, int, int], Layout] | None = None,
) -> tuple[dict[tuple[str, int, int], MatmulSpec], list[KernelChoice]]:
    """The kernels of matrices by (format, N, K), and the entries of a plan that say why.

    ``layouts`` are those that the matrices of some keys already have.
    """
    search = _Search(list(products), isa, machine, activations, threads, measured or {})
    search.layouts = layouts or {}
    chosen = search.choose()
    return chosen, [search.choice(p, chosen[p.key], m) for p in products for m in BUCKETS]


def token_times(
    products: Sequence[Product],
    isa: Isa,
    machine: Machine,
    activations: str,
    threads: int,
    measured: Measured | None = None,
) -> dict[tuple[str, int, int], float]:
    """Microseconds that one token's product takes, by (format, N, K), in a model of these products
    alone: measured where ``measured`` knows the kernel, else predicted."""
    times = call_times(products, (1,), isa, machine, activations, threads, measured)
    return {p.key: times[p.key, 1] for p in products}


def call_times(
    products: Sequence[Product],
    rows: Iterable[int],
    isa: Isa,
    machine: Machine,
    activations: str,
    threads: int,
    measured: Measured | None = None,
) -> dict[tuple[tuple[str, int, int], int], float]:
    """As :func:`token_times`, for products of some numbers of ``rows``: by (format, N, K) and
    rows."""
    search = _Search(list(products), isa, machine, activations, threads, measured or {})
    chosen = search.choose()
    return {(p.key, m): search.us(chosen[p.key], p, m) for m in set(rows) for p in products}


def tuning_candidates(
    products: Sequence[Product],
    isa: Isa,
    machine: Machine,
    activations: str,
    threads: int,
    top: int | None,
) -> dict[tuple[str, int, int], list[MatmulSpec]]:
    """The kernels of every product that are worth measuring, the planner's choice first.

    Kernels that must share their register tiles have the same lists of tiles, each with its best
    layout: so the times that are measured can be compared as whole models. What is left of ``top``
    (None: the whole space) goes to other layouts and prefetch distances of the choice.
    """
    search = _Search(list(products), isa, machine, activations, threads, {})
    if top is None:
        return {
            p.key: list(dict.fromkeys((
                search.best(p, search.tiles(group)[0]),
                *space(p.format, p.k, isa, search.arithmetic[p.key], machine),
            )))
            for group in search.groups()
            for p in group
        }  # fmt: skip
    found: dict[tuple[str, int, int], list[MatmulSpec]] = {}
    for group in search.groups():
        ranked = search.tiles(group)
        others = top // 4  # places for other layouts and distances
        for p in group:
            lists = [search.best(p, tiles) for tiles in ranked[: max(1, top - others)]]
            first = lists[0]
            variants = [
                spec
                for spec in space(p.format, p.k, isa, search.arithmetic[p.key], machine)
                if spec.tiles == first.tiles and spec not in lists and spec.prefetch
            ]
            variants.sort(
                key=lambda s, p=p: sum(search.us(s, p, m) * _WEIGHTS[m] / m for m in BUCKETS)  # type: ignore[misc]
            )
            found[p.key] = (lists + variants)[:top]
    return found


class _Search:
    """The schedules of one model and what they take."""

    def __init__(
        self,
        products: list[Product],
        isa: Isa,
        machine: Machine,
        activations: str,
        threads: int,
        measured: Measured,
    ) -> None:
        self.products = products
        self.isa = isa
        self.machine = machine
        self.threads = threads
        self.measured = measured
        self.layouts: Mapping[tuple[str, int, int], Layout] = {}
        self.arithmetic = {p.key: activations_for(p.format, activations) for p in products}
        # the weights that pass through the caches in one step
        self.working_set = sum(max(1, p.uses) * packed_bytes(p) for p in products)
        self.correction = self._corrections()
        self.known = self._measured_everywhere()
        self._predictions: dict[tuple[MatmulSpec, int, int, int], Prediction] = {}
        self._best: dict[tuple[tuple[str, int, int], tuple[int, ...]], MatmulSpec] = {}

    def _corrections(self) -> dict[tuple[str, int, int, int], float]:
        """Median of measured over predicted time of each product and number of tokens."""
        ratios: dict[tuple[str, int, int, int], list[float]] = {}
        for (spec, n, k, m), us in self.measured.items():
            if math.isinf(us):
                continue
            predicted = predict(spec, self.situation(n, k, m)).us
            ratios.setdefault((spec.format.name, n, k, m), []).append(us / predicted)
        return {key: statistics.median(values) for key, values in ratios.items()}

    def _measured_everywhere(self) -> dict[tuple[str, int, int], list[MatmulSpec]]:
        """The kernels of each product that were measured for all numbers of tokens: a mere
        prediction does not stand against them."""
        times: dict[tuple[MatmulSpec, int, int], set[int]] = {}
        for (spec, n, k, m), us in self.measured.items():
            if not math.isinf(us):
                times.setdefault((spec, n, k), set()).add(m)
        found: dict[tuple[str, int, int], list[MatmulSpec]] = {p.key: [] for p in self.products}
        for (spec, n, k), tokens in times.items():
            key = spec.format.name, n, k
            fits = spec.isa == self.isa and spec.activations == self.arithmetic.get(key)
            if fits and tokens >= set(BUCKETS):
                found[key].append(spec)
        return found

    def situation(self, n: int, k: int, m: int) -> Situation:
        """A product of ``m`` tokens in this model."""
        return Situation(n, k, m, self.threads, self.machine, self.working_set)

    def prediction(self, spec: MatmulSpec, p: Product, m: int) -> Prediction:
        key = (spec, p.n, p.k, m)
        if key not in self._predictions:
            self._predictions[key] = predict(spec, self.situation(p.n, p.k, m))
        return self._predictions[key]

    def us(self, spec: MatmulSpec, p: Product, m: int) -> float:
        """Time of a call: measured, or predicted and corrected."""
        known = self.measured.get((spec, p.n, p.k, m))
        if known is not None:
            return known
        return self.prediction(spec, p, m).us * self.correction.get((*p.key, m), 1.0)

    def best(self, p: Product, tiles: tuple[int, ...]) -> MatmulSpec:
        """The kernel with these register tiles that is best for all numbers of tokens together."""
        key = p.key, tiles
        if key not in self._best:
            arithmetic = self.arithmetic[p.key]
            specs = [spec for spec in self.known[p.key] if spec.tiles == tiles]
            if not specs:
                specs = schedules(p.format, p.k, self.isa, arithmetic, self.machine, tiles)
            layout = self.layouts.get(p.key)
            if layout is not None:
                # whichever it is: every instruction set reads every layout
                specs = list(dict.fromkeys(replace(spec, layout=layout) for spec in specs))
            self._best[key] = _simplest(specs, lambda spec, m: self.us(spec, p, m))
        return self._best[key]

    def choose(self) -> dict[tuple[str, int, int], MatmulSpec]:
        """The kernel of every product."""
        chosen: dict[tuple[str, int, int], MatmulSpec] = {}
        for group in self.groups():
            lists, step = self._lists(group)
            tiles = _simplest(lists, step)
            chosen.update({p.key: self.best(p, tiles) for p in group})
        return chosen

    def _lists(
        self, group: list[Product]
    ) -> tuple[list[tuple[int, ...]], Callable[[tuple[int, ...], int], float]]:
        """The lists of register tiles that a group can have, and the time of a step with one."""
        sizes = set.intersection(
            *(set(token_tiles(p.format, self.isa, self.arithmetic[p.key])) for p in group)
        )
        lists = tile_lists(sizes)
        measured = [{spec.tiles for spec in self.known[p.key]} for p in group]
        if common := set.intersection(*measured):
            lists = [tiles for tiles in lists if tiles in common] or lists

        def step(tiles: tuple[int, ...], m: int) -> float:
            return sum(max(1, p.uses) * self.us(self.best(p, tiles), p, m) for p in group)

        return lists, step

    def tiles(self, group: list[Product]) -> list[tuple[int, ...]]:
        """The lists of register tiles of a group, the planner's choice first, then the fastest."""
        lists, step = self._lists(group)
        first = _simplest(lists, step)
        scores = dict(zip(lists, _scores(lists, step), strict=True))
        return [first, *(t for t in sorted(lists, key=lambda t: scores[t]) if t != first)]

    def groups(self) -> list[list[Product]]:
        """Products whose kernels must have the same register tiles."""
        groups: dict[str, list[Product]] = {}
        for p in self.products:
            arithmetic = self.arithmetic[p.key]
            name = "int8" if arithmetic in INTEGER_ACTIVATIONS else p.format.name
            groups.setdefault(name, []).append(p)
        return list(groups.values())

    def step_tokens(self, chosen: Mapping[tuple[str, int, int], MatmulSpec]) -> int:
        """Tokens of a prefill step: the fewest whose time for one token is within the tolerance of
        the best, among those whose activation rows stay in level 2. Of a mixture of experts, whose
        matrices are read for few rows each, the rows of an expert need to."""
        used = [(p, chosen[p.key]) for p in self.products if p.uses]
        if not used:
            return _BLOCKS_OF_TOKENS[0]
        least = min(p.share for p, _ in used)
        row = max(p.share * activation_bytes(spec, p.k) for p, spec in used if p.share == least)
        fitting = [m for m in _BLOCKS_OF_TOKENS if m * row <= 0.75 * self.machine.l2_bytes]

        def us(p: Product, spec: MatmulSpec, m: int) -> float:
            rows = max(1, round(m * p.share))
            return m * p.uses / rows * self.prediction(spec, p, rows).us

        each = {
            m: sum(us(p, spec, m) for p, spec in used) / m
            for m in fitting or _BLOCKS_OF_TOKENS[:1]
        }
        best = min(each.values())
        return min(m for m, us in each.items() if us <= best * _TOLERANCE)

    def choice(self, p: Product, spec: MatmulSpec, m: int) -> KernelChoice:
        """The entry of the plan, with what else was considered."""
        prediction = self.prediction(spec, p, m)
        others = {
            other: self.us(other, p, m)
            for other in schedules(p.format, p.k, self.isa, spec.activations, self.machine)
            if other != spec
        }
        others = {other: us for other, us in others.items() if math.isfinite(us)}
        ranked = sorted(others, key=lambda other: others[other])[:_RUNNERS_UP]
        return KernelChoice(
            name=spec.name,
            op=_OP,
            format=p.format.name,
            n=p.n,
            k=p.k,
            m_bucket=m,
            schedule=schedule_of(spec),
            predicted_us=prediction.us,
            predicted_bytes=prediction.bytes,
            predicted_instructions=prediction.instructions,
            bound=prediction.bound,
            runners_up=tuple(
                Alternative(
                    schedule_of(o), others[o], self.prediction(o, p, m).bound,
                    self._why_not(o, spec, p, m),
                )
                for o in ranked
            ),
            reason=_reason(spec, prediction, m, self.us(spec, p, m), others),
            measured_us=self.measured.get((spec, p.n, p.k, m), 0.0),
            roofline_us=prediction.roofline_us,
            resources=tuple(resources(spec, self.situation(p.n, p.k, m))),
        )

    def _why_not(self, other: MatmulSpec, spec: MatmulSpec, p: Product, m: int) -> str:
        """Why ``other`` was not taken in place of ``spec``, in words: what it needs more of; or, if
        it is faster for ``m`` tokens, what it would cost elsewhere."""
        known = self.known[p.key]
        if known and other not in known:
            return "it was not measured, and others were"
        behind = {b: self.us(other, p, b) / self.us(spec, p, b) - 1 for b in BUCKETS}
        if abs(behind[m]) < _EQUAL and max(behind.values()) < _EQUAL:
            return "not faster; the simpler one is taken"
        if behind[m] > 0:
            own, its = self.prediction(spec, p, m).limits, self.prediction(other, p, m).limits
            more = {name: us - own.get(name, 0.0) for name, us in its.items()}
            name = max(more, key=lambda name: more[name])
            lost = f"{behind[m]:.1%} slower"
            if more[name] > 1e-3 * self.us(spec, p, m):
                lost += f": {name} takes {its[name]:.1f} us instead of {own.get(name, 0.0):.1f}"
            return lost
        score, its_score = (
            sum(_WEIGHTS[b] * self.us(s, p, b) / self.us(spec, p, b) for b in BUCKETS)
            for s in (spec, other)
        )
        worst = max(BUCKETS, key=lambda b: behind[b])
        if its_score >= score:
            bound = self.prediction(other, p, worst).bound
            return (
                f"{-behind[m]:.1%} faster here, {behind[worst]:.1%} slower for {worst} tokens "
                f"(bound by {bound})"
            )
        if other.tiles != spec.tiles and spec.integer:
            return "faster here; all int8 matrices of a model have the same register tiles"
        return "faster by less than the model's error; the simpler one is taken"


def packed_bytes(p: Product) -> int:
    """Bytes of a product's packed weight."""
    return weight_bytes(p.format, (p.n, p.k), Layout(16, 1))


def _simplest(options: Sequence[Any], us: Callable[[Any, int], float]) -> Any:
    """The first option whose time is within the tolerance of the best, all buckets together.

    Options come with the simplest first. A bucket counts by its weight, relative to the option that
    is best there.
    """
    scores = _scores(options, us)
    limit = min(scores) * (1 + (_TOLERANCE - 1) / 2)
    return options[next(i for i, score in enumerate(scores) if score <= limit)]


def _scores(options: Sequence[Any], us: Callable[[Any, int], float]) -> list[float]:
    """Weighted sums over the buckets of each option's time relative to the best there."""
    times = [[us(option, m) for m in BUCKETS] for option in options]
    best = [min(column) for column in zip(*times, strict=True)]
    if not all(map(math.isfinite, best)):
        raise QigenError("every kernel of a matrix crashed or was wrong when it was measured; "
                         "qigen tune --again measures them anew, --tune off trusts them")
    return [
        sum(_WEIGHTS[m] * t / b for m, t, b in zip(BUCKETS, row, best, strict=True))
        for row in times
    ]


def _reason(
    spec: MatmulSpec,
    prediction: Prediction,
    m: int,
    us: float,
    others: Mapping[MatmulSpec, float],
) -> str:
    """One line that says what binds the kernel and how it compares."""
    top = sorted(prediction.limits.items(), key=lambda item: -item[1])[:3]
    parts = [", ".join(f"{name} {value:.1f} us" for name, value in top)]
    parts.append(
        "bytes from "
        + ", ".join(f"{level} {b / 1e6:.3g} MB" for level, b in prediction.traffic.items() if b)
    )
    tokens = next(t for t in spec.tiles if t <= m)
    rows = spec.row_tile if tokens > 1 else spec.streams
    parts.append(
        f"tile of {tokens} tokens x {16 * rows} rows in {registers(spec, tokens, rows)} "
        f"of {spec.isa.registers} registers"
    )
    best = min(others.values(), default=us)
    if best < us:
        parts.append(f"{us / best - 1:.0%} behind what would be best for {m} alone")
    return "; ".join(parts)


def schedule_of(spec: MatmulSpec) -> dict[str, ScheduleValue]:
    """The schedule of a kernel as a plan stores it; ``tiles`` are joined by commas."""
    return {
        "activations": spec.activations,
        "rows": spec.layout.rows,
        "blocks": spec.layout.blocks,
        "tiles": ",".join(map(str, spec.tiles)),
        "prefetch": spec.prefetch,
        "streams": spec.streams,
    }


def spec_for(plan: Plan, format: str, n: int, k: int) -> MatmulSpec:
    """The kernel that a plan gives to a matrix; BadInput if it has none, or an impossible one."""
    choice = plan.find(_OP, format, n, k, BUCKETS[0])
    s = choice.schedule
    try:
        tiles = tuple(int(t) for t in str(s["tiles"]).split(","))
        layout = Layout(int(s["rows"]), int(s["blocks"]))
        activations = str(s["activations"])
        prefetch, streams = int(s["prefetch"]), int(s["streams"])
    except (KeyError, ValueError) as error:
        raise BadInput(f"the schedule has no usable {error}", f"kernel {choice.name}") from None
    ordered = sorted(set(tiles), reverse=True)
    if list(tiles) != ordered or tiles[-1] != 1 or activations not in ACTIVATIONS[1:]:
        raise BadInput(
            f"tiles must descend to 1, and activations be one of {', '.join(ACTIVATIONS[1:])}",
            f"kernel {choice.name}",
        )
    return MatmulSpec(
        by_name(format), layout, isa_by_name(plan.isa), activations, tiles, prefetch, streams
    )


def explain(plan: Plan) -> list[dict[str, Any]]:
    """The plan as rows of a table: one a product and number of tokens."""
    return [
        {
            "kernel": c.name,
            "format": c.format,
            "n": c.n,
            "k": c.k,
            "m": c.m_bucket,
            "tiles": c.schedule["tiles"],
            "blocks": c.schedule["blocks"],
            "us": c.predicted_us,
            "measured_us": c.measured_us,
            "gb_s": c.predicted_bytes / c.predicted_us / 1e3,
            "gops": 2 * c.n * c.k * c.m_bucket / c.predicted_us / 1e3,
            "roofline_us": c.roofline_us,
            "fraction_of_roofline": c.roofline_us / (c.measured_us or c.predicted_us),
            "instructions": c.predicted_instructions,
            "bound": c.bound,
            "runners_up": _shown(c.runners_up),
            "reason": c.reason,
        }
        for c in plan.kernels
    ]


def _shown(runners_up: Iterable[Alternative]) -> str:
    return "; ".join(
        f"tiles {a.schedule['tiles']} blocks {a.schedule['blocks']} prefetch "
        f"{a.schedule['prefetch']}: {a.predicted_us:.1f} us"
        for a in runners_up
    )
