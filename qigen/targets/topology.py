"""What the operating system tells of cores, caches, memory nodes and the container's limits.

Every function takes the folder that it reads, so that machines can be made up; what cannot be read
is not there, which is never an error: containers hide parts of /sys.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]

SYSTEM = Path("/sys/devices/system")
CGROUP = Path("/sys/fs/cgroup")
_SELF = Path("/proc/self/cgroup")
_DEVICES = Path("/sys/devices")


def cpu_list(text: str) -> frozenset[int]:
    """The numbers of a list like ``0-3,8,10-11``; ValueError if it is none."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def allowed_cpus() -> frozenset[int]:
    """The processors that this process may run on now; those unplugged are left out."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def usable_cores() -> int:
    """Threads worth starting: one for each physical core that affinity and the container allow.

    On a machine with performance and efficiency cores only the former count, if there are any among
    the allowed: the rows of a product are split evenly, and a slow core would hold up all.
    """
    allowed = allowed_cpus()
    fast = allowed - efficiency_cpus()
    cores = physical_cores(fast or allowed)
    limits = [cores, psutil.cpu_count(logical=False) or cores, os.cpu_count() or cores]
    quota = cgroup_cpus()
    if quota is not None:
        limits.append(math.ceil(quota))
    return max(1, min(limits))


def physical_cores(cpus: Iterable[int], root: Path = SYSTEM) -> int:
    """How many physical cores the processors belong to; their number if the system does not say."""
    cores = set()
    for cpu in cpus:
        siblings = frozenset({cpu})
        with contextlib.suppress(OSError, ValueError):
            file = root / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list"
            siblings = cpu_list(file.read_text())
        cores.add(siblings)
    return len(cores)


def efficiency_cpus(root: Path = _DEVICES) -> frozenset[int]:
    """The processors of efficiency cores: as Intel's kernel driver names them, or those of less
    than three quarters of the largest ``cpu_capacity`` (arm64)."""
    with contextlib.suppress(OSError, ValueError):
        return cpu_list((root / "cpu_atom" / "cpus").read_text())
    capacity: dict[int, int] = {}
    for folder in (root / "system" / "cpu").glob("cpu[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            capacity[int(folder.name[3:])] = int((folder / "cpu_capacity").read_text())
    most = max(capacity.values(), default=0)
    return frozenset(cpu for cpu, value in capacity.items() if 4 * value < 3 * most)


def numa_nodes(root: Path = SYSTEM) -> int:
    """Memory nodes with processors that this process may use; 1 if the system does not say."""
    allowed, nodes = allowed_cpus(), 0
    for node in (root / "node").glob("node[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            nodes += bool(cpu_list((node / "cpulist").read_text()) & allowed)
    return max(1, nodes)


def cgroup_cpus(root: Path = CGROUP, own: Path = _SELF) -> float | None:
    """CPUs that the container's quota gives (control groups version 2 or 1), None if unlimited.

    The group of this process and all those around it count: the least wins.
    """
    least: float | None = None
    for folder in _groups(root, own):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                value = int(quota) / int(period)
                least = value if least is None else min(least, value)
    if least is not None or (root / "cpu.max").exists():
        return least
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu" / "cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 else None
    return None


def available_memory(root: Path = CGROUP, own: Path = _SELF) -> int:
    """Bytes that can be allocated: what is free, or what the container's limit leaves."""
    free = int(psutil.virtual_memory().available)
    for folder in _groups(root, own):
        with contextlib.suppress(OSError, ValueError):
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                used = int((folder / "memory.current").read_text())
                free = min(free, max(0, int(limit) - used))
    return free


def _groups(root: Path, own: Path) -> list[Path]:
    """The folders of this process's control group (version 2) and of those around it."""
    path = Path()
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("0::"):
                path = Path(line[3:].strip().lstrip("/"))
    if ".." in path.parts:  # outside of what a container can see
        path = Path()
    return [root / part for part in (path, *path.parents)]


def cache_sizes(root: Path = SYSTEM / "cpu", cpu: int | None = None) -> dict[str, int]:
    """Bytes of a processor's caches ``l1d``, ``l2``, ``l3``, those that Linux tells.

    By default of the first processor that this process may use and that is no efficiency core.
    """
    if cpu is None:
        allowed = allowed_cpus()
        usable = sorted(allowed - efficiency_cpus()) or sorted(allowed)
        told = [c for c in usable if (root / f"cpu{c}" / "cache").is_dir()]
        cpu = told[0] if told else 0
    found: dict[str, int] = {}
    names = {("1", "Data"): "l1d", ("2", "Unified"): "l2", ("3", "Unified"): "l3"}
    for index in sorted(root.glob(f"cpu{cpu}/cache/index*")):
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            kind = (index / "level").read_text().strip(), (index / "type").read_text().strip()
            size = (index / "size").read_text().strip()
            if kind in names:
                unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[-1]]
                found[names[kind]] = int(size[:-1]) * unit
    return found
