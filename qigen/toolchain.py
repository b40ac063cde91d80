"""The C++ compiler: found, probed, and asked in parallel; objects are cached by content.

An object's key is the hash of its text, of the headers it includes, of the flags and of the
compiler's version, so a kernel is compiled once per machine, whichever model asks for it.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from qigen.errors import ToolchainError
from qigen.targets.features import host_architecture, host_system

_CANDIDATES = ("g++", "clang++", "c++")
# What the compiler, assembler and linker say of a full disk, a quota and `ulimit -f`.
_DISK_FULL = (
    "No space left on device", "Disk quota exceeded", "File too large", "File size limit exceeded",
)  # fmt: skip
_INSTALL = (
    "install one (Debian: apt-get install g++; from PyPI: pip install 'qigen[zig]') or set "
    "QIGEN_CXX to its path"
)
_GLIBC = "2.28"  # the oldest C library that what zig makes for Linux asks for
_ZIG_TARGETS = {
    ("x86_64", "linux"): f"x86_64-linux-gnu.{_GLIBC}",
    ("aarch64", "linux"): f"aarch64-linux-gnu.{_GLIBC}",
    ("x86_64", "macos"): "x86_64-macos",
    ("aarch64", "macos"): "aarch64-macos",
    ("x86_64", "windows"): "x86_64-windows-gnu",
    ("aarch64", "windows"): "aarch64-windows-gnu",
}
LIBRARY_NAMES = {"linux": "model.so", "macos": "model.dylib", "windows": "model.dll"}
"""What the library of an artifact is called, by system."""


_COMMON_FLAGS = (
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
    "-ffunction-sections", "-fdata-sections", "-fno-math-errno", "-ffp-contract=off",
)  # fmt: skip
# Generated code: no exceptions, and nothing the linker could merge with the runtime's copies.
KERNEL_FLAGS = (
    *_COMMON_FLAGS, "-O3", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-Wno-psabi",
)  # fmt: skip
RUNTIME_FLAGS = (*_COMMON_FLAGS, "-O2", "-pthread", "-DQIGEN_EXPORTS")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its path and the first line of its version.

    ``first`` are arguments that come before all others; ``zig``: it is zig, which names processors
    its own way.
    """

    path: str
    version: str
    first: tuple[str, ...] = ()
    zig: bool = False

    @property
    def label(self) -> str:
        """What messages call it."""
        return "zig" if self.zig else self.path

    def run(self, arguments: Sequence[str], what: str) -> None:
        """Run the compiler; ToolchainError with the first lines of its complaint.

        OSError (ENOSPC) if it met a full disk.
        """
        try:
            done = subprocess.run(
                [self.path, *self.first, *self._translated(arguments)],
                capture_output=True,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise ToolchainError(
                f"{self.label} cannot be run ({error.strerror}); {_INSTALL}", what
            ) from None
        if done.returncode != 0:
            if any(text in done.stderr for text in _DISK_FULL):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            shown = " | ".join((lines or done.stderr.splitlines())[:3])
            raise ToolchainError(f"{self.label} failed: {shown}", what)

    @property
    def archiver(self) -> list[str]:
        """The command that makes static libraries of this compiler's objects."""
        if self.zig:
            return [self.path, "-m", "ziglang", "ar"]
        name = re.sub(r"(g|clang|c)\+\+(-[\d.]+)?$", "ar", Path(self.path).name)
        beside = Path(self.path).with_name(name)
        found = str(beside) if beside.exists() else shutil.which(name) or shutil.which("ar")
        if found is None:
            raise ToolchainError("there is no ar to make a static library with; install binutils")
        return [found]

    def _translated(self, arguments: Sequence[str]) -> list[str]:
        """Zig takes a processor with features where GCC takes an architecture with extensions."""
        if not self.zig:
            return list(arguments)
        return [re.sub(r"^-march=armv8[.\d]*-a", "-mcpu=generic", a) for a in arguments]


@functools.lru_cache(maxsize=8)
def _probe(path: str) -> Compiler:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace")
    if done.returncode != 0 or not done.stdout:
        raise ToolchainError(f"{path} is no working C++ compiler; {_INSTALL}")
    return Compiler(path, done.stdout.splitlines()[0])


@functools.lru_cache(maxsize=8)
def _find_zig(architecture: str, system: str) -> Compiler | None:
    """Zig from its wheel, for a target; None if it is not installed."""
    if importlib.util.find_spec("ziglang") is None or (architecture, system) not in _ZIG_TARGETS:
        return None
    command = ("-m", "ziglang")
    done = subprocess.run(
        [sys.executable, *command, "version"], capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        raise ToolchainError("the package ziglang does not work; install it again")
    triple = _ZIG_TARGETS[architecture, system]
    return Compiler(
        sys.executable,
        f"zig {done.stdout.strip()} for {triple}",
        (*command, "c++", "-target", triple, "-fno-sanitize=all"),
        zig=True,
    )


def find_compiler(architecture: str = "", system: str = "") -> Compiler:
    """The compiler that makes code for an architecture and system (default: this machine's).

    The one named by QIGEN_CXX or CXX; else for this machine the first of g++, clang++, c++ on the
    PATH, for another Linux its GNU cross-compiler; else zig. ToolchainError says what to install.
    """
    architecture = architecture or host_architecture()
    system = system or host_system()
    here = (architecture, system) == (host_architecture(), host_system())
    for variable in ("QIGEN_CXX", "CXX") if here else ("QIGEN_CXX",):
        named = os.environ.get(variable)
        if named:
            found = shutil.which(named)
            if found is None:
                raise ToolchainError(f"{variable} names {named}, which does not exist; {_INSTALL}")
            return _probe(found)
    cross = (f"{architecture}-linux-gnu-g++",) if system == "linux" else ()
    for name in _CANDIDATES if here else cross:
        found = shutil.which(name)
        if found is not None:
            return _probe(found)
    zig = _find_zig(architecture, system)
    if zig is not None:
        return zig
    if here:
        raise ToolchainError(f"there is no C++ compiler on the PATH; {_INSTALL}")
    package = f"Debian: apt-get install g++-{architecture.replace('_', '-')}-linux-gnu; "
    raise ToolchainError(
        f"there is no compiler for {architecture} {system} here; install one "
        f"({package if system == 'linux' else ''}from PyPI: pip install 'qigen[zig]')"
    )


def cache_folder() -> Path:
    """Where objects are cached: QIGEN_CACHE, else the user's cache folder."""
    named = os.environ.get("QIGEN_CACHE")
    return Path(named) if named else Path(platformdirs.user_cache_dir("qigen"))


@dataclass(frozen=True)
class Unit:
    """A translation unit. ``headers`` are the generated ones that it includes, by file name."""

    name: str
    text: str
    flags: tuple[str, ...]
    headers: Mapping[str, str]
    include_folders: tuple[Path, ...] = ()


class ObjectCache:
    """Compiles units on a pool of threads; equal units are compiled once, ever.

    Use as a context manager. ``hits`` and ``misses`` count what :meth:`compile` was asked for.
    """

    def __init__(self, compiler: Compiler, jobs: int, folder: Path | None = None) -> None:
        self.compiler = compiler
        self.folder = (folder or cache_folder()) / "objects"
        self._pool = ThreadPoolExecutor(max_workers=max(1, jobs))
        self.hits = 0
        self.misses = 0

    def __enter__(self) -> ObjectCache:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def key(self, unit: Unit) -> str:
        """The content hash that names the unit's object.

        Comments are left out: they tell of the model that asked for a kernel, which others share.
        """
        code = "\n".join(
            line for line in unit.text.splitlines() if not line.lstrip().startswith("//")
        )
        digest = hashlib.blake2b(digest_size=20)
        for part in (self.compiler.version, *unit.flags, code):
            digest.update(part.encode() + b"\0")
        for name in sorted(unit.headers):
            digest.update(f"{name}\0{unit.headers[name]}\0".encode())
        for folder in unit.include_folders:
            for file in sorted(folder.rglob("*.h")):
                digest.update(file.read_bytes())
        return digest.hexdigest()

    def compile(self, unit: Unit, done: Callable[[str], None] | None = None) -> Future[Path]:
        """The object file of the unit, when it is there."""
        target = self.folder / f"{unit.name[:80]}-{self.key(unit)}.o"
        if target.exists():
            self.hits += 1
            os.utime(target)
            ready: Future[Path] = Future()
            ready.set_result(target)
            if done:
                done(unit.name)
            return ready
        self.misses += 1
        return self._pool.submit(self._compile, unit, target, done)

    def _compile(self, unit: Unit, target: Path, done: Callable[[str], None] | None) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="qigen-", dir=target.parent) as name:
            folder = Path(name)
            for header, text in unit.headers.items():
                (folder / header).write_text(text)
            source = folder / f"{unit.name[:80]}.cpp"
            source.write_text(unit.text)
            includes = [f"-I{folder}", *(f"-I{f}" for f in unit.include_folders)]
            out = folder / "out.o"
            files = ["-c", str(source), "-o", str(out)]
            self.compiler.run([*unit.flags, *includes, *files], unit.name)
            out.replace(target)
        if done:
            done(unit.name)
        return target


class SourceCollector:
    """Takes the place of an :class:`ObjectCache` where sources are wanted and nothing is compiled.

    ``units`` are what :meth:`compile` was asked for.
    """

    hits = misses = 0

    def __init__(self) -> None:
        self.units: list[Unit] = []

    def __enter__(self) -> SourceCollector:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def compile(self, unit: Unit, done: Callable[[str], None] | None = None) -> Future[Path]:
        """Note the unit; the path of the result is that of its source."""
        self.units.append(unit)
        if done:
            done(unit.name)
        ready: Future[Path] = Future()
        ready.set_result(Path(f"{unit.name}.cpp"))
        return ready


def link_static(compiler: Compiler, objects: Sequence[Path], output: Path) -> None:
    """Make a static library."""
    command = [*compiler.archiver, "rcs", str(output), *map(str, objects)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ToolchainError(f"{command[0]} cannot be run ({error.strerror})") from None
    if done.returncode != 0:
        if any(text in done.stderr for text in _DISK_FULL):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ToolchainError(f"{command[0]} failed: {done.stderr[:300]}", output.name)


def link_shared(
    compiler: Compiler,
    objects: Sequence[Path],
    version_script: Path,
    output: Path,
    system: str = "linux",
    libraries: Sequence[str] = (),
) -> None:
    """Link the library of an artifact: only the C interface is exported, unused sections are
    dropped. ``libraries`` are options that come behind the objects."""
    options = {
        "linux": [
            f"-Wl,-soname,{output.name}",  # programs that link it ask for it by this name
            f"-Wl,--version-script={version_script}",
            "-Wl,-z,defs",
            "-Wl,--gc-sections",
            "-Wl,--build-id=none",
        ],
        # what is hidden is not exported
        "macos": [f"-Wl,-install_name,@rpath/{output.name}", "-Wl,-dead_strip"],
        "windows": ["-Wl,--gc-sections"],
    }[system]
    if compiler.zig and system == "linux":
        # The C++ library inside leaves destructors of thread-specific data behind (those of the
        # exceptions of each thread), which would run after the library is unmapped.
        options.append("-Wl,-z,nodelete")
    objects_ = map(str, objects)
    compiler.run(
        ["-shared", "-pthread", *options, *objects_, *libraries, "-o", str(output)], output.name
    )
