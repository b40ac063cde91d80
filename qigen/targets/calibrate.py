"""A short measurement of this machine, kept in the user's data folder.

Bandwidths of memory and caches, the cost of a barrier and how many instructions of a class a core
issues differ from one machine of a kind to the next, and decide which kernel is best.
:func:`qigen.targets.native` uses what is stored, if the machine is still the same.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qigen.errors import QigenError
from qigen.paths import data_folder, resource_folder
from qigen.targets.machine import CLASSES, Machine, Rates
from qigen.targets.topology import available_memory

RunCompiler = Callable[[Sequence[str], str], None]
"""Runs the C++ compiler with arguments; the second argument says for what."""

VERSION = 3
SECONDS = 12.0
"""Of measuring; compiling and touching the memory come on top and stay below 8 s."""

_MIB_AT_MOST = 512
_WIDTHS = (256, 512)
_LATENCIES = ("dot", "fma", "logic", "convert")


_ODD_READ = 0.4
"""A machine that reads less than this part of what its row of the table says was busy ..."""
_ODD_BARRIER_US = 20.0
"""... and so was one whose threads wait for each other this long."""


@dataclass(frozen=True)
class Calibration:
    """What was measured, when, and on what. ``read_gb_s[t-1]`` is for ``t`` threads together.

    ``l1_gb_s`` to ``l3_gb_s`` are of one thread. ``rates`` and ``latency`` are those of
    :class:`qigen.targets.machine.Machine`, for the vector widths that the processor has.
    ``streams`` is how many sequential streams a thread reads best side by side (0: not measured).
    """

    date: str
    processor: str
    cores: int
    features: tuple[str, ...]
    cache_bytes: tuple[int, int, int]
    read_gb_s: tuple[float, ...]
    barrier_us: float
    l1_gb_s: float = 0.0
    l2_gb_s: float = 0.0
    l3_gb_s: float = 0.0
    rates: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    latency: Mapping[str, float] = field(default_factory=dict)
    streams: int = 0

    def doubts(self, machine: Machine) -> str:
        """What the user should know if other programs seem to have run beside the measurement:
        far from what the table's row says, which ``machine`` is; '' if nothing is odd."""
        threads = min(self.cores, len(machine.read_gb_s), len(self.read_gb_s))
        read, said = self.read_gb_s[threads - 1], machine.read_gb_s[threads - 1]
        odd = []
        if read < _ODD_READ * said:
            odd.append(f"memory reads {read:.1f} GB/s, where machines of its kind read {said:.0f}")
        if self.barrier_us > _ODD_BARRIER_US:
            odd.append(f"a barrier takes {self.barrier_us:.0f} us")
        if not odd:
            return ""
        return f"{' and '.join(odd)}: if other programs were running, calibrate again without them"

    def changes(self, machine: Machine) -> list[str]:
        """In words, how ``machine`` (this one now) differs from what was measured."""
        found = []
        if self.processor != processor():
            found.append(f"the processor was {self.processor} and is {processor()}")
        if self.cores != machine.cores:
            found.append(f"it had {self.cores} usable cores and has {machine.cores}")
        if set(self.features) != set(machine.features):
            different = sorted(set(self.features) ^ set(machine.features))
            found.append(f"its features differ in {' '.join(different)}")
        if self.cache_bytes != (machine.l1d_bytes, machine.l2_bytes, machine.l3_bytes):
            found.append("its caches have other sizes")
        return found

    def applied(self, machine: Machine) -> Machine:
        """The machine with the measured values."""
        rates = dict(machine.rates)
        for width, measured in self.rates.items():
            if width in rates:
                row = rates[width]
                per_cycle = {k: measured.get(k, row.per_cycle[k]) for k in CLASSES}
                rates[width] = Rates(
                    per_cycle, measured.get("vector", row.vector), measured.get("ghz", row.ghz)
                )
        return replace(
            machine,
            description=f"{machine.description} (calibrated {self.date})",
            read_gb_s=self.read_gb_s,
            barrier_us=self.barrier_us or machine.barrier_us,
            l1_gb_s=self.l1_gb_s or machine.l1_gb_s,
            l2_gb_s=self.l2_gb_s or machine.l2_gb_s,
            l3_gb_s=self.l3_gb_s or machine.l3_gb_s,
            rates=rates,
            latency={**machine.latency, **self.latency},
            calibrated=self.date,
            streams=self.streams or machine.streams,
        )


def processor() -> str:
    """The processor's name as the operating system writes it, with its family and model: virtual
    machines give different processors the same name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found: dict[str, str] = {}
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
        if "model name" in found:
            numbers = ".".join(found.get(k, "?") for k in ("cpu family", "model", "stepping"))
            return f"{found['model name']} {numbers}"
    return platform.processor() or platform.machine()


def data_file() -> Path:
    """Where the calibration lies: in QIGEN_DATA, else in the user's data folder."""
    return data_folder() / "calibration.json"


def thread_counts(cores: int) -> tuple[int, ...]:
    """The numbers of threads to measure: all up to 8, then ever coarser, and ``cores`` itself."""
    counts = set(range(1, min(cores, 8) + 1)) | {cores}
    step = 12
    while step < cores:
        counts |= {step, min(cores, step * 4 // 3)}
        step *= 2
    return tuple(sorted(counts))


def calibrate(
    machine: Machine, run_compiler: RunCompiler, seconds: float = SECONDS
) -> Calibration:
    """Measure this machine for ``seconds`` in all.

    Raises ToolchainError from the compiler, QigenError if the program fails.
    """
    counts = thread_counts(machine.cores)
    share = max(1, (available_memory() >> 20) // (2 * machine.cores))
    mib = min(_MIB_AT_MOST, max(16, 4 * (machine.l3_bytes >> 20)), share)
    caches = (machine.l1d_bytes, machine.l2_bytes, machine.l3_bytes)
    with tempfile.TemporaryDirectory(prefix="qigen-") as folder:
        program = Path(folder) / "calibrate"
        source = resource_folder("templates") / "tools" / "calibrate.cpp"
        include = resource_folder("runtime") / "include"
        run_compiler(
            [
                "-std=c++17", "-O3", "-pthread", f"-I{include}",
                *(f"-m{name}" for name in machine.features if name in _COMPILED),
                str(source), "-o", str(program),
            ],
            source.name,
        )  # fmt: skip
        done = subprocess.run(
            [program, ",".join(map(str, counts)), str(mib), *map(str, caches), str(seconds)],
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        raise QigenError("the calibration program failed; is there enough memory?", source.name)
    values = {name: float(value) for name, value in map(str.split, done.stdout.splitlines())}
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Calibration(
        date=today,
        processor=processor(),
        cores=machine.cores,
        features=machine.features,
        cache_bytes=caches,
        read_gb_s=_bandwidths({t: values[f"read.{t}"] for t in counts}),
        barrier_us=values.get(f"barrier.{machine.cores}", 0.0),
        l1_gb_s=values["l1"],
        l2_gb_s=values["l2"],
        l3_gb_s=values["l3"],
        rates=_rates(values),
        latency=_latencies(values, max(machine.rates)),
        streams=_streams({s: values[f"streams.{s}"] for s in (1, 2, 4)}),
    )


_WORTH = 1.03
"""More streams must read faster by so much: their tiles need more registers."""


def _streams(measured: Mapping[int, float]) -> int:
    """The streams to read side by side, from GB/s by their number."""
    best = 1
    for streams in sorted(measured):
        if measured[streams] > _WORTH * measured[best]:
            best = streams
    return best


_COMPILED = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
"""Features that the calibration program is compiled for, where the machine has them."""


def _bandwidths(measured: Mapping[int, float]) -> tuple[float, ...]:
    """GB/s for every number of threads: between measured ones on a line, and never falling: what
    fewer threads reach, more can reach too."""
    counts = sorted(measured)
    values: list[float] = []
    for t in range(1, counts[-1] + 1):
        above = next(c for c in counts if c >= t)
        below = max(c for c in counts if c <= t)
        part = (t - below) / (above - below) if above > below else 0.0
        value = measured[below] + part * (measured[above] - measured[below])
        values.append(max([value, *values[-1:]]))
    return tuple(values)


def _rates(values: Mapping[str, float]) -> dict[int, dict[str, float]]:
    rates: dict[int, dict[str, float]] = {}
    for width in _WIDTHS:
        if f"ghz.{width}" not in values:
            continue
        row = {k: values[f"rate.{width}.{k}"] for k in (*CLASSES, "vector")}
        # no class that computes is faster than what the ports take of all
        row["vector"] = max(row["vector"], row["logic"], row["fma"])
        rates[width] = {**row, "ghz": values[f"ghz.{width}"]}
    return rates


def _latencies(values: Mapping[str, float], width: int) -> dict[str, float]:
    """Of the widest vectors: they are those that the kernels use."""
    if f"latency.{width}.fma" not in values:
        return {}
    return {k: values[f"latency.{width}.{k}"] for k in _LATENCIES}


def check_data_folder() -> None:
    """QigenError if the data folder cannot be written: before a long measurement, not after it."""
    path = data_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> QigenError:
    return QigenError(
        f"cannot be written ({error.strerror}); set QIGEN_DATA to a folder of yours", str(path)
    )


def save(calibration: Calibration) -> Path:
    """Store a calibration for later runs; QigenError if the data folder cannot be written."""
    path = data_file()
    data = {"version": VERSION, **dataclasses.asdict(calibration)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(data, indent=1), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def load() -> Calibration | None:
    """The stored calibration; None if there is none, and with a warning if it cannot be used."""
    path = data_file()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            warnings.warn(f"{path} is of another version of qigen; calibrate again", stacklevel=2)
            return None
        found = Calibration(
            date=str(data["date"]),
            processor=str(data["processor"]),
            cores=int(data["cores"]),
            features=tuple(map(str, data["features"])),
            cache_bytes=_three(data["cache_bytes"]),
            read_gb_s=tuple(map(_positive, data["read_gb_s"])),
            barrier_us=float(data["barrier_us"]),
            l1_gb_s=_positive(data["l1_gb_s"]),
            l2_gb_s=_positive(data["l2_gb_s"]),
            l3_gb_s=_positive(data["l3_gb_s"]),
            rates={
                int(width): {str(k): _positive(v) for k, v in row.items()}
                for width, row in data["rates"].items()
            },
            latency={str(k): _positive(v) for k, v in data["latency"].items()},
            streams=int(data["streams"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        warnings.warn(f"{path} is damaged and ignored; calibrate again", stacklevel=2)
        return None
    if not found.read_gb_s:
        warnings.warn(f"{path} has no bandwidths and is ignored; calibrate again", stacklevel=2)
        return None
    return found


def _positive(value: object) -> float:
    number = float(str(value))
    if not 0 < number < 1e9:
        raise ValueError(f"{value} is no measurement")
    return number


def _three(values: Sequence[object]) -> tuple[int, int, int]:
    first, second, third = (int(str(v)) for v in values)
    return first, second, third
