"""What this machine is: the row nearest to its processor, corrected by what the machine says."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import archspec.cpu  # type: ignore[import-untyped]
import psutil  # type: ignore[import-untyped,unused-ignore]

from qigen.targets import calibrate
from qigen.targets.features import host_system, of_this_machine
from qigen.targets.machine import Machine, rows

_CPU = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


@functools.lru_cache(maxsize=1)
def native() -> Machine:
    """The machine that this runs on, named ``native``; the same object at every call.

    What :mod:`qigen.targets.calibrate` measured on it before replaces the table's values.
    """
    row = nearest_row(archspec.cpu.host(), of_this_machine())
    caches = cache_sizes()
    machine = replace(
        row,
        name="native",
        description=f"this machine, like {row.name}: {row.description}",
        features=of_this_machine(),
        cores=usable_cores(),
        system=host_system(),
        l1d_bytes=caches.get("l1d", row.l1d_bytes),
        l2_bytes=caches.get("l2", row.l2_bytes),
        l3_bytes=caches.get("l3", row.l3_bytes),
    )
    calibration = calibrate.load()
    if calibration is None:
        return machine
    if not calibration.fits(machine):
        warnings.warn(
            f"this machine changed since it was calibrated on {calibration.date}; calibrate again",
            stacklevel=2,
        )
        return machine
    return calibration.applied(machine)


def nearest_row(host: archspec.cpu.Microarchitecture, features: tuple[str, ...]) -> Machine:
    """The row of the host's microarchitecture or of its nearest ancestor that has one.

    A row whose features the machine does not all have is passed over (a hypervisor may hide some,
    and the row's rates are for what uses them).
    """
    table = rows()
    for name in (host.name, *(ancestor.name for ancestor in host.ancestors)):
        for row in table.values():
            if name in row.archspec and set(row.features) <= set(features):
                return row
    return table["generic"]


def usable_cores() -> int:
    """Cores that this process may use: by affinity, physical cores and container limits."""
    limits: list[int | None] = [psutil.cpu_count(logical=False), os.cpu_count()]
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    quota = cgroup_cpus()
    if quota is not None:
        limits.append(max(1, math.ceil(quota)))
    return max(1, min(n for n in limits if n))


def cgroup_cpus(root: Path = _CGROUP) -> float | None:
    """CPUs that the container's quota gives (control groups version 2 or 1), None if unlimited."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu" / "cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 else None
    return None


def cache_sizes(root: Path = _CPU) -> dict[str, int]:
    """Bytes of the first core's caches ``l1d``, ``l2``, ``l3``, those that Linux tells."""
    found: dict[str, int] = {}
    names = {("1", "Data"): "l1d", ("2", "Unified"): "l2", ("3", "Unified"): "l3"}
    for index in sorted(root.glob("cpu0/cache/index*")):
        with contextlib.suppress(OSError, ValueError):
            kind = (index / "level").read_text().strip(), (index / "type").read_text().strip()
            size = (index / "size").read_text().strip()
            if kind in names:
                unit = {"K": 1 << 10, "M": 1 << 20}[size[-1]]
                found[names[kind]] = int(size[:-1]) * unit
    return found
