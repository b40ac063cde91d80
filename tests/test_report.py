"""The one-command report of the kernels: all parts from one run, killed runs go on."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qigen import toolchain
from qigen.errors import ToolchainError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")  # as for a script
        spec.loader.exec_module(loaded)
        yield loaded


def row(point: Any) -> dict[str, Any]:
    """As a measurement gives it."""
    p = point.product
    return {
        "weights": p.format.name, "bits": p.format.bits_per_weight, "n": p.n, "k": p.k,
        "m": point.m, "threads": point.threads, "cached": point.cached, "us": 2.0, "spread": 0.1,
        "gb_s": 3.0, "stream_read_gb_s": 6.0, "fraction_of_stream": 0.5, "gops": 4.0,
        "fraction_of_roofline": 0.6, "predicted_us": 1.0,
        "peers": {name: {"us": 4.0, "ratio": 2.0, "version": "1.2.3", "setting": "best"}
                  for name in point.peers},
    }  # fmt: skip


def options(output: Path, **more: object) -> argparse.Namespace:
    known = {"output": output, "minutes": 1, "vs": "", "shape": "64x128", "threads": 2,
             "repeat": 1, "isa": "scalar", "again": False, "shapes": "64x128",
             "rows": "q4_0,f16", "compile": False, **more}  # fmt: skip
    return argparse.Namespace(**known)


def test_points_are_those_of_the_issue(module: ModuleType) -> None:
    found = module.points("4096x4096", 2, ["a"], 32 << 20)
    decode = {p.product.format.name: p for p in found if p.m == 1 and p.threads == 2}
    assert {"q4_0", "s4g128", "u2g128", "q8_0"} <= set(decode) and decode["q4_0"].m == 1
    assert {p.m for p in found if p.peers} == {1, 4, 16, 128, 512}
    assert len({json.dumps(module.identity(p)) for p in found}) == len(found)
    cached = [p for p in found if p.cached]
    assert {p.threads for p in cached} == {1, 2}
    assert all(p.product.n * p.product.k <= 16 << 20 for p in cached)


def test_a_report_that_is_killed_goes_on(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, asked, left = tmp_path / "kernels.md", [], [3]
    monkeypatch.setattr(module, "check_peers", lambda names: None)

    def some(points: Any, **_: object) -> Iterator[dict[str, Any]]:
        for point in points:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            asked.append(json.dumps(module.identity(point)))
            yield row(point)

    monkeypatch.setattr(module, "bench_points", some)
    monkeypatch.setattr(module, "every_row", lambda *_: [])
    with pytest.raises(KeyboardInterrupt):
        module.report(options(output, vs="openvino"))
    assert "Not measured" in output.read_text() and output.read_text().count("| q4_0 |") == 2
    lines = output.with_suffix(".jsonl")
    with lines.open("a") as file:
        file.write('{"point": ["cut sh')
    left[0] = 100
    rows = module.report(options(output, vs="openvino"))
    assert len(asked) == len(set(asked)) == len(rows) > 3
    text = output.read_text()
    assert "Not measured" not in text and "4.0 (2.00)" in text and "openvino 1.2.3" in text
    assert [line for line in text.splitlines() if line.startswith("## ")][:3] == [
        f"## {title}" for title, *_ in module.SECTIONS
    ]
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(tables)) <= 2, "every line has the columns of its head"
    assert len(json.loads(output.with_suffix(".json").read_text())["kernels"]) == len(rows)
    assert not lines.exists()
    if importlib.util.find_spec("matplotlib"):
        for name in set(module.PLOTS) - {"weights"}:  # the picture of every row
            assert (tmp_path / "kernels" / f"{name}.png").exists() and f"{name}.png" in text


def test_the_time_is_up(module: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "bench_points", lambda points, **_: map(row, points))
    monkeypatch.setattr(module, "PEERS", {})
    monkeypatch.setattr(module, "every_row", lambda *_: [])
    rows = module.report(options(tmp_path / "kernels.md", minutes=0))
    assert len(rows) == 1 and "Not measured" in (tmp_path / "kernels.md").read_text()


def test_measured(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One point for real."""
    try:
        toolchain.find_compiler()
    except ToolchainError:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("QIGEN_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(module, "PEERS", {})
    rows = module.report(options(tmp_path / "kernels.md", minutes=0))
    assert rows[0]["us"] > 0 and rows[0]["weights"] == "q4_0"
    assert (tmp_path / "kernels.md").exists()


def test_every_row(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of formats, for real; what is in the file is not measured again."""
    try:
        toolchain.find_compiler()
    except ToolchainError:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(module.sweep, "names", lambda: ["q4_0", "f16"])
    machine, isa = module.native_machine("scalar")
    file, end = tmp_path / "rows.jsonl", time.monotonic() + 600
    first = list(module.every_row(file, isa, machine, ["64x128"], ["q4_0"], end))
    assert {row["weights"] for row in first} == {"q4_0"}
    assert {row["m"] for row in first} == {1, 4, 16, 128}
    assert {row["threads"] for row in first} == {1, machine.cores}
    assert all(row["us"] > 0 and row["gb_s"] > 0 and row["predicted_us"] > 0 for row in first)
    rows = list(module.every_row(file, isa, machine, ["64x128"], [], end))
    assert rows[: len(first)] == first and {row["weights"] for row in rows} == {"q4_0", "f16"}
    text = module.page([], [], machine, [], rows)
    assert "### 64x128, 1 thread" in text and text.count("| q4_0 |") == len(first) // 4
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
