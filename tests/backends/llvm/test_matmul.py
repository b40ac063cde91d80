"""Translated matmul kernels against the exact references of the C++ ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qigen.backends.base import Isa
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.matmul import MatmulSpec, render_matmul
from tests.backends.cpu import test_matmul as cpp
from tests.backends.llvm.translated import kernels, x86_isas

Spec = tuple[MatmulSpec, tuple[str, ...]]
EVERY = 7  # of the specs of the default run


def specs(isa: Isa, every: int) -> list[Spec]:
    """Of the list that the C++ kernels are tested with, those of an ISA, or a part of them."""
    mine = [s for s in cpp.DEFAULT if s[0].isa is isa]
    return mine[list(ISAS.values()).index(isa) % every :: every]


def run(folder: Path, wanted: list[Spec]) -> None:
    isa = wanted[0][0].isa
    rendered = [render_matmul(s, e, decode_rows=not s.integer) for s, e in wanted]
    library: Any = kernels(folder, isa, rendered)
    for spec, epilogues in wanted:
        for m in cpp.TOKENS:
            for epilogue in epilogues:
                cpp.check(library, spec, epilogue, m, with_bias=epilogue in ("store", "add"))
        if not spec.integer:
            cpp.check_rows(library, spec)


@pytest.mark.parametrize("isa", x86_isas(), ids=lambda isa: isa.name)
def test_formats(isa: Isa, tmp_path: Path) -> None:
    run(tmp_path, specs(isa, EVERY))


@pytest.mark.slow
@pytest.mark.parametrize("isa", x86_isas(), ids=lambda isa: isa.name)
def test_all_formats(isa: Isa, tmp_path: Path) -> None:
    run(tmp_path, specs(isa, 1))
