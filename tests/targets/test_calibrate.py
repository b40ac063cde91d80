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
    calibrate,
    data_file,
    load,
    processor,
    save,
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QIGEN_DATA", str(tmp_path / "data"))


def made_up(cores: int = 2) -> Calibration:
    return Calibration("2026-01-01", processor(), cores, (10.0, 18.0), 0.25)


def test_measurement() -> None:
    try:
        compiler = toolchain.find_compiler()
    except ToolchainError:
        pytest.skip("no C++ compiler")
    machine = replace(by_name("generic"), cores=2, l3_bytes=1 << 20)
    found = calibrate(machine, compiler.run, seconds=0.05)
    assert len(found.read_gb_s) == 2 and found.read_gb_s[1] >= found.read_gb_s[0] > 0.1
    assert 0 < found.barrier_us < 1e5
    assert found.fits(machine)


def test_stored_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load() is None
    assert save(made_up()) == data_file()
    assert load() == made_up()
    monkeypatch.setattr(detect, "usable_cores", lambda: 2)
    machine = detect.native.__wrapped__()
    assert machine.read_gb_s == (10.0, 18.0) and machine.barrier_us == 0.25
    assert "2026-01-01" in machine.description


def test_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    save(made_up(cores=64))
    monkeypatch.setattr(detect, "usable_cores", lambda: 2)
    with pytest.warns(UserWarning, match="changed"):
        assert detect.native.__wrapped__().read_gb_s != (10.0, 18.0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"date": 1}', '{"read_gb_s": 3}'])
def test_damaged_file(text: str) -> None:
    save(made_up())
    data_file().write_text(text)
    with pytest.warns(UserWarning, match="calibrate again"):
        assert load() is None


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QIGEN_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(QigenError, match="QIGEN_DATA"):
        save(made_up())
