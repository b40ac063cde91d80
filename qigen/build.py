"""What every compilation shares: the staging folder, the flags, the runtime's objects."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qigen import toolchain
from qigen.artifact import file_entry, write_manifest
from qigen.backends.base import Isa
from qigen.codegen.render import render
from qigen.errors import UsageError
from qigen.paths import resource_folder
from qigen.targets import Machine

Progress = Callable[[str, int, int], None]


def check_output(out: Path) -> None:
    if out.exists() and not (out / "manifest.json").is_file():
        raise UsageError("it exists and is no artifact; choose another output", str(out))
    if not out.parent.is_dir():
        raise UsageError("its parent folder does not exist", str(out))


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place if the block succeeds and vanishes if not."""
    try:
        name = tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise UsageError(f"cannot write there: {error.strerror}", str(out)) from None
    staging = Path(name)
    staging.chmod(0o755)
    try:
        yield staging
        _replace(staging, out)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UsageError(
                "the disk is full; free some space there, in the temporary folder and in "
                f"{toolchain.cache_folder()}, or choose another output",
                str(out),
            ) from None
        raise
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _replace(staging: Path, out: Path) -> None:
    """Move a folder to ``out``. What is there goes only when that has succeeded."""
    if not out.exists():
        staging.replace(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    aside = old / out.name
    try:
        out.replace(aside)
        staging.replace(out)
    except BaseException:
        if aside.exists():
            aside.replace(out)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def included(text: str, headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that a source includes, directly or not: its cache key holds no others."""
    found: dict[str, str] = {}
    queue = [text]
    while queue:
        body = queue.pop()
        for name, header in headers.items():
            if name not in found and f'#include "{name}"' in body:
                found[name] = header
                queue.append(header)
    return found


def write_sources(folder: Path, headers: dict[str, str], units: list[toolchain.Unit]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in headers.items():
        (folder / name).write_text(text)
    for unit in units:
        (folder / f"{unit.name}.cpp").write_text(unit.text)


def runtime_units() -> list[toolchain.Unit]:
    """The runtime, which becomes part of every artifact."""
    runtime = resource_folder("runtime")
    folders = (runtime / "include", runtime / "src")
    return [
        toolchain.Unit(file.stem, file.read_text(), toolchain.RUNTIME_FLAGS, {}, folders)
        for file in sorted((runtime / "src").glob("*.cpp"))
    ]


def find_compiler(machine: Machine, form: str = "library") -> toolchain.Compiler:
    """The compiler that makes code for a machine; sources alone need none."""
    if form == "source":
        return toolchain.Compiler("", "none: the artifact is source code")
    return toolchain.find_compiler(machine.architecture, machine.system)


def check_isa(isa: Isa, machine: Machine, native: bool) -> None:
    """UsageError if an ISA row that was asked for is not one of the target's processor.

    ``native``: the target is this machine, for which any row of its architecture can be compiled,
    to run elsewhere.
    """
    if isa.architecture not in ("", machine.architecture):
        raise UsageError(
            f"--isa {isa.name} is for {isa.architecture}, but the target {machine.name} is "
            f"{machine.architecture}"
        )
    lacks = [feature for feature in isa.features if feature not in machine.features]
    if lacks and not native:
        raise UsageError(
            f"--isa {isa.name} contradicts --target {machine.name}, which lacks "
            f"{', '.join(lacks)}; take another target, or {machine.name}+{'+'.join(lacks)} if "
            "yours has them"
        )


def describe_target(machine: Machine, isa: Isa) -> dict[str, Any]:
    """The manifest's entry of what an artifact is for."""
    return {
        "machine": machine.name,
        "isa": isa.name,
        "features": list(isa.features),
        "architecture": machine.architecture,
        "system": machine.system,
    }


FORMS = ("library", "static", "source")
"""What an artifact's code can be: a shared library, a static one, or C++ with a CMakeLists.txt."""

STATIC_LIBRARY = "libmodel.a"


def open_cache(
    form: str, compiler: toolchain.Compiler, jobs: int
) -> toolchain.ObjectCache | toolchain.SourceCollector:
    """What takes the units of a compilation, as a context manager."""
    if form == "source":
        return toolchain.SourceCollector()
    return toolchain.ObjectCache(compiler, jobs)


def link(
    compiler: toolchain.Compiler,
    cache: toolchain.ObjectCache | toolchain.SourceCollector,
    objects: Sequence[Future[Path]],
    staging: Path,
    system: str = "linux",
    form: str = "library",
    libraries: Sequence[str] = (),
) -> None:
    """Make what the form asks for. The runtime's objects come first: what both define is taken from
    the one without ISA flags."""
    script = resource_folder("runtime") / "qigen.map"
    if isinstance(cache, toolchain.SourceCollector):
        _write_project(cache.units, script, staging)
        return
    paths = [o.result() for o in objects]
    if form == "static":
        toolchain.link_static(compiler, paths, staging / STATIC_LIBRARY)
        return
    library = staging / toolchain.LIBRARY_NAMES[system]
    toolchain.link_shared(compiler, paths, script, library, system, libraries)
    for left in staging.glob("*.pdb"):  # for debuggers
        left.unlink()
    for left in staging.glob("*.lib"):  # what programs link with; zig names it by the first object
        left.rename(staging / "model.lib")


def _write_project(units: Sequence[toolchain.Unit], script: Path, staging: Path) -> None:
    """Write units with their headers and a CMakeLists.txt that builds them without qigen.

    Units with the same flags share a folder.
    """
    runtime = resource_folder("runtime")
    shutil.copytree(runtime / "include", staging / "include")
    shutil.copyfile(script, staging / "qigen.map")
    groups: dict[tuple[str, ...], list[toolchain.Unit]] = {}
    for unit in units:
        groups.setdefault(unit.flags, []).append(unit)
    parts = []
    for number, (flags, members) in enumerate(groups.items()):
        name = "runtime" if flags == toolchain.RUNTIME_FLAGS else f"generated{number}"
        folder = staging / "src" / name
        folder.mkdir(parents=True)
        headers: dict[str, str] = {}
        for unit in members:
            for header, text in unit.headers.items():
                assert headers.setdefault(header, text) == text, f"two headers {header}"
        if flags == toolchain.RUNTIME_FLAGS:
            headers |= {f.name: f.read_text() for f in (runtime / "src").glob("*.h")}
        for header, text in headers.items():
            (folder / header).write_text(text)
        for unit in members:
            (folder / f"{unit.name}.cpp").write_text(unit.text)
        options = [f for f in flags if f not in ("-std=c++17", "-fPIC", "-pthread")]
        parts.append(
            {"folder": f"src/{name}", "files": sorted(u.name for u in members), "options": options}
        )
    text = render("model/CMakeLists.txt.j2", parts=parts)
    (staging / "CMakeLists.txt").write_text(text)


def write_interface(
    staging: Path, model: Any, name: str, system: str = "linux", form: str = "library"
) -> None:
    """The headers and the CMake package of an artifact."""
    stem = identifier(name)
    (staging / "model.h").write_text(render("model/model.h.j2", model=model, stem=stem))
    include = resource_folder("runtime") / "include"
    shutil.copyfile(include / "qigen.h", staging / "qigen.h")
    cmake = staging / "cmake"
    cmake.mkdir()
    library = STATIC_LIBRARY if form == "static" else toolchain.LIBRARY_NAMES[system]
    config = render("model/config.cmake.j2", stem=stem, library=library)
    (cmake / "qigen_model-config.cmake").write_text(config)


def finish(staging: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, which lists all files that are there."""
    files = {
        str(f.relative_to(staging)): file_entry(f)
        for f in sorted(staging.rglob("*"))
        if f.is_file()
    }
    write_manifest(staging, {**manifest, "files": files})


def identifier(name: str) -> str:
    """A name as an identifier of C and CMake."""
    return re.sub(r"\W", "_", name, flags=re.ASCII)


def shown_name(name: str) -> str:
    """A model's name without what a C string or a terminal could choke on."""
    return re.sub(r"[^\w.+ -]", "_", name) or "model"
