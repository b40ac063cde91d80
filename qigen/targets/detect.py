"""What this machine is: the nearest row, with what the machine itself says in its place."""

from __future__ import annotations

import functools

from qigen.targets.features import of_this_machine
from qigen.targets.machine import Machine, replaced, rows


@functools.lru_cache(maxsize=1)
def native() -> Machine:
    """The machine that this runs on."""
    return replaced(rows()["icelake-server"], name="native", features=of_this_machine())
