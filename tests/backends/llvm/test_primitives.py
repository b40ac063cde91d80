"""Every primitive in LLVM IR against its numpy meaning, by the test of the C++ headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.backends.cpu import test_primitives as cpp
from tests.backends.llvm.translated import primitives, x86_isas


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("primitives")
    return {
        isa.name: primitives(folder, isa, [p for p in cpp.ALL if cpp.needed(p, isa)])
        for isa in x86_isas()
    }


@pytest.mark.parametrize("isa", x86_isas(), ids=lambda isa: isa.name)
def test_primitives(isa: Any, libraries: dict[str, Any]) -> None:
    for row, index in cpp.CASES:
        if row.name == isa.name:
            cpp.test_primitive(isa, index, libraries)
