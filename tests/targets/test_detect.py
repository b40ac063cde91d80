"""Detection: this machine, and made-up ones."""

from __future__ import annotations

from pathlib import Path

import archspec.cpu
import pytest

from qigen.targets import native, rows
from qigen.targets.detect import cache_sizes, cgroup_cpus, nearest_row
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


def test_cgroup_limits(tmp_path: Path) -> None:
    assert cgroup_cpus(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_cpus(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cgroup_cpus(tmp_path) is None
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert cgroup_cpus(tmp_path) == 2.5


def test_cache_sizes(tmp_path: Path) -> None:
    assert cache_sizes(tmp_path) == {}
    levels = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M")]
    for i, (level, kind, size) in enumerate(levels):
        index = tmp_path / "cpu0" / "cache" / f"index{i}"
        index.mkdir(parents=True)
        (index / "level").write_text(level + "\n")
        (index / "type").write_text(kind + "\n")
        (index / "size").write_text(size + "\n")
    assert cache_sizes(tmp_path) == {"l1d": 48 << 10, "l2": 2 << 20}
