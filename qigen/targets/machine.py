"""Machine rows: what the cost model has to know about a processor, as data.

A row is a TOML file beside this one. Values are for one core unless they say otherwise, and each
file names its source. Detection (:mod:`qigen.targets.detect`) and calibration replace them by what
the machine itself says.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qigen.errors import Unsupported
from qigen.targets.features import FEATURES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CLASSES = ("dot", "fma", "logic", "shift", "shuffle", "convert", "load", "store")
"""Classes of vector instructions that :attr:`Rates.per_cycle` must know."""


@dataclass(frozen=True)
class Rates:
    """Instructions of one vector width a cycle: by class, and in all (``vector``: those that
    compute, loads and stores apart). ``ghz`` is the clock under a load of such instructions."""

    per_cycle: Mapping[str, float]
    vector: float
    ghz: float


@dataclass(frozen=True)
class Machine:
    """One row. Bandwidths are in GB/s (1e9 bytes), sizes in bytes.

    ``read_gb_s[t-1]`` is what ``t`` threads read from memory together, one sequential stream each.
    ``rates[512]`` and ``rates[256]`` are issue rates by vector width in bits, ``latency`` the
    cycles until a result can be used, by class. ``issue_width`` counts instructions of any kind a
    cycle, ``window`` those that wait in the reorder buffer. ``memory_ns`` is the time of one access
    to memory, ``barrier_us`` is the cost of one barrier of all threads.
    """

    name: str
    description: str
    features: tuple[str, ...]
    cores: int
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    read_gb_s: tuple[float, ...]
    l1_gb_s: float
    l2_gb_s: float
    l3_gb_s: float
    memory_ns: float
    issue_width: float
    window: int
    barrier_us: float
    rates: Mapping[int, Rates]
    latency: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    def has(self, features: Iterable[str]) -> bool:
        """Whether the machine has all the named features."""
        return set(features) <= set(self.features)

    def read_bandwidth(self, threads: int) -> float:
        """Bytes a microsecond that ``threads`` threads read from memory together."""
        return self.read_gb_s[min(threads, len(self.read_gb_s)) - 1] * 1e3


def _machine(path: Path) -> Machine:
    data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    features = set(data.pop("features"))
    unknown = features - set(FEATURES)
    if unknown:
        raise AssertionError(f"{path.name}: unknown features {sorted(unknown)}")
    rates = {}
    for width, table in data.pop("rates").items():
        vector, ghz = float(table.pop("vector")), float(table.pop("ghz"))
        if set(table) != set(CLASSES):
            raise AssertionError(f"{path.name}: rates of {width} bits are not those of {CLASSES}")
        rates[int(width)] = Rates({k: float(v) for k, v in table.items()}, vector, ghz)
    for size in ("l1d", "l2", "l3"):
        data[f"{size}_bytes"] = int(data.pop(f"{size}_kib") * 1024)
    return Machine(
        name=path.stem,
        features=tuple(f for f in FEATURES if f in features),
        read_gb_s=tuple(map(float, data.pop("read_gb_s"))),
        rates=rates,
        **data,
    )


@functools.lru_cache(maxsize=1)
def rows() -> dict[str, Machine]:
    """All machine rows by name."""
    files = sorted(Path(__file__).parent.glob("*.toml"))
    return {path.stem: _machine(path) for path in files}


def by_name(name: str) -> Machine:
    """The row ``name``; Unsupported names the nearest ones. ``native`` is :func:`native`'s."""
    if name == "native":
        from qigen.targets.detect import native

        return native()
    table = rows()
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3, cutoff=0.4) or sorted(table)
        raise Unsupported(f"target '{name}' is not known; the nearest are {', '.join(near)}")
    return table[name]


def replaced(machine: Machine, **values: Any) -> Machine:
    """The machine with other values; a shorthand of :func:`dataclasses.replace`."""
    return dataclasses.replace(machine, **values)
