"""Libraries for other processors, run under qemu-user as if they were loaded here.

:func:`open_library` gives what ``ctypes.CDLL`` gives to the tests: functions that take integers,
pointers, structs by reference and floats. Where the library is for this machine it is a CDLL.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qigen.backends.base import Isa
from qigen.targets.features import host_architecture


@dataclass(frozen=True)
class Emulator:
    """How to compile and run for another architecture. ``cpu`` has every feature of the rows."""

    compiler: str
    qemu: str
    cpu: str
    sysroot: str
    install: str


EMULATORS = {
    "aarch64": Emulator(
        "aarch64-linux-gnu-g++", "qemu-aarch64", "max", "/usr/aarch64-linux-gnu",
        "apt-get install qemu-user g++-aarch64-linux-gnu"),
}
_MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine of ELF


def foreign(isa: Isa) -> bool:
    """Whether an ISA is for another architecture than this machine's."""
    return isa.architecture not in ("", host_architecture())


def compiler_for(isa: Isa) -> str | None:
    """The C++ compiler that makes code for an ISA, or None if this machine has none."""
    if foreign(isa):
        emulator = EMULATORS.get(isa.architecture)
        return shutil.which(emulator.compiler) if emulator else None
    return shutil.which("g++") or shutil.which("c++")


def why_not(isa: Isa) -> str:
    """Why code for another architecture cannot run here; '' if it can."""
    emulator = EMULATORS.get(isa.architecture)
    if emulator is None:
        return f"there is no emulator of {isa.architecture}"
    missing = [tool for tool in (emulator.compiler, emulator.qemu) if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)} to emulate {isa.name} (Debian: {emulator.install})"
    return ""


@functools.lru_cache(maxsize=4)
def _server(compiler: str, folder: Path) -> Path:
    source = Path(__file__).with_name("foreign_server.cpp")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:20]
    target = folder / f"server-{Path(compiler).name}-{digest}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            out = Path(scratch, "out")
            subprocess.run([compiler, "-std=c++17", "-O1", str(source), "-ldl", "-o", str(out)],
                           check=True)
            out.replace(target)
    return target


class ForeignLibrary:
    """A library in an emulator. Attributes are its functions."""

    def __init__(self, path: Path, emulator: Emulator) -> None:
        _allow_ptrace()
        server = _server(emulator.compiler, path.parent)
        self._process = subprocess.Popen(
            [emulator.qemu, "-cpu", emulator.cpu, "-L", emulator.sysroot, str(server), str(path),
             str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        weakref.finalize(self, self._process.kill)
        self._functions: dict[str, ForeignFunction] = {}
        self.answer("start")

    def answer(self, what: str) -> str:
        """The next line of the server; it fails if there is none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the emulator ended with {self._process.wait()} in {what}"
        return line

    def send(self, line: str) -> None:
        """A request."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def __getattr__(self, name: str) -> ForeignFunction:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._functions.setdefault(name, ForeignFunction(self, name))


class ForeignFunction:
    """A function; the result is an integer, whatever ``restype`` is set to."""

    def __init__(self, library: ForeignLibrary, name: str) -> None:
        self._library, self._name = library, name
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> int:
        integers: list[str] = []
        floats: list[str] = []
        for a in arguments:
            if isinstance(a, (ctypes.c_float, float)):
                floats.append(float(getattr(a, "value", a)).hex())
            elif hasattr(a, "_obj"):  # byref
                integers.append(str(ctypes.addressof(a._obj)))
            else:
                integers.append(str(getattr(a, "value", a) or 0))
        assert len(integers) <= 8 and len(floats) <= 2, "arguments go in registers alone"
        self._library.send(" ".join([self._name, str(len(integers)), *integers,
                                     str(len(floats)), *floats]))
        word, result = self._library.answer(self._name).split()
        assert word == "ok"
        return int(result)


@functools.lru_cache(maxsize=1)
def _allow_ptrace() -> None:
    """Let a child write this process's memory where the Yama module restricts that."""
    pr_set_ptracer, anyone = 0x59616D61, ctypes.c_ulong(-1)
    ctypes.CDLL(None).prctl(pr_set_ptracer, anyone, 0, 0, 0)


def open_library(path: Path) -> Any:
    """The library, loaded here or in an emulator by what its header says it is for."""
    machine = _MACHINES[int.from_bytes(path.read_bytes()[18:20], "little")]
    if machine == host_architecture():
        return ctypes.CDLL(str(path))
    return ForeignLibrary(path, EMULATORS[machine])
