"""Compile rendered kernels and ISA primitives into a library and call them through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt

from qigen.backends.base import Isa, KernelSource
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.isa.primitives import KINDS, Primitive
from qigen.codegen.render import render
from qigen.targets.features import of_this_machine
from tests.backends.cpu import foreign

Array = npt.NDArray[Any]

# Contraction off: a product that is rounded in the reference is rounded in the kernel, so that the
# decoded weights and the results of two ISAs can be compared bit by bit.
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror",
         "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unused-function")
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
              "-fno-omit-frame-pointer")
LIBRARY = ("-shared", "-fPIC")


EMULATED_TILES = replace(ISAS["scalar"], name="emulated_tiles",
                         template="cpu/isa/emulated_tiles.h.j2", native_bf16=True, tiles=True)
"""The portable row with tile registers in plain C++, which do what those of AMX do."""


class MatmulArgs(ctypes.Structure):
    """``qg::MatmulArgs`` of kernels.h."""

    _fields_ = [("w", ctypes.c_void_p), ("row_block", ctypes.c_int64), ("kblocks", ctypes.c_int32),
                ("m", ctypes.c_int32), ("n", ctypes.c_int32), ("x", ctypes.c_void_p),
                ("x_stride", ctypes.c_int64), ("scale_offset", ctypes.c_int32),
                ("zero_offset", ctypes.c_int32), ("sum_offset", ctypes.c_int32),
                ("y", ctypes.c_void_p),
                ("y_stride", ctypes.c_int64), ("bias", ctypes.c_void_p)]


def compiler(isa: Isa = ISAS["scalar"]) -> str | None:
    """The C++ compiler of the tests for an ISA, or None if this machine has none."""
    return foreign.compiler_for(isa)


def why_not(isa: Isa) -> str:
    """Why kernels for ``isa`` cannot run here, for pytest's skip; '' if they can."""
    if foreign.foreign(isa):
        return foreign.why_not(isa)
    if compiler(isa) is None:
        return "no C++ compiler on PATH"
    missing = [f for f in isa.features if f not in of_this_machine()]
    return f"this CPU has no {', '.join(missing)}" if missing else ""


def build(folder: Path, isa: Isa, kernels: Sequence[KernelSource] = (),
          primitives: Sequence[Primitive] = (), sanitize: bool = False) -> Path:
    """Compile everything in one translation unit; the path of the library (or the program).

    The result is named by the hash of what made it and compiled once; ``sanitize`` makes a
    program with AddressSanitizer and UndefinedBehaviorSanitizer instead of a library.
    """
    sources = {f"{kernel.name}.cpp": kernel.text for kernel in kernels}
    sources[isa.header] = render(isa.template)
    sources["kernels.h"] = render("cpu/kernels.h.j2")
    sources["epilogue.h"] = render("cpu/epilogue.h.j2")
    template = jinja2.Template(
        Path(__file__).with_name("harness.cpp.j2").read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sizes = {kind: np.dtype(dtype).itemsize * count for kind, (dtype, count) in KINDS.items()}
    sources["harness.cpp"] = template.render(isa=isa, kernels=kernels, primitives=primitives,
                                             bytes=sizes, main=sanitize)
    flags = SANITIZERS if sanitize else LIBRARY
    return compile_once(folder, isa, sources, flags, isa.name, "" if sanitize else ".so")


def compile_once(folder: Path, isa: Isa, sources: Mapping[str, str], flags: Sequence[str],
                 stem: str, suffix: str = ".so") -> Path:
    """Compile ``harness.cpp`` of ``sources``, unless a run before did; the path of what it made,
    which is named by the hash of all that made it."""
    command = [compiler(isa) or "g++", *FLAGS, *isa.flags, *flags]
    digest = hashlib.sha256(repr((command, sorted(sources.items()))).encode()).hexdigest()[:20]
    target = folder / f"{stem}-{digest}{suffix}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, text in sources.items():
            Path(scratch, name).write_text(text, encoding="utf-8")
        done = subprocess.run([*command, "harness.cpp", "-o", "out"], cwd=scratch, check=False,
                              capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"
        Path(scratch, "out").replace(target)  # atomic: another process may build the same
    return target


def load(library: Path) -> Any:
    """The library, checked to agree on the layout of MatmulArgs."""
    handle = foreign.open_library(library)
    handle.matmul_args_bytes.restype = ctypes.c_int64
    assert handle.matmul_args_bytes() == ctypes.sizeof(MatmulArgs)
    return handle


def pointer(array: Array | None) -> int | None:
    """The address of a contiguous array (None: null)."""
    if array is None:
        return None
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


def call_primitive(library: ctypes.CDLL, index: int, primitive: Primitive,
                   arguments: Sequence[Array]) -> Array:
    """Run primitive number ``index`` of the library on arrays [cases, count] of its arguments."""
    cases = len(arguments[0]) if arguments else 1
    dtype, count = KINDS[primitive.result]
    out = np.zeros((cases, count), dtype)
    places = [ctypes.c_void_p(pointer(np.ascontiguousarray(a))) for a in arguments]
    places += [ctypes.c_void_p(None)] * (3 - len(places))
    getattr(library, f"primitive_{index}")(ctypes.c_int64(cases), *places,
                                           ctypes.c_void_p(pointer(out)))
    return out
