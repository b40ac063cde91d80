"""The exact solver: one option for every item, least value, within limits.

That is the multiple-choice knapsack problem with one or two constraints. It is solved to proven
optimality, in whole numbers, by dynamic programming over partial sums with Lagrangian bounds:

1. The multipliers of the limits that give the greatest lower bound are found (the dual function is
   concave; its slope's sign is bisected, for a second limit inside of a golden-section search).
2. An option whose reduced value alone lifts the bound to the best known solution can be in no
   better one and is left out. That leaves most items without a choice.
3. The other items are added one by one. Of the partial sums those go that a bound, a limit, or a
   sum that is no worse in everything rules out. Every sum is also completed the cheapest ways, so
   that the best known solution gets better on the way.

The bounds only decide how much work there is, never what is found: nothing is cut that could still
be better (Kellerer, Pferschy, Pisinger, *Knapsack Problems*, 2004, chapter 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MOST_VALUE = 1 << 42
"""Sums of values stay below, so that bounds in float64 are off by far less than one."""

_SLACK = 0.5  # a better solution is better by 1; what rounding does to a bound is far less


class Infeasible(Exception):
    """No choice keeps the limits. ``least`` are the least sums of each cost alone."""

    def __init__(self, least: Sequence[int]) -> None:
        super().__init__(f"the least costs are {list(least)}")
        self.least = list(least)


@dataclass(frozen=True)
class Item:
    """Options of one item: ``values`` int64 [n], not negative, and ``costs`` int64 [n, limits]."""

    values: Ints
    costs: Ints


def allocate(items: Sequence[Item], limits: Sequence[int]) -> list[int]:
    """The option of every item that makes the sum of values least, sums of costs within ``limits``.

    Of equally good solutions any is returned. Raises Infeasible if there is none, ValueError for
    more than two limits and for values too large to be added up.
    """
    bounds = np.asarray(limits, np.int64)
    if not 1 <= len(bounds) <= 2:
        raise ValueError("one or two limits")
    if sum(int(item.values.max()) for item in items) >= MOST_VALUE:
        raise ValueError("the values are too large")
    least = np.sum([item.costs.min(axis=0) for item in items], axis=0)
    if (least > bounds).any():
        raise Infeasible(least.tolist())
    search = _Search(items, bounds)
    return search.run()


class _Search:
    def __init__(self, items: Sequence[Item], limits: Ints) -> None:
        self.items, self.limits = items, limits
        self.widest = max(len(item.values) for item in items)
        # dense tables, for the bounds; what is not there costs more than anything
        self.values = np.full((len(items), self.widest), 2.0**62)
        self.costs = np.zeros((len(items), self.widest, len(limits)))
        for i, item in enumerate(items):
            self.values[i, : len(item.values)] = item.values
            self.costs[i, : len(item.values)] = item.costs
        self.best: list[int] | None = None
        self.best_value = 1 << 60

    # -- bounds ------------------------------------------------------------------------------------

    def reduced(self, multipliers: Floats) -> Floats:
        """value + multipliers . cost of every option."""
        result: Floats = self.values + self.costs @ multipliers
        return result

    def bound(self, multipliers: Floats) -> float:
        """What no solution is below."""
        return float(self.reduced(multipliers).min(axis=1).sum() - multipliers @ self.limits)

    def excess(self, multipliers: Floats, of: int) -> float:
        """Sum of a cost of the options that the multipliers prefer, over its limit."""
        chosen = self.reduced(multipliers).argmin(axis=1)
        total = self.costs[np.arange(len(chosen)), chosen, of].sum()
        return float(total - self.limits[of])

    def _bisect(self, multipliers: Floats, of: int) -> Floats:
        """The multipliers with that of one limit such that the limit is just kept."""
        found: Floats = multipliers.copy()
        found[of] = 0.0
        if self.excess(found, of) <= 0:
            return found
        low = 0.0
        found[of] = max(1e-9, float(self.values[self.values < 2.0**61].max()))
        found[of] /= max(1.0, float(self.costs[..., of].max()))
        for _ in range(60):
            if self.excess(found, of) <= 0:
                break
            low, found[of] = float(found[of]), 4 * found[of]
        high = float(found[of])
        for _ in range(50):
            found[of] = (low + high) / 2
            if self.excess(found, of) <= 0:
                high = found[of]
            else:
                low = found[of]
        found[of] = high
        return found

    def multipliers(self) -> list[Floats]:
        """Good multipliers, the best first."""
        none = np.zeros(len(self.limits))
        ends = [self._bisect(none, of) for of in range(len(self.limits))]
        if len(self.limits) == 1:
            return ends
        most = self._bisect(none, 1)[1]
        low, high = 0.0, most
        ratio = (5**0.5 - 1) / 2

        def at(second: float) -> tuple[float, Floats]:
            found = self._bisect(np.array([0.0, second]), 0)
            return self.bound(found), found

        a, b = high - ratio * (high - low), low + ratio * (high - low)
        fa, fb = at(a), at(b)
        for _ in range(40):
            if fa[0] > fb[0]:
                high, b, fb = b, a, fa
                a = high - ratio * (high - low)
                fa = at(a)
            else:
                low, a, fa = a, b, fb
                b = low + ratio * (high - low)
                fb = at(b)
        found = [*ends, fa[1], fb[1], at(0.0)[1]]
        return sorted(found, key=self.bound, reverse=True)

    # -- known solutions ---------------------------------------------------------------------------

    def offer(self, choice: Sequence[int]) -> None:
        """Keep a choice if it is allowed and better than what is known."""
        cost = sum((item.costs[j] for item, j in zip(self.items, choice, strict=True)),
                   start=np.zeros(len(self.limits), np.int64))
        value = sum(int(item.values[j]) for item, j in zip(self.items, choice, strict=True))
        if (cost <= self.limits).all() and value < self.best_value:
            self.best, self.best_value = list(choice), value

    # -- the search --------------------------------------------------------------------------------

    def run(self) -> list[int]:
        multipliers = self.multipliers()
        for m in multipliers:
            self.offer(self.reduced(m).argmin(axis=1).tolist())
        for of in range(len(self.limits)):
            self.offer([int(item.costs[:, of].argmin()) for item in self.items])
        m = multipliers[0]
        root = self.bound(m)
        reduced = self.reduced(m)
        penalties = reduced - reduced.min(axis=1, keepdims=True)
        preferred = penalties.argmin(axis=1)
        options = [
            [j for j in range(len(item.values)) if root + penalties[i, j] < self.best_value - _SLACK
             or j == preferred[i]]
            for i, item in enumerate(self.items)
        ]
        order = sorted(range(len(self.items)), key=lambda i: -len(options[i]))
        fixed = [i for i in order if len(options[i]) == 1]
        free = [i for i in order if len(options[i]) > 1]
        self._add_up(free, fixed, options, penalties, preferred, root)
        if self.best is None:
            raise Infeasible(np.sum([i.costs.min(axis=0) for i in self.items], axis=0).tolist())
        return self.best

    def _add_up(self, free: list[int], fixed: list[int], options: list[list[int]],
                penalties: Floats, preferred: npt.NDArray[np.intp], root: float) -> None:
        """Partial sums over the free items, item by item."""
        start_cost = np.zeros(len(self.limits), np.int64)
        start_value = 0
        for i in fixed:
            start_cost = start_cost + self.items[i].costs[options[i][0]]
            start_value += int(self.items[i].values[options[i][0]])
        rest = _Rest(self.items, free, options, preferred)
        cost, value = start_cost[None], np.array([start_value], np.int64)
        over = np.zeros(1)
        trail: list[tuple[Ints, Ints]] = []  # of each item: (sum it came from, option)
        base = preferred.tolist()
        for i in fixed:
            base[i] = options[i][0]

        def complete(state: int, depth: int, tails: list[int]) -> None:
            choice = list(base)
            for t in range(depth - 1, -1, -1):
                origin, option = trail[t]
                choice[free[t]] = int(option[state])
                state = int(origin[state])
            for t, j in zip(range(depth, len(free)), tails, strict=True):
                choice[free[t]] = j
            self.offer(choice)

        for depth, i in enumerate(free):
            chosen = np.asarray(options[i], np.int64)
            n = len(chosen)
            item = self.items[i]
            origin = np.repeat(np.arange(len(value)), n)
            option = np.tile(chosen, len(value))
            cost = cost[origin] + item.costs[option]
            value = value[origin] + item.values[option]
            over = over[origin] + penalties[i, option]
            keep = (cost + rest.least_cost[depth + 1] <= self.limits).all(axis=1)
            keep &= root + over < self.best_value - _SLACK
            at = np.flatnonzero(keep)
            at = at[_undominated(cost[at], value[at])]
            cost, value, over = cost[at], value[at], over[at]
            trail.append((origin[at], option[at]))
            for tail_cost, tail_value, tails in rest.tails(depth + 1):
                fits = np.flatnonzero((cost + tail_cost <= self.limits).all(axis=1))
                if len(fits):
                    best = fits[value[fits].argmin()]
                    if value[best] + tail_value < self.best_value:
                        complete(int(best), depth + 1, tails)
            if not len(value):
                return
        if not free:
            complete(0, 0, [])


class _Rest:
    """Sums over the free items that are still to come."""

    def __init__(self, items: Sequence[Item], free: list[int], options: list[list[int]],
                 preferred: npt.NDArray[np.intp]) -> None:
        limits = items[0].costs.shape[1]
        self.least_cost = np.zeros((len(free) + 1, limits), np.int64)
        picks: list[list[int]] = [[] for _ in range(1 + limits)]
        for i in free:
            picks[0].append(int(preferred[i]))
            for c in range(limits):
                picks[1 + c].append(min(options[i], key=lambda j, i=i, c=c: (  # type: ignore[misc]
                    items[i].costs[j, c], items[i].values[j])))
        self._picks = picks
        self._cost = np.zeros((1 + limits, len(free) + 1, limits), np.int64)
        self._value = np.zeros((1 + limits, len(free) + 1), np.int64)
        for depth in range(len(free) - 1, -1, -1):
            item = items[free[depth]]
            allowed = item.costs[options[free[depth]]]
            self.least_cost[depth] = self.least_cost[depth + 1] + allowed.min(axis=0)
            for kind, pick in enumerate(picks):
                j = pick[depth]
                self._cost[kind, depth] = self._cost[kind, depth + 1] + item.costs[j]
                self._value[kind, depth] = self._value[kind, depth + 1] + item.values[j]

    def tails(self, depth: int) -> list[tuple[Ints, int, list[int]]]:
        """(cost, value, options) of some ways to choose for all items from ``depth`` on."""
        return [(self._cost[kind, depth], int(self._value[kind, depth]), pick[depth:])
                for kind, pick in enumerate(self._picks)]


def _undominated(cost: Ints, value: Ints) -> npt.NDArray[np.intp]:
    """Indices of sums that no other is at least as good as in every cost and in value.

    With two costs some dominated ones may be left: those that differ in both.
    """
    if cost.shape[1] == 1:
        order = np.lexsort((value, cost[:, 0]))
        best = np.minimum.accumulate(value[order])
        first = np.ones(len(order), bool)
        first[1:] = value[order][1:] < best[:-1]
        return order[first]
    for key in (0, 1):  # the same in one cost: the other and the value go down together
        order = np.lexsort((value, cost[:, 1 - key], cost[:, key]))
        keep = np.ones(len(order), bool)
        same = cost[order[1:], key] == cost[order[:-1], key]
        keep[1:] = ~same | (value[order[1:]] < value[order[:-1]])
        order = order[keep]
        if key == 0:
            index, cost, value = order, cost[order], value[order]
        else:
            index = index[order]
    return index
