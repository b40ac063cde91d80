"""Compile fused loops and row operators into a library and call them through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from qigen.backends.base import Isa, KernelSource
from qigen.codegen.render import render
from tests.backends.cpu.foreign import open_library
from tests.backends.cpu.kernel_build import FLAGS, SANITIZERS, compiler

# without what makes the compiler slow and finds nothing in these kernels
_SANITIZERS = (*SANITIZERS, "-g0", "-fno-sanitize=null,object-size,pointer-overflow")

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
          struct: Mapping[str, str], sanitize: bool = False) -> Path:
    """Compile everything in one translation unit, once; the path of the library. ``struct`` has
    the name of the arguments of each entry, which ``header`` (a template of cpu/) defines."""
    sources = {f"{kernel.name}.cpp": kernel.text for kernel in kernels}
    sources[isa.header] = render(isa.template)
    for name in ("kernels.h", "epilogue.h", header):
        sources[name] = render(f"cpu/{name}.j2")
    template = jinja2.Template(_HARNESS, undefined=jinja2.StrictUndefined, trim_blocks=True,
                               lstrip_blocks=True)
    sources["harness.cpp"] = template.render(
        isa=isa, header=header, kernels=kernels, struct=struct,
        structs=sorted(set(struct.values())))
    flags = [*FLAGS, *isa.flags, *(_SANITIZERS if sanitize else ()), "-shared", "-fPIC"]
    command = [compiler(isa) or "g++", *flags]
    digest = hashlib.sha256(repr((command, sorted(sources.items()))).encode()).hexdigest()[:20]
    target = folder / f"{Path(header).stem}-{isa.name}-{digest}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, text in sources.items():
            Path(scratch, name).write_text(text, encoding="utf-8")
        done = subprocess.run([*command, "harness.cpp", "-o", "out"], cwd=scratch, check=False,
                              capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"
        Path(scratch, "out").replace(target)  # atomic: another process may build the same
    return target


def load(path: Path, structs: Sequence[type[ctypes.Structure]]) -> Any:
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

