"""Compilations that do not end well leave no half artifact, and say why in one sentence."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qigen import build, compiler, toolchain
from qigen._runtime import Model
from qigen.artifact import Artifact
from qigen.compiler import compile
from qigen.errors import ToolchainError, UsageError
from tests.e2e.harness import JOBS, Compiled, Options, write_source

OPTIONS: dict[str, Any] = {"activations": "int8", "jobs": JOBS}


@pytest.fixture
def source(compiled: Callable[..., Compiled]) -> Path:
    """A model whose kernels are all in the cache, and whose weights are smaller than model.so."""
    return compiled(activations="int8", overrides={"n_layers": 1}).path


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def logits(artifact: Path) -> np.ndarray:
    return Model(str(artifact), threads=1).session().eval([1, 2, 3])


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder"])
def test_output_that_is_no_artifact(source: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "precious"
    if kind == "file":
        out.write_text("data")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "thesis.tex").write_text("data")
    with pytest.raises(UsageError, match="no artifact"):
        compile(source, out, **OPTIONS)
    assert entries(tmp_path) == ["precious"]
    assert out.is_dir() != (kind == "file")
    assert kind != "folder" or entries(out) == ["thesis.tex"]


def test_output_without_a_parent(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="parent"):
        compile(source, tmp_path / "no" / "where.qgn", **OPTIONS)
    assert entries(tmp_path) == []


def test_an_artifact_is_replaced(source: Path, tmp_path: Path) -> None:
    """Whoever has the old one open keeps it."""
    out = tmp_path / "m.qgn"
    other = write_source(tmp_path, Options(overrides=(("n_layers", 1), ("seed", 5))))
    compile(other, out, **OPTIONS)
    (out / "left-over").write_text("x")
    session = Model(str(out), threads=1).session()
    old = session.eval([1, 2, 3])
    (tmp_path / "link.qgn").symlink_to(out)
    compile(source, tmp_path / "link.qgn", **OPTIONS)
    assert not (out / "left-over").exists()
    assert (tmp_path / "link.qgn").is_symlink()
    Artifact(out).verify()
    session.rewind(0)
    assert np.array_equal(session.eval([1, 2, 3]), old)
    del session  # as long as it lives, the system's loader takes the new library for the old one
    assert not np.array_equal(logits(out), old)
    assert entries(tmp_path) == ["link.qgn", "m.qgn", "model.gguf"]


STAGES = {
    "packing": (compiler, "write_weights"),
    "header": (compiler, "write_header"),
    "linking": (toolchain, "link_shared"),
    "manifest": (build, "write_manifest"),
    "in its place": (Path, "replace"),
}


@pytest.mark.parametrize("before", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("stage", STAGES)
def test_disk_full(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, before: bool
) -> None:
    out = tmp_path / "m.qgn"
    if before:
        compile(source, out, **OPTIONS)
        old = logits(out)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], full)
        with pytest.raises(UsageError, match="disk is full"):
            compile(source, out, **OPTIONS)
    assert entries(tmp_path) == (["m.qgn"] if before else [])
    if before:
        Artifact(out).verify()
        assert np.array_equal(logits(out), old)


def test_the_second_step_of_a_replacement_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old artifact has been moved away already: it comes back."""
    out = tmp_path / "m.qgn"
    compile(source, out, **OPTIONS)
    (out / "mine").write_text("x")
    replace = Path.replace

    def failing(path: Path, target: Path) -> Path:
        if target == out and (path / "manifest.json").exists() and not (path / "mine").exists():
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        with pytest.raises(KeyboardInterrupt):
            compile(source, out, **OPTIONS)
    assert entries(tmp_path) == ["m.qgn"]
    assert (out / "mine").exists()


COMPILE = """
import resource, signal, sys
from qigen.compiler import compile
from qigen.errors import QigenError

def report(stage, done, total):
    print(stage, done, total, flush=True)

limit = int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    compile(sys.argv[1], sys.argv[2], jobs=2, activations="int8", progress=report)
except QigenError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def command(source: Path, out: Path, limit: int = 0) -> list[str]:
    return [sys.executable, "-c", COMPILE, str(source), str(out), str(limit)]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **changes}


def test_files_that_may_not_grow(source: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: met by the weights, by the linker, by
    the files after it."""
    whole = tmp_path / "whole.qgn"
    compile(source, whole, **OPTIONS)
    sizes = {name: (whole / name).stat().st_size for name in ("weights.bin", "model.so")}
    assert sizes["weights.bin"] < sizes["model.so"]
    shutil.rmtree(whole)
    for limit in (100, 5000, sizes["weights.bin"] - 1, sizes["weights.bin"] + 1,
                  sizes["model.so"] - 1):  # fmt: skip
        done = subprocess.run(command(source, whole, limit), capture_output=True, text=True,
                              env=environment())  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "the disk is full" in done.stderr and len(done.stderr.splitlines()) == 1
        assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("moment", "group"), [("read 1", False), ("compile 1", False), ("compile 3", True)]
)
def test_ctrl_c(tmp_path: Path, moment: str, group: bool) -> None:
    """A terminal sends Ctrl-C to the g++ processes too; `kill -INT` only to the compiler."""
    source = write_source(tmp_path, Options(overrides=(("n_layers", 1),)))
    cache = tmp_path / "cache"
    process = subprocess.Popen(
        command(source, tmp_path / "m.qgn"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment(QIGEN_CACHE=str(cache)), start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(moment):
            break
    time.sleep(0.2)
    if group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT, errors
    assert "KeyboardInterrupt" in errors and "ToolchainError" not in errors
    assert entries(tmp_path) in (["cache", "model.gguf"], ["model.gguf"])
    assert all(path.suffix == ".o" for path in cache.glob("objects/*"))


@pytest.mark.parametrize("variable", ["QIGEN_CXX", "CXX", "PATH"])
def test_no_compiler(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("QIGEN_CXX", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "nothing"))
    with pytest.raises(ToolchainError, match="install one"):
        compile(source, tmp_path / "m.qgn", **OPTIONS)
    assert entries(tmp_path) == []


def test_a_compiler_that_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo "broken 1.0";; '
        "*) echo 'x.cpp:1: error: it hurts' >&2; exit 1;; esac\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("QIGEN_CXX", str(broken))
    monkeypatch.setenv("QIGEN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ToolchainError, match="it hurts"):
        compile(source, tmp_path / "m.qgn", **OPTIONS)
    assert entries(tmp_path) == ["broken-c++", "cache"]
    assert entries(tmp_path / "cache" / "objects") == []
