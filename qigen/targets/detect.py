"""What this machine is: the row nearest to its processor, corrected by what the machine says."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import archspec.cpu  # type: ignore[import-untyped]

from qigen.targets import calibrate
from qigen.targets.features import host_system, of_this_machine
from qigen.targets.machine import Machine, rows
from qigen.targets.topology import (
    allowed_cpus,
    cache_sizes,
    efficiency_cpus,
    numa_nodes,
    usable_cores,
)


@functools.lru_cache(maxsize=1)
def native() -> Machine:
    """The machine that this runs on, named ``native``; the same object at every call.

    What :mod:`qigen.targets.calibrate` measured on it before replaces the table's values.
    """
    machine = described()
    calibration = calibrate.load()
    if calibration is None:
        return machine
    changes = calibration.changes(machine)
    if changes:
        warnings.warn(
            f"this machine changed since it was calibrated on {calibration.date} "
            f"({'; '.join(changes)}); run qigen targets --calibrate again",
            stacklevel=2,
        )
        return machine
    return calibration.applied(machine)


def described() -> Machine:
    """The machine that this runs on, without what was measured on it."""
    row = nearest_row(archspec.cpu.host(), of_this_machine())
    caches = cache_sizes()
    return replace(
        row,
        name="native",
        description=f"this machine, like {row.name}: {row.description}",
        features=of_this_machine(),
        cores=usable_cores(),
        efficiency_cores=len(efficiency_cpus() & allowed_cpus()),
        numa_nodes=numa_nodes(),
        system=host_system(),
        l1d_bytes=caches.get("l1d", row.l1d_bytes),
        l2_bytes=caches.get("l2", row.l2_bytes),
        l3_bytes=caches.get("l3", row.l3_bytes),
    )


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
