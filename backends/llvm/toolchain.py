"""The llvm backend as a compiler: its processes, the library that hosts models, the linking."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from qigen import toolchain
from qigen.backends.llvm.attach import attach
from qigen.errors import BadInput, ToolchainError, Unsupported
from qigen.paths import resource_folder
from qigen.targets import Machine
from qigen.targets.features import host_architecture, host_system

HOST_LIBRARY = "libqigen_host.so"
"""The runtime with a place for a model, as the installation builds it."""

_APART = ("__init__", "attach", "toolchain", "worker")
"""The modules that have no part in what an object file holds."""

_RAISED: dict[str, type[Exception]] = {"Unsupported": Unsupported, "BadInput": BadInput}


class _Worker:
    """A process that compiles, one job after the other."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the object
        # Last on the path, so that an installed package is taken as it is.
        package = str(Path(__file__).resolve().parents[2])
        start = (
            f"import sys; sys.path.append({package!r}); "
            "from qigen.backends.llvm.worker import main; main()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, encoding="utf-8", start_new_session=True,
        )  # fmt: skip

    def ask(self, job: dict[str, Any]) -> dict[str, str] | None:
        """The answer to a job; None if the process is gone."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            return None
        return json.loads(line) if line else None

    def end(self) -> str:
        """How the process ended, in words."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        code = self._process.wait()
        self._process.stdout.close()
        self._errors.seek(0)
        text = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        self._errors.close()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        first = next((t for t in text if "error" in t.lower()), text[-1] if text else "")
        return f"{name}: {first}" if first else name


class _Pool:
    """Idle workers: they end by themselves when nothing is asked for a while."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()

    def ask(self, job: dict[str, Any], what: str) -> dict[str, str]:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is not None:
            found = worker.ask(job)
            if found is None:  # it ended while it was idle, or at this job
                worker.end()
                worker = None
        if worker is None:
            worker = _Worker()
            found = worker.ask(job)
        if found is None:
            raise ToolchainError(f"LLVM gave up ({worker.end()})", what)
        with self._lock:
            self._idle.append(worker)
        return found

    def close(self) -> None:
        """End the idle workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()


_POOL = _Pool()


class LlvmCompiler(toolchain.Compiler):
    """Takes the arguments of a C++ compiler for the sources that qigen renders."""

    @property
    def label(self) -> str:
        return "llvm"

    def run(self, arguments: Sequence[str], what: str) -> None:
        """Compile a source in another process.

        Raises Unsupported for C++ that cannot be translated, ToolchainError if LLVM fails.
        """
        found = _POOL.ask({"arguments": list(arguments), "triple": self.path}, what)
        if not found:
            return
        if found["kind"] == "OSError":
            raise OSError(int(found["number"]), found["message"])
        kind = _RAISED.get(found["kind"], ToolchainError)
        raise kind(found["message"], found["where"] or what)


def find_compiler(machine: Machine) -> LlvmCompiler:
    """The compiler for a machine.

    Raises Unsupported for machines that it makes no libraries for, ToolchainError without llvmlite.
    """
    if (machine.architecture, machine.system) != ("x86_64", "linux"):
        raise Unsupported(
            f"the llvm backend makes no code for {machine.architecture} {machine.system} yet; "
            "leave --backend out"
        )
    if importlib.util.find_spec("llvmlite") is None:
        raise ToolchainError(
            "the llvm backend needs llvmlite; install it with pip install 'qigen[llvm]'"
        )
    version = importlib.metadata.version("llvmlite")
    return LlvmCompiler("x86_64-unknown-linux-gnu", f"llvmlite {version} {_sources()}")


@functools.lru_cache(maxsize=1)
def _sources() -> str:
    """A hash of what turns sources into IR: objects of another version are not reused."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.stem not in _APART:
            digest.update(file.read_bytes())
    digest.update((resource_folder("templates") / "llvm" / "primitives.ll.j2").read_bytes())
    return digest.hexdigest()


def host_library() -> Path:
    """The library that hosts models.

    The installation brings it along; in a source tree it is built once with a C++ compiler.
    ToolchainError if there is neither.
    """
    runtime = resource_folder("runtime")
    installed = runtime / "lib" / HOST_LIBRARY
    if installed.is_file():
        return installed
    units = [
        toolchain.Unit(
            file.stem, file.read_text(), toolchain.RUNTIME_FLAGS, {},
            (runtime / "include", runtime / "src"),
        )
        for file in sorted([*(runtime / "src").glob("*.cpp"), *(runtime / "host").glob("*.cpp")])
    ]  # fmt: skip
    folder = toolchain.cache_folder() / "host"
    digest = hashlib.blake2b(digest_size=16)
    for unit in units:
        digest.update(unit.text.encode())
    for header in sorted([*(runtime / "src").glob("*.h"), *(runtime / "include").rglob("*.h")]):
        digest.update(header.read_bytes())
    built = folder / f"{digest.hexdigest()}.so"
    if built.is_file():
        return built
    try:
        compiler = toolchain.find_compiler(host_architecture(), host_system())
    except ToolchainError as error:
        raise ToolchainError(
            "this installation lacks the runtime's library, which the llvm backend needs: install "
            f"qigen again ({error.message})",
            str(runtime),
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    with toolchain.ObjectCache(compiler, os.cpu_count() or 1) as cache:
        objects = [future.result() for future in [cache.compile(unit) for unit in units]]
    with tempfile.TemporaryDirectory(prefix="qigen-", dir=folder) as name:
        library = Path(name) / toolchain.LIBRARY_NAMES["linux"]
        toolchain.link_shared(compiler, objects, runtime / "qigen.map", library)
        library.replace(built)
    return built


def link(objects: Sequence[Future[Path]], library: Path) -> None:
    """Write the library of an artifact: the runtime with the objects of its model."""
    paths = [future.result() for future in objects]
    parts = [(path.name, path.read_bytes()) for path in paths]
    library.write_bytes(attach(host_library().read_bytes(), parts))
    library.chmod(0o755)
