"""Detection: this machine, and made-up ones."""

from __future__ import annotations

import archspec.cpu
import pytest

from qigen.targets import native, rows
from qigen.targets.detect import nearest_row
from qigen.targets.features import FEATURES


def test_native() -> None:
    machine = native()
    assert machine is native()
    assert machine.name == "native" and machine.cores >= 1
    assert set(machine.features) <= set(FEATURES)
    assert machine.l1d_bytes < machine.l2_bytes


@pytest.mark.parametrize(
    ("microarchitecture", "row"),
    [("zen4", "znver4"), ("icelake", "icelake-server"), ("sapphirerapids", "sapphirerapids"),
     ("haswell", "x86-64-v3"), ("skylake_avx512", "x86-64-v4"), ("nehalem", "generic"),
     ("neoverse_n1", "generic")],
)  # fmt: skip
def test_nearest_row(microarchitecture: str, row: str) -> None:
    host = archspec.cpu.TARGETS[microarchitecture]
    features = FEATURES if host.family.name == "x86_64" else ()
    assert nearest_row(host, features).name == row


def test_hidden_features_lead_to_a_lesser_row() -> None:
    host = archspec.cpu.TARGETS["icelake"]
    without = tuple(f for f in FEATURES if not f.startswith("avx512"))
    assert nearest_row(host, without) is rows()["x86-64-v3"]
