"""Machine rows: the table is complete, and wrong names are answered with near ones."""

from __future__ import annotations

import re

import pytest

from qigen.backends.cpu.isa import ISAS
from qigen.errors import Unsupported, UsageError
from qigen.paths import resource_folder
from qigen.targets import Machine, by_name, rows
from qigen.targets.features import FEATURES, named
from qigen.targets.machine import CLASSES


@pytest.mark.parametrize("machine", rows().values(), ids=rows())
def test_row_is_complete(machine: Machine) -> None:
    assert machine.description and machine.source
    assert machine.l1d_bytes < machine.l2_bytes <= machine.l3_bytes
    assert list(machine.read_gb_s) == sorted(machine.read_gb_s)
    widths = {256, 512} if machine.has(["avx512f"]) else {256}
    assert set(machine.rates) == ({128} if machine.has(["neon"]) else widths)
    for rates in machine.rates.values():
        assert set(rates.per_cycle) == set(CLASSES)
        assert 1 < rates.ghz < 6
    assert {"dot", "fma", "logic", "convert"} <= set(machine.latency)


def test_names_and_features() -> None:
    assert {"generic", "x86-64-v3", "x86-64-v4", "znver4", "icelake-server"} <= set(rows())
    assert by_name("znver4").has(["avx512vnni", "avx512bf16"])
    assert not by_name("x86-64-v4").has(["avx512vnni"])
    assert not by_name("x86-64-v3").has(["avx512f"])
    # every target runs something, and each ISA is the best one somewhere
    best = {
        next(isa.name for isa in reversed(ISAS.values()) if machine.has(isa.features))
        for machine in rows().values()
    }
    assert best == set(ISAS) - {"neoni8mm"}  # all machines with i8mm have bf16 too


def test_unknown_name() -> None:
    with pytest.raises(Unsupported, match="znver4"):
        by_name("zenver4")


def test_targets_name_systems_and_features() -> None:
    name = "aarch64-linux:raspberrypi5"
    pi = by_name(name)
    assert (pi.architecture, pi.system, pi.name) == ("aarch64", "linux", name)
    assert by_name("apple-m1").system == "macos"
    assert by_name("amd64-windows:znver4").system == "windows"
    assert by_name("arm64-linux:generic").architecture == "aarch64"
    assert by_name("x86-64-v3+avxvnni").has(["avx2", "avxvnni"])


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("aarch64-linux:neoverse-n9", Unsupported, "neoverse-n1"),
        ("aarch64_be-linux:neoverse-n1", Unsupported, "big endian"),
        ("riscv64-linux:generic", Unsupported, "x86_64 or aarch64"),
        ("aarch64-macosx:apple-m1", Unsupported, "macos"),
        ("aarch64-linux:znver4", UsageError, "znver4 is an x86_64 processor"),
        ("x86-64-v3+avxvni", Unsupported, "avxvnni"),
        ("neoverse-n1+avx2", UsageError, "avx2 is a feature of x86_64"),
    ],
)
def test_targets_that_make_no_sense(target: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        by_name(target)


def test_bandwidth_saturates() -> None:
    machine = by_name("znver4")
    assert machine.read_bandwidth(1) == pytest.approx(28e3)
    assert machine.read_bandwidth(2) > machine.read_bandwidth(1)
    assert machine.read_bandwidth(100) == machine.read_bandwidth(1000) == pytest.approx(60e3)


def test_features_are_those_of_the_runtime() -> None:
    header = (resource_folder("runtime") / "include" / "qigen" / "generated.h").read_text()
    known = re.findall(r"static constexpr uint64_t (\w+) = 1ull", header)
    assert list(FEATURES) == known
    for isa in ISAS.values():
        assert set(isa.features) <= set(FEATURES)


def test_linux_names() -> None:
    flags = ["fpu", "pni", "bmi1", "abm", "avx512_vnni", "avx512_bf16", "avx_vnni", "avx2"]
    assert named(["fp", "asimd", "asimddp", "i8mm", "bf16"]) == ("neon", "dotprod", "i8mm", "bf16")
    expected = ("sse3", "avx2", "bmi", "lzcnt", "avxvnni", "avx512vnni", "avx512bf16")
    assert named(flags) == expected
