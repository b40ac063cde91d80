"""Sources translated by the llvm backend, linked into libraries for ctypes."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from qigen.backends.base import Isa, KernelSource
from qigen.backends.cpu.isa.primitives import KINDS, Primitive
from qigen.codegen.render import render
from qigen.toolchain import KERNEL_FLAGS, ObjectCache, Unit
from tests.backends.cpu import kernel_build

pytest.importorskip("llvmlite")

from qigen import targets
from qigen.backends.llvm import find_compiler


@functools.lru_cache(maxsize=1)
def x86_isas() -> tuple[Isa, ...]:
    """The rows that the backend has primitives for and this machine can run."""
    from qigen.backends.cpu.isa import ISAS

    rows = [isa for isa in ISAS.values() if isa.architecture in ("", "x86_64") and not isa.tiles]
    return tuple(isa for isa in rows if not kernel_build.why_not(isa))


def library(folder: Path, name: str, units: Sequence[Unit]) -> Any:
    """A library of translated units."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to link")
    with ObjectCache(find_compiler(targets.by_name("x86-64-v3")), 1) as cache:
        objects = [cache.compile(unit).result() for unit in units]
    target = folder / f"{name}.so"
    subprocess.run(["g++", "-shared", *objects, "-o", target, "-lm"], check=True)
    return kernel_build.load(target)


def headers(isa: Isa) -> dict[str, str]:
    """What kernels include."""
    return {isa.header: render(isa.template), "kernels.h": render("cpu/kernels.h.j2"),
            "epilogue.h": render("cpu/epilogue.h.j2")}  # fmt: skip


def primitives(folder: Path, isa: Isa, wanted: Sequence[Primitive]) -> Any:
    """The harness around primitives."""
    template = jinja2.Template(
        Path(kernel_build.__file__).with_name("harness.cpp.j2").read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    sizes = {kind: np.dtype(dtype).itemsize * count for kind, (dtype, count) in KINDS.items()}
    text = template.render(isa=isa, kernels=(), primitives=wanted, bytes=sizes, main=False)
    unit = Unit("harness", text, (*KERNEL_FLAGS, *isa.flags), headers(isa))
    return library(folder, f"primitives-{isa.name}", [unit])


class Kernels:
    """A library in which kernels have the names of their entries, as in that of the C++ ones."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, f"call_{name}")


def kernels(folder: Path, isa: Isa, sources: Sequence[KernelSource]) -> Kernels:
    """The kernels of an ISA in one library."""
    units = []
    for number, source in enumerate(sources):
        text = source.text
        text += '\nextern "C" {\n'
        if not number:
            text += "int64_t matmul_args_bytes() { return sizeof(qg::MatmulArgs); }\n"
        for entry in source.entries:
            if entry.endswith("__rows"):
                text += (f"void call_{entry}(const uint8_t* w, int64_t bytes, int kblocks, "
                         "const int32_t* ids, int n, float scale, float* y, int64_t stride) "
                         f"{{ qg::{entry}(w, bytes, kblocks, ids, n, scale, y, stride); }}\n")
            else:
                text += (f"void call_{entry}(const qg::MatmulArgs* a, int b0, int b1) "
                         f"{{ qg::{entry}(*a, b0, b1); }}\n")
        text += "}\n"
        units.append(Unit(source.name, text, (*KERNEL_FLAGS, *isa.flags), headers(isa)))
    return Kernels(library(folder, f"kernels-{isa.name}-{len(units)}", units))
