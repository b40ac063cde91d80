"""From a source to IR, and from IR to an object file. Only worker processes call :func:`emit`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qigen.backends.base import Isa
from qigen.backends.cpu.isa import ISAS
from qigen.backends.llvm.tokens import tokenize
from qigen.backends.llvm.translate import Unit
from qigen.codegen.render import render
from qigen.errors import Unsupported

PREFIX = "qg"
_INLINE = ["static", "inline", "__attribute__", "(", "(", "always_inline", ")", ")"]
_CALL = ["static", "__attribute__", "(", "(", "noinline", ")", ")"]


def primitives(isa: Isa) -> str:
    """The primitives of a row as IR; Unsupported for rows that have none."""
    if isa.architecture not in ("", "x86_64"):
        raise Unsupported(
            f"the llvm backend has no primitives for {isa.name} yet; leave --backend out"
        )
    return render("llvm/primitives.ll.j2", isa=isa, features=list(isa.features))


def isa_of(text: str, headers: Mapping[str, str]) -> Isa:
    """The row whose header a source includes, directly or not."""
    for body in (text, *(f'#include "{name}"' for name in headers)):
        found = re.search(r'#include "isa_(\w+)\.h"', body)
        if found:
            return ISAS[found[1]]
    return ISAS["scalar"]


def to_ir(
    text: str, name: str, headers: Mapping[str, str], folders: Sequence[Path], isa: Isa,
    prefix: str = PREFIX,
) -> str:  # fmt: skip
    """The IR of a rendered source, with the primitives of the row.

    ``prefix`` begins the symbols of its functions. Unsupported names the place of what cannot be
    translated.
    """

    def header(wanted: str) -> str | None:
        if wanted == isa.header:
            return None  # the primitives take its place
        if wanted in headers:
            return headers[wanted]
        for folder in folders:
            if (folder / wanted).is_file():
                return (folder / wanted).read_text()
        return None

    macros = {"QG_INLINE": _INLINE, "QG_CALL": _INLINE if isa.features else _CALL,
              "__x86_64__": ["1"]}  # fmt: skip
    base = primitives(isa)
    tokens = tokenize(text, name, header, macros)
    return base + Unit(tokens, base, f"{prefix}.").translate()


def emit(ir: str, isa: Isa, triple: str) -> bytes:
    """The object file of IR. LLVM aborts the process if it has no instruction for an intrinsic."""
    llvm = importlib.import_module("llvmlite.binding")  # only where the extra is installed
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(ir)
    module.triple = triple
    module.verify()
    target = llvm.Target.from_triple(triple)
    features = ",".join(f"+{_FEATURES.get(name, name)}" for name in isa.features)
    machine = target.create_target_machine(
        cpu="x86-64", features=features, opt=3, reloc="pic", codemodel="small"
    )
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


_FEATURES = {"sse4_1": "sse4.1", "sse4_2": "sse4.2"}
"""Features that LLVM calls otherwise."""
