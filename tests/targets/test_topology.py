"""What the system tells of cores, caches and limits, on made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from qigen.targets import topology
from qigen.targets.topology import (
    available_memory,
    cache_sizes,
    cgroup_cpus,
    cpu_list,
    efficiency_cpus,
    numa_nodes,
    physical_cores,
    usable_cores,
)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_cpu_lists() -> None:
    assert cpu_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert cpu_list("\n") == frozenset()
    with pytest.raises(ValueError):
        cpu_list("a-b")


def test_cgroup_limits(tmp_path: Path) -> None:
    nowhere = tmp_path / "self"
    assert cgroup_cpus(tmp_path, nowhere) is None
    write(tmp_path / "cpu" / "cpu.cfs_quota_us", "50000")
    write(tmp_path / "cpu" / "cpu.cfs_period_us", "100000")
    assert cgroup_cpus(tmp_path, nowhere) == 0.5
    write(tmp_path / "cpu.max", "max 100000")
    assert cgroup_cpus(tmp_path, nowhere) is None
    write(tmp_path / "cpu.max", "250000 100000")
    assert cgroup_cpus(tmp_path, nowhere) == 2.5


def test_the_tightest_group_wins(tmp_path: Path) -> None:
    write(tmp_path / "self", "0::/outer/inner")
    write(tmp_path / "cpu.max", "max 100000")
    write(tmp_path / "outer" / "cpu.max", "150000 100000")
    write(tmp_path / "outer" / "inner" / "cpu.max", "800000 100000")
    assert cgroup_cpus(tmp_path, tmp_path / "self") == 1.5
    write(tmp_path / "self", "0::/../elsewhere")  # what a container sees of groups outside of it
    assert cgroup_cpus(tmp_path, tmp_path / "self") is None


def test_memory_limit(tmp_path: Path) -> None:
    free = available_memory(tmp_path, tmp_path / "self")
    assert free > 0
    write(tmp_path / "memory.max", str(3 << 20))
    write(tmp_path / "memory.current", str(1 << 20))
    assert available_memory(tmp_path, tmp_path / "self") == 2 << 20
    write(tmp_path / "memory.current", str(8 << 20))
    assert available_memory(tmp_path, tmp_path / "self") == 0


def test_cache_sizes(tmp_path: Path) -> None:
    assert cache_sizes(tmp_path, 0) == {}
    levels = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M"),
              ("3", "Unified", "1G"), ("4", "Unified", ""), ("x", "Data", "7")]  # fmt: skip
    for i, (level, kind, size) in enumerate(levels):
        index = tmp_path / "cpu3" / "cache" / f"index{i}"
        write(index / "level", level)
        write(index / "type", kind)
        write(index / "size", size)
    assert cache_sizes(tmp_path, 3) == {"l1d": 48 << 10, "l2": 2 << 20, "l3": 1 << 30}


def test_siblings_are_one_core(tmp_path: Path) -> None:
    assert physical_cores({0, 1, 2}, tmp_path) == 3
    for cpu in range(4):
        pair = f"{cpu % 2},{cpu % 2 + 2}"
        write(tmp_path / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list", pair)
    assert physical_cores(range(4), tmp_path) == 2
    assert physical_cores({1, 3}, tmp_path) == 1


def test_efficiency_cores(tmp_path: Path) -> None:
    assert efficiency_cpus(tmp_path) == frozenset()
    for cpu, capacity in enumerate((1024, 1024, 500)):
        write(tmp_path / "system" / "cpu" / f"cpu{cpu}" / "cpu_capacity", str(capacity))
    assert efficiency_cpus(tmp_path) == {2}
    write(tmp_path / "cpu_atom" / "cpus", "4-7")
    assert efficiency_cpus(tmp_path) == {4, 5, 6, 7}


def test_memory_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert numa_nodes(tmp_path) == 1
    for node, cpus in enumerate(("0-1", "2-3", "")):  # the last has memory only
        write(tmp_path / "node" / f"node{node}" / "cpulist", cpus)
    monkeypatch.setattr(topology, "allowed_cpus", lambda: frozenset({0, 1, 2, 3}))
    assert numa_nodes(tmp_path) == 2
    monkeypatch.setattr(topology, "allowed_cpus", lambda: frozenset({2}))
    assert numa_nodes(tmp_path) == 1


def test_threads_worth_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "allowed_cpus", lambda: frozenset(range(8)))
    monkeypatch.setattr(topology, "efficiency_cpus", lambda: frozenset(range(2, 8)))
    monkeypatch.setattr(topology, "physical_cores", len)
    monkeypatch.setattr(topology.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(topology.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(topology, "cgroup_cpus", lambda: None)
    assert usable_cores() == 2
    monkeypatch.setattr(topology, "efficiency_cpus", lambda: frozenset(range(8)))
    assert usable_cores() == 8  # none but them
    for quota, threads in ((2.5, 3), (0.2, 1), (100.0, 8)):
        monkeypatch.setattr(topology, "cgroup_cpus", lambda quota=quota: quota)
        assert usable_cores() == threads
