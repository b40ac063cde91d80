"""Threads on cores of different speed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import qigen


def test_threads_of_different_speed(
    stories_artifact: Any, stories_reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares of the work change nothing in the results; numbers that are none are refused."""
    tokens = np.array(stories_reference["prompt_ids"], np.int32)
    artifact = stories_artifact()

    def logits() -> Any:
        return qigen.load(artifact, threads=3).session().eval(tokens, all=True)

    even = logits()
    for speeds in ("1024,512,256", "1,1000,3", "7"):
        monkeypatch.setenv("QIGEN_CORE_SPEEDS", speeds)
        assert np.array_equal(logits(), even)
    for wrong in ("", "fast", "0,1", "1,,2"):
        monkeypatch.setenv("QIGEN_CORE_SPEEDS", wrong)
        with pytest.raises(qigen.UsageError, match="QIGEN_CORE_SPEEDS"):
            logits()
