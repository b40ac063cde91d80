"""Compile kernels whose entries take a struct of their own, and call them through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from qigen.backends.base import Isa, KernelSource
from qigen.codegen.render import render
from tests.backends.cpu.foreign import open_library
from tests.backends.cpu.kernel_build import LIBRARY, SANITIZERS, compile_once

# without what makes the compiler slow and finds nothing in these kernels
LOOP_SANITIZERS = (*SANITIZERS, "-g0", "-fno-sanitize=null,object-size,pointer-overflow")

_HARNESS = """\
{#- One translation unit: kernels in namespaces of their own, entries with C linkage. #}
#include "{{ isa.header }}"
#include "{{ header }}"
#include "epilogue.h"
{% for kernel in kernels %}
namespace k{{ loop.index0 }} {
using namespace ::qg;
#include "{{ kernel.name }}.cpp"
}
{% endfor %}
extern "C" {
{% for name in structs %}
int64_t bytes_{{ name }}() { return sizeof(qg::{{ name }}); }
{% endfor %}
{% for kernel in kernels %}
{% set space = "k%d::qg" % loop.index0 %}
{% for entry in kernel.entries %}
void call_{{ entry }}(const qg::{{ struct[entry] }}* a, int thread, int threads) {
  {{ space }}::{{ entry }}(*a, thread, threads);
}
{% endfor %}
{% endfor %}
}
"""


def build(folder: Path, isa: Isa, kernels: Sequence[KernelSource], header: str,
          struct: Mapping[str, str], flags: Sequence[str] = (), more: Iterable[str] = ()) -> Path:
    """Compile everything in one translation unit, once; the path of the library. ``struct`` has
    the name of the arguments of each entry, which ``header`` (a template of cpu/) defines;
    ``more`` names structs that no entry may take and load asks for all the same."""
    sources = {f"{kernel.name}.cpp": kernel.text for kernel in kernels}
    sources[isa.header] = render(isa.template)
    for name in ("kernels.h", "epilogue.h", header):
        sources[name] = render(f"cpu/{name}.j2")
    template = jinja2.Template(_HARNESS, undefined=jinja2.StrictUndefined, trim_blocks=True,
                               lstrip_blocks=True)
    sources["harness.cpp"] = template.render(
        isa=isa, header=header, kernels=kernels, struct=struct,
        structs=sorted({*struct.values(), *more}))
    return compile_once(folder, isa, sources, (*LIBRARY, *flags),
                        f"{Path(header).stem}-{isa.name}")


def load(path: Path, structs: Iterable[type[ctypes.Structure]]) -> Any:
    """The library, checked to agree on the layout of the structs."""
    library = open_library(path)
    for struct in structs:
        size = getattr(library, f"bytes_{struct.__name__}")
        size.restype = ctypes.c_int64
        assert size() == ctypes.sizeof(struct), struct.__name__
    return library


def run(library: ctypes.CDLL, entry: str, args: ctypes.Structure, threads: int = 1) -> None:
    """Call an entry as each of ``threads`` threads in turn."""
    for thread in range(threads):
        getattr(library, f"call_{entry}")(ctypes.byref(args), ctypes.c_int(thread),
                                          ctypes.c_int(threads))

