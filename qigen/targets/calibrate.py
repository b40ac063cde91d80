"""A short measurement of this machine, kept in the user's data folder.

Read bandwidth by number of threads and the cost of a barrier differ from one machine of a kind to
the next, and decide how fast a model decodes. :func:`qigen.targets.native` uses what is stored, if
it is of this processor and number of cores.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs
import psutil  # type: ignore[import-untyped,unused-ignore]

from qigen.errors import QigenError
from qigen.paths import resource_folder
from qigen.targets.machine import Machine

RunCompiler = Callable[[Sequence[str], str], None]
"""Runs the C++ compiler with arguments; the second argument says for what."""

_SECONDS = 1.0
_MIB_AT_MOST = 512


@dataclass(frozen=True)
class Calibration:
    """What was measured, when, and on what. ``read_gb_s[t-1]`` is for ``t`` threads together."""

    date: str
    processor: str
    cores: int
    read_gb_s: tuple[float, ...]
    barrier_us: float

    def fits(self, machine: Machine) -> bool:
        """Whether it is of this processor, with as many usable cores as ``machine``."""
        return (self.processor, self.cores) == (processor(), machine.cores)

    def applied(self, machine: Machine) -> Machine:
        """The machine with the measured values."""
        return replace(
            machine,
            description=f"{machine.description} (calibrated {self.date})",
            read_gb_s=self.read_gb_s,
            barrier_us=self.barrier_us or machine.barrier_us,
        )


def processor() -> str:
    """The processor's name as the operating system writes it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def data_file() -> Path:
    """Where the calibration lies: in QIGEN_DATA, else in the user's data folder."""
    named = os.environ.get("QIGEN_DATA")
    folder = Path(named) if named else Path(platformdirs.user_data_dir("qigen"))
    return folder / "calibration.json"


def calibrate(
    machine: Machine, run_compiler: RunCompiler, seconds: float = _SECONDS
) -> Calibration:
    """Measure this machine: ``seconds`` for each number of threads up to its cores, and once more.

    Raises ToolchainError from the compiler, QigenError if the program fails.
    """
    free = psutil.virtual_memory().available >> 20
    share = max(1, free // (2 * machine.cores))
    mib = min(_MIB_AT_MOST, max(16, 4 * (machine.l3_bytes >> 20)), share)
    with tempfile.TemporaryDirectory(prefix="qigen-") as folder:
        program = Path(folder) / "calibrate"
        source = resource_folder("templates") / "tools" / "calibrate.cpp"
        include = resource_folder("runtime") / "include"
        run_compiler(
            ["-std=c++17", "-O3", "-pthread", f"-I{include}", str(source), "-o", str(program)],
            source.name,
        )
        done = subprocess.run(
            [program, str(machine.cores), str(mib), str(seconds)], capture_output=True, text=True
        )
    if done.returncode != 0:
        raise QigenError("the calibration program failed; is there enough memory?", source.name)
    *bandwidths, barrier = map(float, done.stdout.split())
    rising = [max(bandwidths[: i + 1]) for i in range(len(bandwidths))]
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Calibration(today, processor(), machine.cores, tuple(rising), barrier)


def save(calibration: Calibration) -> Path:
    """Store a calibration for later runs; QigenError if the data folder cannot be written."""
    path = data_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(dataclasses.asdict(calibration), indent=1), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise QigenError(
            f"cannot be written ({error.strerror}); set QIGEN_DATA to a folder of yours", str(path)
        ) from None
    return path


def load() -> Calibration | None:
    """The stored calibration; None (and a warning, if there is a damaged one) if there is none."""
    path = data_file()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = Calibration(
            str(data["date"]),
            str(data["processor"]),
            int(data["cores"]),
            tuple(float(x) for x in data["read_gb_s"]),
            float(data["barrier_us"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        warnings.warn(f"{path} is damaged and ignored; calibrate again", stacklevel=2)
        return None
    if not found.read_gb_s or min(found.read_gb_s) <= 0:
        warnings.warn(f"{path} has no bandwidths and is ignored; calibrate again", stacklevel=2)
        return None
    return found
