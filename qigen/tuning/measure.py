"""Measures kernels side by side in a process of their own.

Candidates take turns (a disturbance hits all of them) and read weights beyond the caches. A kernel
that crashes, hangs or computes wrong numbers is reported and left out of the turns.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import selectors
import shutil
import signal
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import numpy as np

from qigen.backends.cpu.gemm import GemmSpec, render_gemm
from qigen.backends.cpu.matmul import MatmulSpec, render_matmul
from qigen.codegen.render import render
from qigen.errors import QigenError
from qigen.paths import resource_folder
from qigen.targets.topology import allowed_cpus, available_memory
from qigen.toolchain import KERNEL_FLAGS, Compiler, ObjectCache, Unit, cache_folder
from qigen.tuning.problem import Array, Case, Problem, wrong

Spec: TypeAlias = MatmulSpec | GemmSpec
"""What can be measured: gemm kernels are without an epilogue, which any tiling has alike."""

S = TypeVar("S", MatmulSpec, GemmSpec)

ROUNDS = 5
"""Turns whose median counts; the time of a kernel is the least of such medians."""

PAGES = SMALL_PAGES, HUGE_PAGES = "small", "huge"
"""Pages of the memory that weights lie on: those of 4 KiB, or of 2 MiB as far as the system has."""

_AT_LEAST = 3  # medians
_AT_MOST = 40
_CLEAR = 0.01  # differences below are not worth more turns
_SILENCE = 60.0  # seconds without a word: it hangs


@dataclass(frozen=True)
class Running:
    """A kernel that is loaded and right. ``run(R)``: microseconds of R calls, each on the next copy
    of the weight; ``stream(P)``: GB/s of reading all copies P times, one stream a thread;
    ``huge``: share of the process's memory that lies on huge pages."""

    run: Callable[[int], list[float]]
    stream: Callable[[int], list[float]]
    huge: Callable[[], float]


@dataclass(frozen=True)
class Turns:
    """Kernels that are loaded and right. ``run(R)``: microseconds of R calls of each, in turns;
    ``stream(P)``: as in :class:`Running`, of the first one's weights; ``huge``: as there."""

    run: Callable[[int], list[list[float]]]
    stream: Callable[[int], list[float]]
    huge: Callable[[], float]


@dataclass
class Outcome(Generic[S]):
    """What became of a candidate: ``status`` is 'ok', 'wrong', 'crash' or 'timeout'.

    ``us`` is the least median of some calls, ``spread`` the distance of the quartiles by the
    median of all calls, ``runs`` how many there were.
    """

    spec: S
    status: str = "ok"
    message: str = ""
    us: float = 0.0
    spread: float = 0.0
    runs: int = 0
    medians: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, times: Sequence[float]) -> None:
        """Takes the microseconds of some more calls in."""
        self.times += times
        self.medians.append(statistics.median(times))
        self.us = min(self.medians)
        self.runs = len(self.times)
        low, middle, high = np.percentile(self.times, (25, 50, 75))
        self.spread = float((high - low) / middle)


def kernel_text(spec: Spec) -> tuple[Unit, str]:
    """(the translation unit of a kernel, its hash): what was measured is valid while the hash is
    the same."""
    own, _, _ = _arguments(spec)
    headers = {
        spec.isa.header: render(spec.isa.template),
        own: render(f"cpu/{own}.j2"),
        "kernels.h": render("cpu/kernels.h.j2"),  # of epilogue.h
        "epilogue.h": render("cpu/epilogue.h.j2"),
    }
    if isinstance(spec, GemmSpec):
        text = render_gemm(spec).text
    else:
        text = render_matmul(spec, ("store",)).text
    unit = Unit(spec.name, text, (*KERNEL_FLAGS, *spec.isa.flags), headers)
    code = "\n".join(x for x in text.splitlines() if not x.lstrip().startswith("//"))
    digest = hashlib.blake2b(digest_size=12)
    for part in (*unit.flags, code, *(headers[name] for name in sorted(headers))):
        digest.update(part.encode() + b"\0")
    return unit, digest.hexdigest()


def _arguments(spec: Spec) -> tuple[str, str, str]:
    """(the header that declares a kernel's arguments, their type, the kernel's function)."""
    if isinstance(spec, GemmSpec):
        return "gemm.h", "GemmArgs", spec.name
    return "kernels.h", "MatmulArgs", spec.entry("store")


class Bench:
    """Compiles kernels and measures them. Use as a context manager.

    ``total_bytes``: weights that go through the caches between two calls with the same weight.
    ``kernels`` compiles the kernels instead of ``compiler``, which makes the rest; its functions
    are called ``prefix`` and their name.
    """

    def __init__(
        self,
        compiler: Compiler,
        jobs: int | None = None,
        kernels: Compiler | None = None,
        prefix: str = "",
    ) -> None:
        self.compiler = compiler
        self.kernels = kernels or compiler
        self.prefix = prefix
        self.jobs = jobs or os.cpu_count() or 1
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Bench:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="qigen-")))
        self.cache = self._stack.enter_context(ObjectCache(self.kernels, self.jobs))
        self._linkers = self._stack.enter_context(ThreadPoolExecutor(self.jobs))
        self._driver = self._linkers.submit(self._build_driver)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _build_driver(self) -> Path:
        source = resource_folder("templates") / "tools" / "time_kernels.cpp"
        include = resource_folder("runtime") / "include"
        _write_headers(self.folder)
        digest = hashlib.blake2b(self.compiler.version.encode(), digest_size=8)
        barrier = include / "qigen" / "generated.h"
        for file in (source, barrier, *sorted(self.folder.glob("*.h"))):
            digest.update(file.read_bytes())
        folder = cache_folder() / "tuning"
        folder.mkdir(parents=True, exist_ok=True)
        program = folder / f"{source.stem}-{digest.hexdigest()}"
        if not program.exists():
            scratch = self.folder / source.stem
            self.compiler.run(
                ["-std=c++17", "-O2", "-pthread", f"-I{include}", f"-I{self.folder}", str(source),
                 "-o", str(scratch), "-ldl"],
                source.name,
            )  # fmt: skip
            with tempfile.TemporaryDirectory(prefix="qigen-", dir=folder) as name:
                copy = Path(name) / source.stem
                shutil.copy2(scratch, copy)
                copy.replace(program)
        return program

    def build(
        self, specs: Sequence[S], done: Callable[[str], None] | None = None
    ) -> dict[S, Path]:
        """The shared libraries of kernels, compiled in parallel; ToolchainError if one fails."""
        units = {spec: kernel_text(spec) for spec in dict.fromkeys(specs)}
        objects = {spec: self.cache.compile(unit, done) for spec, (unit, _) in units.items()}
        folder = cache_folder() / "tuning"
        folder.mkdir(parents=True, exist_ok=True)
        version = hashlib.blake2b(self.kernels.version.encode(), digest_size=4).hexdigest()

        def link(spec: S) -> Path:
            target = folder / f"{spec.name[:80]}-{units[spec][1]}-{version}.so"
            found = objects[spec].result()
            if target.exists():
                return target
            with tempfile.TemporaryDirectory(prefix="qigen-", dir=folder) as name:
                scratch = Path(name)
                banner = f"// {spec.name} for measuring. Template: tools/tuned_kernel.cpp.j2."
                header, struct, entry = _arguments(spec)
                symbol = f"{self.prefix}{entry}" if self.prefix else ""
                text = render("tools/tuned_kernel.cpp.j2", banner=banner, header=header,
                              struct=struct, entry=entry, symbol=symbol)  # fmt: skip
                (scratch / "entry.cpp").write_text(text, encoding="utf-8")
                _write_headers(scratch)
                self.compiler.run(
                    ["-std=c++17", "-O2", "-fPIC", "-shared", f"-I{scratch}",
                     str(scratch / "entry.cpp"), str(found), "-o", str(scratch / "out.so")],
                    spec.name,
                )  # fmt: skip
                (scratch / "out.so").replace(target)
            return target

        return dict(zip(units, self._linkers.map(link, units), strict=True))

    def measure(
        self,
        libraries: Mapping[MatmulSpec, Path],
        n: int,
        k: int,
        m: int,
        threads: int,
        total_bytes: int,
        seconds: float = 2.0,
    ) -> list[Outcome[MatmulSpec]]:
        """Times of all kernels for x [m, k] and W [n, k], as :meth:`compete`."""
        cases = {spec: Problem(spec, n, k, m) for spec in libraries}
        return self.compete(libraries, cases, threads, total_bytes, seconds)

    def compete(
        self,
        libraries: Mapping[S, Path],
        problems: Mapping[S, Case],
        threads: int,
        total_bytes: int,
        seconds: float = 2.0,
    ) -> list[Outcome[S]]:
        """Times of all kernels, each on its case of one problem, in the order of ``libraries``.

        It ends when the order is clear, when the noise is larger than the differences, or after
        ``seconds``. QigenError if there is not enough memory.
        """
        outcomes = [Outcome(spec) for spec in libraries]
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            cases = [
                _Loaded(libraries[spec], problems[spec], folder / f"{i}.case")
                for i, spec in enumerate(libraries)
            ]
            memory = available_memory() // 2
            total = min(total_bytes, memory)
            alive = list(range(len(outcomes)))
            checked: set[int] = set()
            while alive:
                arguments = [argument for i in alive for argument in cases[i].arguments]
                with self._process(total, threads, SMALL_PAGES, arguments) as process:
                    try:
                        for place, i in enumerate(alive):
                            if i not in checked:
                                self._check(process, place, cases[i], outcomes[i])
                                checked.add(i)
                        if all(outcomes[i].status == "ok" for i in alive):
                            _take_turns(process, [outcomes[i] for i in alive], seconds)
                            return outcomes
                    except _Died as died:
                        failed = outcomes[alive[died.at]]
                        failed.status, failed.message = died.status, str(died)
                alive = [i for i in alive if outcomes[i].status == "ok"]
        return outcomes

    @contextlib.contextmanager
    def running(
        self,
        spec: MatmulSpec,
        n: int,
        k: int,
        m: int,
        threads: int,
        total_bytes: int,
        pages: str = SMALL_PAGES,
    ) -> Iterator[Running]:
        """A kernel that was found right; QigenError if it is wrong or crashes."""
        cases = [(spec, Problem(spec, n, k, m))]
        with self.turns(cases, threads, total_bytes, pages) as turns:
            yield Running(lambda rounds: turns.run(rounds)[0], turns.stream, turns.huge)

    @contextlib.contextmanager
    def turns(
        self,
        cases: Sequence[tuple[MatmulSpec, Case]],
        threads: int,
        total_bytes: int,
        pages: str = SMALL_PAGES,
    ) -> Iterator[Turns]:
        """Kernels that were found right, in one process, with weights on ``pages`` of
        :data:`PAGES`; QigenError if one is wrong or crashes."""
        libraries = self.build([spec for spec, _ in cases])
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            loaded = [
                _Loaded(libraries[spec], case, Path(name) / f"{i}.case")
                for i, (spec, case) in enumerate(cases)
            ]
            total = min(total_bytes, available_memory() // 4)
            arguments = [argument for one in loaded for argument in one.arguments]
            try:
                with self._process(total, threads, pages, arguments) as process:
                    for i, one in enumerate(loaded):
                        outcome = Outcome(cases[i][0])
                        self._check(process, i, one, outcome)
                        if outcome.message:
                            raise QigenError(outcome.message, cases[i][0].name)
                    yield Turns(
                        lambda rounds: process.ask(f"rounds {rounds}"),
                        lambda passes: process.ask(f"stream {passes}")[0],
                        lambda: huge_pages(process.pid),
                    )
            except _Died as died:
                raise QigenError(str(died), cases[died.at][0].name) from None

    def _process(
        self, total: int, threads: int, pages: str, cases: Sequence[str]
    ) -> _Process:
        cpus = ",".join(map(str, sorted(allowed_cpus())))
        program = str(self._driver.result())
        return _Process([program, str(total), str(threads), cpus, pages], cases)

    def _check(
        self,
        process: _Process,
        place: int,
        case: _Loaded,
        outcome: Outcome[S],
    ) -> None:
        """Compares what a kernel computes with the reference."""
        result = case.file.with_suffix(".y")
        process.ask(f"check {place} {result}")
        message = wrong(case.result(result), case.expected, case.bound)
        if message:
            outcome.status, outcome.message = "wrong", message


def _write_headers(folder: Path) -> None:
    """The headers of the arguments of all families."""
    for name in ("kernels.h", "gemm.h"):
        (folder / name).write_text(render(f"cpu/{name}.j2"), encoding="utf-8")


class _Loaded:
    """A case in its file, with the library of its kernel and what must come out."""

    def __init__(self, library: Path, case: Case, file: Path) -> None:
        content, self.expected, self.bound = case.build()
        file.write_bytes(content)
        self.case, self.file = case, file
        self.arguments = [str(library), str(file)]

    def result(self, path: Path) -> Array:
        """y [m, n] as the process wrote it."""
        y = np.fromfile(path, np.int32 if self.case.exact else np.float32)
        return y.reshape(self.case.m, self.case.n)


def _take_turns(process: _Process, outcomes: list[Outcome[S]], seconds: float) -> None:
    """Runs rounds until the order is clear or cannot become so."""
    process.ask("rounds 1")  # code and tables into the caches, clocks up
    end = time.monotonic() + seconds
    for taken in range(1, _AT_MOST + 1):
        times = process.ask(f"rounds {ROUNDS}")
        for outcome, own in zip(outcomes, times, strict=True):
            outcome.add(own)
        if taken < _AT_LEAST:
            continue
        if time.monotonic() >= end or settled(outcomes):
            return


def settled(outcomes: Sequence[Outcome[S]]) -> bool:
    """Whether more turns would change nothing: the best is ahead of the second by more than the
    noise of a median, or the noise is so small that what lies between them does not matter."""
    first, *rest = sorted(outcomes, key=lambda o: o.us)
    if not rest:
        return first.runs >= 2 * _AT_LEAST * ROUNDS
    second = rest[0]
    noise = max(_median_error(first), _median_error(second))
    ahead = second.us / first.us - 1
    return ahead > 2 * noise or (ahead < _CLEAR and noise < _CLEAR)


def _median_error(outcome: Outcome[S]) -> float:
    """Relative error of the median of all calls, from their spread (1.25 standard deviations by
    the root of the number, for times that are distributed normally)."""
    return 1.25 * outcome.spread / 1.35 / float(np.sqrt(max(1, outcome.runs)))


class _Died(Exception):
    """The process ended or hangs while it ran kernel ``at``."""

    def __init__(self, at: int, status: str, message: str) -> None:
        super().__init__(message)
        self.at = at
        self.status = status


def huge_pages(pid: int) -> float:
    """The share of a process's own memory that lies on huge pages; 0 if the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    kib = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines[1:])}
    return kib.get("AnonHugePages", 0) / max(1, kib.get("Anonymous", 0))


class _Process:
    """A running ``time_kernels``: it is silent while kernels run, and says in a file which one."""

    def __init__(self, arguments: Sequence[str], cases: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed in __exit__
        self._status = tempfile.NamedTemporaryFile(prefix="qigen-")  # noqa: SIM115
        self._status.write(struct.pack("2q", -1, 0))
        self._status.flush()
        self._process = subprocess.Popen(
            [*arguments, self._status.name, *cases],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is ours to handle
        )
        assert self._process.stdout is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._pending = b""
        self.pid = self._process.pid

    def __enter__(self) -> _Process:
        if self._line() != "ready":
            self._errors.seek(0)
            text = self._errors.read().decode("utf-8", "replace").strip()
            self.__exit__()
            raise QigenError(f"kernels cannot be measured: {text or 'the program ended'}")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._selector.close()
        self._errors.close()
        self._status.close()

    def ask(self, command: str) -> list[list[float]]:
        """The microseconds of each kernel that a command makes run, in the order of the kernels."""
        times: dict[int, list[float]] = {}
        at = 0
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(command.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the next line says how it ended
        while (line := self._line()) != "done":
            if line is None:
                raise self._death()
            if line.startswith("at "):
                at = int(line[3:])
                times[at] = []
            else:
                times[at].append(float(line))
        return [times[i] for i in sorted(times)]

    def _progress(self) -> tuple[int, int]:
        """(the kernel that runs, -1 before the first; calls that began)."""
        self._status.seek(0)
        at, calls = struct.unpack("2q", self._status.read(16))
        return at, calls

    def _line(self) -> str | None:
        """The next line; None if the process ended or does nothing any more."""
        _, calls = self._progress()
        while b"\n" not in self._pending:
            if not self._selector.select(_SILENCE):
                before, (_, calls) = calls, self._progress()
                if calls > before:
                    continue
                return None
            assert self._process.stdout is not None
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            if not more:
                return None
            self._pending += more
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def _death(self) -> Exception:
        at, _ = self._progress()
        if at < 0:
            return QigenError("the program that measures kernels ended before it ran one")
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return _Died(at, "timeout", f"it does nothing for {_SILENCE:.0f} s")
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _Died(at, "crash", f"it ended with {name}")
