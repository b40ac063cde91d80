"""Machine rows: what the cost model has to know about a processor, as data.

A row is a TOML file beside this one, and names its source. Detection
(:mod:`qigen.targets.detect`) and calibration replace values by what the machine itself says.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qigen.errors import Unsupported, UsageError
from qigen.targets.features import FEATURES, architecture, host_architecture

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

CLASSES = ("dot", "fma", "logic", "shift", "shuffle", "convert", "load", "store")
"""Classes of vector instructions: byte dot products, float arithmetic, bitwise and integer
additions, shifts, byte shuffles, conversions, loads (broadcasts from memory too), stores."""


@dataclass(frozen=True)
class Rates:
    """Instructions of one vector width that a core issues a cycle.

    ``per_cycle`` by class, ``vector`` of all classes that compute, loads and stores apart. ``ghz``
    is the clock under a load of such instructions.
    """

    per_cycle: Mapping[str, float]
    vector: float
    ghz: float


@dataclass(frozen=True, eq=False)
class Machine:
    """One row. Bandwidths are in GB/s (1e9 bytes), sizes in bytes; equality is identity.

    ``features``: names of :data:`qigen.targets.features.FEATURES`. ``cores``: threads worth
    starting. Level 1 and 2 belong to a core, level 3 to all. ``read_gb_s[t-1]`` is what ``t``
    threads read from memory together, one sequential stream each (more threads: the last value);
    ``l2_gb_s`` and ``l3_gb_s`` are for one thread. ``memory_ns`` is one access to memory.
    ``issue_width`` counts instructions of any kind a cycle, ``window`` those that wait in the
    reorder buffer. ``barrier_us`` is a barrier of all threads. ``rates`` by vector width in bits
    (512 only where there is AVX-512, 128 alone on ARM), ``latency`` in cycles by class.
    ``archspec`` names the microarchitectures that the row stands for, ``system`` what such machines
    run unless the target says otherwise; ``cpu`` is the architecture that a target names for a row
    without features. ``l1_gb_s`` is 0 until it is measured (the rate of loads bounds it).
    ``efficiency_cores`` are not among ``cores``; ``calibrated`` is the date of the measurement, if
    there was one. ``streams``: sequential streams that a thread reads at full speed.
    """

    name: str
    description: str
    features: tuple[str, ...]
    cores: int
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    read_gb_s: tuple[float, ...]
    l2_gb_s: float
    l3_gb_s: float
    memory_ns: float
    issue_width: float
    window: int
    barrier_us: float
    rates: Mapping[int, Rates]
    latency: Mapping[str, float]
    archspec: tuple[str, ...] = ()
    system: str = "linux"
    source: str = ""
    l1_gb_s: float = 0.0
    efficiency_cores: int = 0
    numa_nodes: int = 1
    calibrated: str = ""
    cpu: str = ""
    streams: int = 2

    def has(self, features: Iterable[str]) -> bool:
        """Whether the machine has all the named features."""
        return set(features) <= set(self.features)

    @property
    def architecture(self) -> str:
        """x86_64 or aarch64; that of this machine if the row has no features."""
        return architecture(self.features) or self.cpu or host_architecture()

    def read_bandwidth(self, threads: int) -> float:
        """Bytes a microsecond that ``threads`` threads read from memory together."""
        return self.read_gb_s[min(threads, len(self.read_gb_s)) - 1] * 1e3


def _rates(table: dict[str, float]) -> Rates:
    rest = dict(table)
    vector, ghz = rest.pop("vector"), rest.pop("ghz")
    assert set(rest) == set(CLASSES), f"rates of {sorted(rest)} instead of {CLASSES}"
    return Rates(rest, vector, ghz)


def _machine(path: Path) -> Machine:
    data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    features = data.pop("features")
    assert set(features) <= set(FEATURES), f"{path.name} has features that nobody knows"
    thread, total = data.pop("thread_gb_s"), data.pop("all_gb_s")
    read = tuple(min(thread * t, total) for t in range(1, 2 + int(total / thread)))
    sizes = {f"{level}_bytes": data.pop(f"{level}_kib") << 10 for level in ("l1d", "l2", "l3")}
    return Machine(
        name=path.stem,
        features=tuple(features),
        read_gb_s=read,
        rates={int(width): _rates(table) for width, table in data.pop("rates").items()},
        archspec=tuple(data.pop("archspec")),
        **sizes,
        **data,
    )


@functools.lru_cache(maxsize=1)
def rows() -> Mapping[str, Machine]:
    """All machine rows by name."""
    files = sorted(Path(__file__).parent.glob("*.toml"))
    return {path.stem: _machine(path) for path in files}


SYSTEMS = ("linux", "macos", "windows")
_ARCHITECTURES = {
    "x86_64": "x86_64", "amd64": "x86_64", "x64": "x86_64",
    "aarch64": "aarch64", "arm64": "aarch64",
}  # fmt: skip
_BIG_ENDIAN = ("aarch64_be", "armeb", "ppc64", "s390x", "mips", "mips64", "sparc64")


def by_name(name: str) -> Machine:
    """The machine that a target ``[ARCHITECTURE-SYSTEM:]ROW[+FEATURE..]`` names.

    E.g. ``znver4``, ``aarch64-linux:neoverse-n1``, ``x86-64-v3+avxvnni``; its ``name`` is the whole
    target. Unsupported names the nearest rows, systems or features; UsageError if the parts
    contradict each other.
    """
    rest, plus, extra = name.partition("+")
    triple, colon, row_name = rest.rpartition(":")
    row = _row(row_name)
    if not colon and not plus:
        return row
    system, cpu = row.system, row.cpu
    if colon:
        cpu, system = _platform(triple, name)
        if row.features and architecture(row.features) != cpu:
            raise UsageError(
                f"target '{name}': {row_name} is an {architecture(row.features)} processor, not an "
                f"{cpu} one"
            )
    features = list(row.features)
    for feature in extra.split("+") if plus else ():
        if feature not in FEATURES:
            near = difflib.get_close_matches(feature, FEATURES, n=3, cutoff=0.4) or FEATURES
            raise Unsupported(
                f"target '{name}': no feature is called '{feature}'; the nearest are "
                f"{', '.join(near)}"
            )
        if architecture([feature]) != (architecture(features) or cpu or host_architecture()):
            raise UsageError(
                f"target '{name}': {feature} is a feature of {architecture([feature])}, which "
                f"{row_name} is not"
            )
        if feature not in features:
            features.append(feature)
    return replace(row, name=name, system=system, cpu=cpu, features=tuple(features))


def _row(name: str) -> Machine:
    table = rows()
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3, cutoff=0.4) or sorted(table)
        raise Unsupported(
            f"target '{name}' is not known; take native or one of {', '.join(near)}"
        )
    return table[name]


def _platform(triple: str, target: str) -> tuple[str, str]:
    """(architecture, system) of ``aarch64-linux``."""
    cpu, _, system = triple.partition("-")
    if cpu in _BIG_ENDIAN:
        raise Unsupported(
            f"target '{target}': {cpu} is big endian, and packed weights are little endian; the "
            "architectures are x86_64 and aarch64"
        )
    if cpu not in _ARCHITECTURES:
        raise Unsupported(
            f"target '{target}': the architecture '{cpu}' is not known; take x86_64 or aarch64"
        )
    if system not in SYSTEMS:
        near = difflib.get_close_matches(system, SYSTEMS, n=1, cutoff=0.4) or SYSTEMS
        raise Unsupported(
            f"target '{target}': the system '{system}' is not known; take {' or '.join(near)}"
        )
    return _ARCHITECTURES[cpu], system
