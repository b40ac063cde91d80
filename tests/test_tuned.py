"""The number of threads that an artifact remembers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import qigen
from qigen import tune, tuned


def test_load_starts_the_tuned_threads(stories_artifact: Any, tmp_path: Path) -> None:
    """Unless it is told a number: fewer than the cores, and more than the cores are never taken."""
    path = tmp_path / "a.qgn"
    shutil.copytree(stories_artifact(), path)
    cores = qigen.load(path).info["threads"]
    tuned.write_tuned(path, 1, 64)
    assert qigen.load(path).info["threads"] == 1
    assert qigen.load(path, threads=2).info["threads"] == 2
    tuned.write_tuned(path, cores + 1, 64)
    assert qigen.load(path).info["threads"] == cores


def test_tuned_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "usable_cores", lambda: 8)
    tuned.write_tuned(tmp_path, 6, 64)
    assert tuned.tuned_threads(tmp_path) == 6
    monkeypatch.setattr(tuned, "processor", lambda: "another")
    assert tuned.tuned_threads(tmp_path) == 0
    monkeypatch.undo()
    monkeypatch.setattr(tuned, "usable_cores", lambda: 4)  # cores unplugged, or a container's limit
    assert tuned.tuned_threads(tmp_path) == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"threads": "x"}', '{"threads": null, "cores": 1}', "\x80"]
)
def test_a_damaged_file_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / tuned.TUNED).write_bytes(text.encode("latin-1"))
    assert tuned.tuned_threads(tmp_path) == 0
    assert tuned.tuned_threads(tmp_path / "missing") == 0


def test_an_artifact_that_cannot_be_written(tmp_path: Path) -> None:
    note = tune.remember(tmp_path / "missing", 3, 64)
    assert "--threads 3" in note
    assert tune.remember(tmp_path, 1, 64) == ""
    assert json.loads((tmp_path / tuned.TUNED).read_text())["block"] == 64
