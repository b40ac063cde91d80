"""The solver finds the best there is: against every combination, and against another solver."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from qigen.mix.allocate import MOST_VALUE, Infeasible, Item, allocate


def instance(seed, items, options, limits, tight):
    """Random items whose values fall as their costs rise, more or less, and limits within reach."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(items):
        n = int(rng.integers(1, options + 1))
        costs = np.sort(rng.integers(0, 60, (n, limits)), axis=0)
        values = np.sort(rng.integers(0, 1000, n))[::-1].copy()
        if seed % 3 == 0:
            rng.shuffle(values)
        made.append(Item(values.astype(np.int64), costs.astype(np.int64)))
    low = np.sum([i.costs.min(axis=0) for i in made], axis=0)
    high = np.sum([i.costs.max(axis=0) for i in made], axis=0)
    return made, (low + tight * (high - low)).astype(int).tolist()


def total(items, picks):
    return (sum(int(i.values[j]) for i, j in zip(items, picks, strict=True)),
            np.sum([i.costs[j] for i, j in zip(items, picks, strict=True)], axis=0))


def best_of_all(items, limits):
    """The least value by trying everything; None if nothing keeps the limits."""
    found = None
    for picks in itertools.product(*(range(len(i.values)) for i in items)):
        value, cost = total(items, picks)
        if (cost <= limits).all() and (found is None or value < found):
            found = value
    return found


@pytest.mark.parametrize("limits", [1, 2])
@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_better_than_what_is_found(seed, limits):
    items, bounds = instance(seed, 5, 4, limits, (seed % 7) / 8)
    best = best_of_all(items, bounds)
    if best is None:
        with pytest.raises(Infeasible):
            allocate(items, bounds)
        return
    value, cost = total(items, allocate(items, bounds))
    assert value == best and (cost <= bounds).all()


def model_like(seed, limits):
    """As a model has it: 30 layers of 7 matrices, costs that repeat, values that do not."""
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(30):
        for size in (331_776, 110_592, 110_592, 331_776, 884_736, 884_736, 884_736):
            bits = np.array([2.25, 2.5, 3.25, 3.5, 4.25, 4.5, 5.5, 6.5, 8.5])
            noise = np.exp(rng.normal(0, 0.2, len(bits)))
            values = (1e9 * rng.lognormal(0, 1) * noise * 4.0**-bits).astype(np.int64)
            us = bits * size / 8 / 35 * (1 + 0.2 * (bits > 3) * (bits < 4))
            costs = np.stack([size * bits / 8, 10 * us][:limits], axis=1).astype(np.int64)
            items.append(Item(values, costs))
    low = np.sum([i.costs.min(axis=0) for i in items], axis=0)
    high = np.sum([i.costs.max(axis=0) for i in items], axis=0)
    return items, (low + np.array([0.3, 0.25])[:limits] * (high - low)).astype(int).tolist()


@pytest.mark.parametrize("limits", [1, 2])
def test_a_model_against_another_exact_solver(limits):
    optimize = pytest.importorskip("scipy.optimize")
    items, bounds = model_like(1, limits)
    began = time.perf_counter()
    value, cost = total(items, allocate(items, bounds))
    assert time.perf_counter() - began < 20
    assert (cost <= bounds).all()
    sizes = [len(i.values) for i in items]
    one = np.zeros((len(items), sum(sizes)))
    at = 0
    for row, n in zip(one, sizes, strict=True):
        row[at : at + n] = 1
        at += n
    values = np.concatenate([i.values for i in items]).astype(float)
    costs = np.concatenate([i.costs for i in items]).T.astype(float)
    solved = optimize.milp(
        values / 1e6,
        constraints=[optimize.LinearConstraint(one, 1, 1),
                     optimize.LinearConstraint(costs / 1e6, ub=np.array(bounds) / 1e6)],
        bounds=optimize.Bounds(0, 1), integrality=np.ones(len(values)),
        options={"mip_rel_gap": 1e-7, "time_limit": 5},
    )  # fmt: skip
    # its bound holds at any time; ours is no worse than what it found
    assert solved.mip_dual_bound * 1e6 <= value * (1 + 1e-9)
    if solved.x is not None:
        assert value <= solved.fun * 1e6 * (1 + 1e-7)


def test_what_cannot_be_had_says_the_least():
    items = [Item(np.array([5, 1]), np.array([[2], [9]])), Item(np.array([3]), np.array([[4]]))]
    with pytest.raises(Infeasible) as caught:
        allocate(items, [5])
    assert caught.value.least == [6]
    assert allocate(items, [6]) == [0, 0]
    assert allocate(items, [13]) == [1, 0]


def test_limits_that_can_be_kept_one_by_one_but_not_together():
    item = Item(np.array([1, 1]), np.array([[0, 9], [9, 0]]))
    with pytest.raises(Infeasible):
        allocate([item], [5, 5])


def test_values_beyond_what_bounds_are_exact_for():
    with pytest.raises(ValueError, match="too large"):
        allocate([Item(np.array([MOST_VALUE]), np.array([[1]]))], [1])
    with pytest.raises(ValueError, match="limits"):
        allocate([Item(np.array([1]), np.array([[1, 1, 1]]))], [1, 1, 1])
