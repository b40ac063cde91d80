"""ONNX's own node tests: none may come out wrong."""

from __future__ import annotations

import pytest

from tests.conformance.runner import Outcome, cases, run

LEAST_PASSED = 1200
"""Of all cases; docs/onnx.md has the number."""


def wrong(outcomes: list[Outcome]) -> list[str]:
    return [f"{o.name}: {o.message}" for o in outcomes if o.status == "wrong"]


def test_a_sample_of_the_node_tests() -> None:
    """Every 60th case."""
    outcomes = run(cases()[::60], jobs=1)
    assert not wrong(outcomes)
    assert sum(o.status == "passed" for o in outcomes) >= 0.7 * len(outcomes)


@pytest.mark.slow
def test_all_node_tests() -> None:
    outcomes = run(cases(), jobs=2)
    assert not wrong(outcomes)
    passed = sum(o.status == "passed" for o in outcomes)
    print(f"{passed} of {len(outcomes)} pass, the others are refused")
    assert passed >= LEAST_PASSED
