"""Artifacts of tiny models, compiled once a session from one cache of objects."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Compiled, Options, build

STORIES = Path(__file__).parents[1] / "data" / "stories260k"


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all compilations of the run, unless QIGEN_CACHE names one."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers
    with pytest.MonkeyPatch.context() as patch:
        if "QIGEN_CACHE" not in os.environ:
            patch.setenv("QIGEN_CACHE", str(folder / "kernels"))
        yield


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Compiled]:
    """``compiled(family=..., quant=..., overrides={...})``: an artifact by its Options."""
    made: dict[str, Compiled] = {}

    def get(**options: Any) -> Compiled:
        overrides = tuple(sorted(options.pop("overrides", {}).items()))
        wanted = Options(**options, overrides=overrides)
        key = repr(wanted)
        if key not in made:
            made[key] = build(tmp_path_factory.mktemp(wanted.family), wanted)
        return made[key]

    return get


@pytest.fixture(scope="session")
def stories(stories_artifact: Callable[..., Path], kernel_cache: None) -> Callable[..., Path]:
    """``stories(isa=..., ...)``: the folder of stories260K's artifact."""
    return stories_artifact
