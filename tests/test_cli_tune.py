"""The commands tune, bench-kernel and targets --calibrate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qigen import toolchain
from qigen.artifact import Artifact
from qigen.cli import main
from qigen.errors import ToolchainError
from qigen.tuning import Database

STORIES = Path(__file__).parent / "data" / "stories260k" / "stories260K-f32.gguf"
QUICK = ("--isa", "scalar", "--seconds", "0.01", "--threads", "1", "--jobs", "1")


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """``run(*arguments)`` -> (exit code, standard output, standard error)."""
    try:
        toolchain.find_compiler()
    except ToolchainError:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("QIGEN_DATA", str(tmp_path / "data"))

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_tune_a_shape(run: Any, tmp_path: Path) -> None:
    shape = ("tune", "--shape", "64x128", "--weights", "q4_0,q8_0", "--m", "1,2", "--top", "2")
    code, out, err = run(*shape, *QUICK)
    assert (code, err) == (0, "") and "q8_0" in out and "8 measurements" in out
    code, out, _ = run(*shape, *QUICK, "--json")
    result = json.loads(out)
    assert [(r["format"], r["m"]) for r in result["kernels"]] == [
        ("q4_0", 1), ("q4_0", 2), ("q8_0", 1), ("q8_0", 2),
    ]  # fmt: skip
    assert all(r["measured"] == 0 and r["best_us"] > 0 for r in result["kernels"])
    file = tmp_path / "shared.json"
    assert json.loads(run("tune", "export", file, "--json")[1])["entries"] == 8
    assert "0 of 8" in run("tune", "import", file)[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), "name one model"), (("a", "b"), "name one model"), (("export",), "one file"),
     (("a", "--shape", "1x1"), "name one model"), (("--shape", "x"), "NxK"),
     (("--shape", "32x32", "--m", "0"), "--m"), (("import", "x", "--shape", "1x1"), "one file")],
)  # fmt: skip
def test_wrong_usage(run: Any, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = run("tune", *arguments)
    assert code == 2 and words in err


def test_a_damaged_database_and_export(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "data" / "tuning.sqlite"
    file.parent.mkdir()
    file.write_bytes(b"no database" * 100)
    code, _, err = run("tune", "--shape", "32x32", *QUICK)
    assert code == 3 and "damaged" in err and str(file) in err
    file.unlink()
    (tmp_path / "x.json").write_text("{")
    code, _, err = run("tune", "import", tmp_path / "x.json")
    assert code == 3 and "no JSON" in err


def test_no_permission(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QIGEN_DATA", str(tmp_path / "file" / "data"))
    for arguments in (("tune", "--shape", "32x32", *QUICK), ("targets", "--calibrate")):
        code, _, err = run(*arguments)
        assert code == 1 and "QIGEN_DATA" in err


def test_compile_with_measurements(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured times are in the plan; a second compilation measures nothing and plans the same."""
    monkeypatch.setattr("qigen.tuning.measure._AT_LEAST", 1)
    monkeypatch.setattr("qigen.tuning.measure._AT_MOST", 1)
    made = []
    for name in ("a.qgn", "b.qgn"):
        code, _, err = run(
            "compile", STORIES, "-o", tmp_path / name, "--tune", "measure", "--isa", "scalar"
        )
        assert (code, err) == (0, "")
        made.append(Artifact(tmp_path / name))
    kernels = made[0].explain()
    assert kernels and all(k["measured_us"] > 0 for k in kernels)
    assert all(k["roofline_us"] > 0 for k in kernels)
    assert [k["name"] for k in made[1].explain()] == [k["name"] for k in kernels]
    with Database() as data:
        assert {e.m for e in data.entries()} == {1, 4, 16, 128}
    code, out, _ = run("tune", tmp_path / "a.qgn", "--isa", "scalar", "--json")
    result = json.loads(out)
    assert code == 0 and result["model"]["threads"] >= 1 and result["model"]["block"] >= 1
    assert sum(r["measured"] for r in result["kernels"]) == 0
    for name in ("a.qgn", "b.qgn"):  # both commands leave what was measured in the artifact
        assert json.loads((tmp_path / name / "tuned.json").read_text())["threads"] >= 1


def test_measuring_is_for_this_machine(run: Any, tmp_path: Path) -> None:
    code, _, err = run(
        "compile", STORIES, "-o", tmp_path / "x.qgn", "--tune", "measure", "--target", "znver4"
    )
    assert code == 2 and "this machine" in err


def test_bench_kernel(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qigen.bench_kernel.stream_read_gb_s", lambda threads: 10.0)
    arguments = ("bench-kernel", "--shape", "64x128", "--weights", "q4_0", "--m", "1,3",
                 "--threads", "1", "--isa", "scalar", "--repeat", "1", "--cached")  # fmt: skip
    code, out, err = run(*arguments, "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert [(r["m"], r["weights"]) for r in rows] == [(1, "q4_0"), (3, "q4_0")]
    code, out, _ = run(*arguments, "--markdown", tmp_path / "table.md")
    assert code == 0 and "of read bandwidth" in out
    table = (tmp_path / "table.md").read_text()
    assert [line.count("|") for line in table.splitlines()[:4]] == [12] * 4
    assert out.count("| q4_0 | 64x128 |") == table.count("| q4_0 | 64x128 |") == 2
    code, _, err = run(*arguments, "--vs", "abacus")
    assert code == 4 and "abacus" in err
    code, _, err = run("bench-kernel", "--shape", "1", "--weights", "q4_0")
    assert code == 2


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_benchmark_keeps_its_rows(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    row = {
        "weights": "q4_0", "n": 64, "k": 128, "m": 1, "threads": 1, "us": 2.0, "spread": 0.1,
        "gb_s": 3.0, "fraction_of_stream": 0.5, "gops": 4.0, "fraction_of_roofline": 0.6,
        "predicted_us": 1.0, "peers": {},
    }  # fmt: skip

    def interrupted(*_: object, **__: object) -> Iterator[dict[str, Any]]:
        for i in range(done):
            yield row | {"m": i + 1}
        raise KeyboardInterrupt

    monkeypatch.setattr("qigen.bench_kernel.bench_kernel", interrupted)
    arguments = ("bench-kernel", "--shape", "64x128", "--weights", "q4_0", "--isa", "scalar",
                 "--markdown", tmp_path / "table.md")  # fmt: skip
    code, out, err = run(*arguments, "--json")
    assert code == 130 and "interrupted" in err
    if done:
        assert [r["m"] for r in json.loads(out)] == list(range(1, done + 1))
    else:
        assert json.loads(out)["error"]["kind"] == "interrupted"
    code, out, err = run(*arguments)
    assert code == 130 and out.count("| q4_0 |") == done
    file = tmp_path / "table.md"
    assert file.exists() == bool(done) and (not done or file.read_text().count("q4_0") == done)
