"""Calibration: measured once, stored, and used only where it belongs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qigen import toolchain
from qigen.errors import QigenError, ToolchainError
from qigen.targets import by_name, detect
from qigen.targets.calibrate import (
    Calibration,
    _bandwidths,
    calibrate,
    check_data_folder,
    data_file,
    load,
    processor,
    save,
    thread_counts,
)
from qigen.targets.machine import CLASSES


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QIGEN_DATA", str(tmp_path / "data"))


def made_up(**changed: object) -> Calibration:
    """What was measured on this machine, with some things changed."""
    here = detect.described()
    known = {
        "date": "2026-01-01",
        "processor": processor(),
        "cores": here.cores,
        "features": here.features,
        "cache_bytes": (here.l1d_bytes, here.l2_bytes, here.l3_bytes),
        "read_gb_s": (10.0, 18.0),
        "barrier_us": 0.25,
        "l1_gb_s": 200.0,
        "l2_gb_s": 100.0,
        "l3_gb_s": 30.0,
        "rates": {256: {"dot": 1.5, "vector": 2.5, "ghz": 2.0}},
        "latency": {"fma": 4.5},
    }
    return Calibration(**{**known, **changed})  # type: ignore[arg-type]


def test_measurement() -> None:
    try:
        compiler = toolchain.find_compiler()
    except ToolchainError:
        pytest.skip("no C++ compiler")
    here = detect.described()
    machine = replace(here, cores=2, l3_bytes=1 << 20)
    found = calibrate(machine, compiler.run, seconds=0.6)
    assert len(found.read_gb_s) == 2 and found.read_gb_s[1] >= found.read_gb_s[0] > 0.1
    assert 0 < found.barrier_us < 1e5
    assert min(found.l1_gb_s, found.l2_gb_s, found.l3_gb_s) > 0.1
    assert found.changes(machine) == []
    widths = {"avx2": 256, "avx512bw": 512}
    assert set(found.rates) == {w for feature, w in widths.items() if feature in here.features}
    for row in found.rates.values():
        assert set(row) == {*CLASSES, "vector", "ghz"}
        assert all(0.02 < rate < 20 for rate in row.values())
        assert row["vector"] >= row["fma"]
    if found.rates:
        assert found.latency["fma"] > found.latency["logic"] > 0.1


def test_a_busy_machine_is_told() -> None:
    here = replace(detect.described(), read_gb_s=(10.0, 20.0))
    assert made_up(cores=2).doubts(here) == ""
    assert "a barrier takes 536 us" in made_up(cores=2, barrier_us=536.0).doubts(here)
    slow = made_up(cores=2, read_gb_s=(5.0, 5.1)).doubts(here)
    assert "reads 5.1 GB/s" in slow and "calibrate again" in slow and "barrier" not in slow
    assert "reads 3.0 GB/s" in made_up(cores=1, read_gb_s=(3.0,)).doubts(here)


def test_one_core() -> None:
    try:
        compiler = toolchain.find_compiler()
    except ToolchainError:
        pytest.skip("no C++ compiler")
    machine = replace(by_name("generic"), cores=1, l3_bytes=1 << 20)
    found = calibrate(machine, compiler.run, seconds=0.2)
    assert len(found.read_gb_s) == 1 and found.barrier_us == 0.0
    assert found.rates == {}  # plain C++ has no vectors to measure
    assert found.applied(machine).barrier_us == machine.barrier_us


def test_numbers_of_threads() -> None:
    assert thread_counts(1) == (1,)
    assert thread_counts(6) == (1, 2, 3, 4, 5, 6)
    many = thread_counts(128)
    assert many[0] == 1 and many[-1] == 128 and len(many) < 20


def test_bandwidths_between_measured_ones() -> None:
    assert _bandwidths({1: 10.0, 2: 18.0, 4: 30.0}) == (10.0, 18.0, 24.0, 30.0)
    assert _bandwidths({1: 10.0, 2: 9.0}) == (10.0, 10.0)


def test_stored_and_used() -> None:
    assert load() is None
    assert save(made_up()) == data_file()
    assert load() == made_up()
    machine = detect.native.__wrapped__()
    assert machine.read_gb_s == (10.0, 18.0) and machine.barrier_us == 0.25
    assert machine.calibrated == "2026-01-01" and "2026-01-01" in machine.description
    rates = machine.rates[256]
    assert (rates.per_cycle["dot"], rates.vector, rates.ghz) == (1.5, 2.5, 2.0)
    assert rates.per_cycle["load"] == detect.described().rates[256].per_cycle["load"]
    assert machine.latency["fma"] == 4.5 and machine.l3_gb_s == 30.0


@pytest.mark.parametrize(
    ("change", "words"),
    [({"cores": 640}, "640 usable cores"), ({"processor": "Z80"}, "was Z80"),
     ({"features": ("mmx",)}, "mmx"), ({"cache_bytes": (1, 2, 3)}, "caches")],
)  # fmt: skip
def test_another_machine(change: dict[str, object], words: str) -> None:
    save(made_up(**change))
    with pytest.warns(UserWarning, match=f"changed.*{words}"):
        assert detect.native.__wrapped__().read_gb_s != (10.0, 18.0)


def test_another_version() -> None:
    save(made_up())
    data_file().write_text(data_file().read_text().replace('"version": 3', '"version": 1'))
    with pytest.warns(UserWarning, match="another version"):
        assert load() is None


@pytest.mark.parametrize(
    "change", [{"read_gb_s": (-1.0,)}, {"read_gb_s": ()}, {"l1_gb_s": float("nan")}]
)
def test_impossible_values(change: dict[str, object]) -> None:
    save(made_up(**change))
    with pytest.warns(UserWarning, match="calibrate again"):
        assert load() is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"date": 1}', '{"read_gb_s": 3}'])
def test_damaged_file(text: str) -> None:
    save(made_up())
    data_file().write_text(text)
    with pytest.warns(UserWarning, match="calibrate again"):
        assert load() is None


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QIGEN_DATA", str(tmp_path / "file" / "data"))
    for write in (check_data_folder, lambda: save(made_up())):
        with pytest.raises(QigenError, match="QIGEN_DATA"):
            write()
