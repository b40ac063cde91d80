"""What is remembered of measurements: the threads of an artifact, the times of kernels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qigen
from qigen import targets, toolchain, tune, tuned
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.matmul import MatmulSpec
from qigen.cli import main
from qigen.costmodel import matmul, schedules
from qigen.errors import QigenError, ToolchainError
from qigen.formats.catalog import by_name
from qigen.formats.layout import Layout
from qigen.planner import BUCKETS, Product, plan_products
from qigen.tuning import database
from qigen.tuning.database import Entry, spec_to_json
from qigen.tuning.measure import kernel_text


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


# ---- measurements of before, in a compilation that measures nothing ----


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``known(us)`` -> entries of every schedule of one product; ``us`` gives a schedule its
    microseconds, None for one that crashes."""
    try:
        compiler = toolchain.find_compiler()
    except ToolchainError:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("QIGEN_DATA", str(tmp_path / "data"))
    # two schedules, which plain C++ has no reason to tell apart
    both = (Layout(16, 1), Layout(16, 2))
    monkeypatch.setattr(matmul, "layouts", lambda format, k, isa: both)
    machine = targets.native()
    specs = schedules(PRODUCT.format, PRODUCT.k, ISAS["scalar"], "int8", machine)
    assert len(specs) == 2

    def entries(us: Callable[[MatmulSpec], float | None]) -> list[Entry]:
        return [
            Entry(
                machine=database.machine_key(machine),
                compiler=database.compiler_key(compiler.version), kernel=kernel_text(spec)[1],
                n=PRODUCT.n, k=PRODUCT.k, m=m, threads=2, home="cache", spec=spec_to_json(spec),
                status="crash" if us(spec) is None else "ok", us=us(spec) or 0.0, spread=0.0,
                runs=9, date="2026-01-01", about="",
            )
            for spec in specs
            for m in BUCKETS
        ]  # fmt: skip

    return entries


PRODUCT = Product(by_name("q4_0"), 64, 128, 1)


def chosen() -> tuple[MatmulSpec, str]:
    machine, isa = targets.native(), ISAS["scalar"]
    times, note = tune.remembered([PRODUCT], isa=isa, machine=machine, threads=2)
    specs, _ = plan_products([PRODUCT], isa, machine, "auto", 2, times)
    return specs[PRODUCT.key], note


def by_blocks(*us: float | None) -> Callable[[MatmulSpec], float | None]:
    return lambda spec: us[spec.layout.blocks - 1]


def test_the_users_database_then_the_package_then_the_model(
    known: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "shipped", lambda: ())
    model, note = chosen()
    assert note == "" and not (tmp_path / "data").exists(), "nothing is made by looking"
    fast, slow = (by_blocks(1, 9), by_blocks(9, 1))
    other = fast if model.layout.blocks == 2 else slow
    # another compiler of the package's makers does not matter
    theirs = [replace(e, compiler="other") for e in known(other)]
    monkeypatch.setattr(database, "shipped", lambda: tuple(theirs))
    assert chosen()[0].layout.blocks == 3 - model.layout.blocks
    with database.Database() as data:
        data.add(replace(e, compiler="other") for e in known(slow if other is fast else fast))
        assert chosen()[0].layout.blocks == 3 - model.layout.blocks, "an entry of another compiler"
        data.add(known(slow if other is fast else fast))
    assert chosen()[0] == model


def test_what_failed_is_never_chosen(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "shipped", lambda: ())
    with database.Database() as data:
        for bad in (1, 2):
            times: list[float | None] = [5.0, 5.0]
            times[bad - 1] = None
            data.add(known(by_blocks(*times)))
            assert chosen()[0].layout.blocks == 3 - bad
        data.add(known(by_blocks(None, None)))
        with pytest.raises(QigenError, match="crashed or was wrong"):
            chosen()


def test_a_database_that_cannot_be_used_is_a_note(known: Any, tmp_path: Path) -> None:
    file = tmp_path / "data" / "tuning.sqlite"
    file.parent.mkdir()
    file.write_bytes(b"no database" * 1000)
    spec, note = chosen()
    assert spec.format.name == "q4_0" and str(file) in note and "without it" in note
    file.unlink()
    with database.Database() as data:
        data.add(known(by_blocks(1, 2)))
        data._connection.execute("UPDATE entries SET us = 'x'")
    assert "without it" in chosen()[1]


def test_defaults_are_written_and_read(
    known: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Through the command: right kernels of this machine and of today's sources alone."""
    machine = targets.native()
    with database.Database() as data:
        entries = known(by_blocks(None, 2.0))
        data.add([*entries, replace(entries[-1], kernel="of yesterday"),
                  replace(entries[-1], machine="another")])  # fmt: skip
    monkeypatch.setattr(database, "DEFAULTS", tmp_path)
    assert main(["tune", "export", "--defaults"]) == 0
    assert f"{len(BUCKETS)} measurements" in capsys.readouterr().out
    assert database.defaults_file(machine).parent == tmp_path
    database.shipped.cache_clear()
    try:
        shipped = database.shipped()
        assert {e.m for e in shipped} == set(BUCKETS) and {e.spec["blocks"] for e in shipped} == {2}
        (tmp_path / "data" / "tuning.sqlite").unlink()
        assert chosen()[0].layout.blocks == 2
    finally:
        database.shipped.cache_clear()
    assert main(["tune", "export", "--defaults", str(tmp_path / "x.json")]) == 0
    assert len(database.read_export(tmp_path / "x.json")) == 0, "the database is empty now"
    assert main(["tune", "--defaults", "--shape", "32x32"]) == 2
    assert main(["tune", "import", "--defaults", "x"]) == 2


def test_a_data_folder_that_cannot_be_used(
    known: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compilation does without: where the folder would be lies a file, or it may not be read."""
    monkeypatch.setattr(database, "shipped", lambda: ())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QIGEN_DATA", str(tmp_path / "file" / "data"))
    model, note = chosen()
    assert note == ""

    def refused() -> Path:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(database, "database_file", refused)
    spec, note = chosen()
    assert spec == model and "Permission denied" in note and "without it" in note


def test_a_limit_below_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container's quota, or processors that were unplugged: threads that were tuned before on
    more of them are not started any more."""
    from qigen.targets import topology

    monkeypatch.setattr(topology, "cgroup_cpus", lambda: None)
    cores = topology.usable_cores()
    tuned.write_tuned(tmp_path, cores, 64)
    assert tuned.tuned_threads(tmp_path) == cores
    one = frozenset({min(topology.allowed_cpus())})
    for name, value in (("cgroup_cpus", 0.5), ("allowed_cpus", one)):
        with monkeypatch.context() as changed:
            changed.setattr(topology, name, lambda value=value: value)
            assert topology.usable_cores() == 1
            assert tuned.tuned_threads(tmp_path) == (0 if cores > 1 else 1)
