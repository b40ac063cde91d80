"""What a backend is to the rest of the compiler: ISA rows and kernels as data.

The compiler never imports a backend by name; it asks :func:`backend` for one.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from qigen.errors import Unsupported
from qigen.targets.features import architecture

_BACKENDS = ("cpu", "llvm")


@dataclass(frozen=True)
class Isa:
    """One row of the ISA table.

    ``features`` are the names of :data:`qigen.targets.features.FEATURES` that the machine must
    have, ``flags`` make the compiler emit them. ``registers`` counts vectors of 16 lanes (an ISA
    whose lanes take two registers has half as many). ``dot_limit`` is the largest magnitude that a
    lane of the byte dot product holds before it must be widened (None: no limit can be reached).
    ``vectors`` is how many machine registers 16 lanes are, ``dot_instructions`` and
    ``flush_instructions`` what the byte dot product and its widening cost. ``row_tile`` row-blocks
    share the loads of the activations where the registers hold the accumulators of both.
    ``code_max`` is the largest unsigned code that the byte dot product takes (127 where it
    multiplies signed bytes only): larger codes are centred. ``native_bf16``: an instruction
    multiplies pairs of bf16. ``tiles``: there are registers that hold matrices
    (``vt_`` primitives).
    """

    name: str
    template: str
    features: tuple[str, ...]
    flags: tuple[str, ...]
    registers: int
    vectors: int
    dot_limit: int | None
    dot_instructions: int
    flush_instructions: int
    row_tile: int = 1
    code_max: int = 255
    native_bf16: bool = False
    tiles: bool = False
    source: str = ""

    @property
    def header(self) -> str:
        """Name of the rendered header of primitives."""
        return f"isa_{self.name}.h"

    @property
    def architecture(self) -> str:
        """The processors that it is for, as ``uname -m`` names them; '' if it is for all."""
        return architecture(self.features)

    @property
    def signed_dot(self) -> bool:
        """Whether some codes need a dot product of their own that takes them centred."""
        return self.dot_limit is not None or self.code_max < 255


@dataclass(frozen=True)
class KernelSource:
    """A rendered translation unit and the functions that it defines."""

    name: str
    text: str
    isa: str
    entries: tuple[str, ...]


def backend(name: str) -> ModuleType:
    """The module of a backend (``qigen.backends.<name>``); Unsupported names the known ones."""
    if name not in _BACKENDS:
        raise Unsupported(f"backend {name} does not exist; the backends are {', '.join(_BACKENDS)}")
    return importlib.import_module(f"qigen.backends.{name}")
