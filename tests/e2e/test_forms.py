"""Static libraries and sources: built without qigen, they write the same tokens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qigen
from qigen.errors import UsageError
from qigen.tuning.database import Database
from tests.e2e.harness import JOBS
from tests.e2e.test_cross import GGUF, ROOT, embed, reference

MAIN = ROOT / "examples" / "c_embed" / "main.c"


def call(*command: object, **environment: str) -> bytes:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout


def need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")


def linked(folder: Path, archive: Path, include: Path) -> Path:
    """The example for C with the model inside."""
    program, main = folder / "one", folder / "main.o"
    call("gcc", "-std=c11", "-O1", "-DQIGEN_STATIC", f"-I{ROOT / 'runtime' / 'include'}",
         f"-I{include}", "-c", MAIN, "-o", main)  # fmt: skip
    call("g++", main, archive, "-pthread", "-o", program)
    return program


def test_a_static_library(tmp_path: Path) -> None:
    need("gcc", "g++", "ar")
    artifact = qigen.compile(GGUF, tmp_path / "s.qgn", emit="static", jobs=JOBS)
    assert not (artifact.path / "model.so").exists()
    program = linked(tmp_path, artifact.path / "libmodel.a", artifact.path)
    arguments, text = reference()
    assert call(program, artifact.path, *arguments) == text


def test_sources_build_without_qigen(tmp_path: Path) -> None:
    """No compiler is asked when they are written, not even for what was measured with one; CMake
    and a compiler suffice to build them."""
    need("cmake", "gcc", "g++")
    out = tmp_path / "src.qgn"
    with Database(tmp_path / "tuning.sqlite"):
        pass
    environment = {"PATH": "/nonexistent", "PYTHONPATH": os.pathsep.join(sys.path),
                   "QIGEN_DATA": str(tmp_path)}
    call(sys.executable, "-m", "qigen", "compile", GGUF, "-o", out, "--emit", "source",
         **environment)  # fmt: skip
    assert not list(out.glob("model.so")) and (out / "CMakeLists.txt").is_file()
    moved = tmp_path / "elsewhere"
    out.rename(moved)
    call("cmake", "-S", moved, "-B", tmp_path / "build", "-DCMAKE_BUILD_TYPE=Release")
    call("cmake", "--build", tmp_path / "build")
    arguments, text = reference()
    program = embed(tmp_path, "gcc")
    assert call(program, moved, *arguments) == text
    qigen.Artifact(moved).verify()


@pytest.mark.slow
def test_sources_as_a_static_library_for_two_targets(tmp_path: Path) -> None:
    need("cmake", "gcc", "g++")
    target = "x86-64-v3,x86-64-v4"
    artifact = qigen.compile(GGUF, tmp_path / "f.qgn", emit="source", target=target)
    call("cmake", "-S", artifact.path, "-B", tmp_path / "build", "-DBUILD_SHARED_LIBS=OFF")
    call("cmake", "--build", tmp_path / "build")
    program = linked(tmp_path, artifact.path / "libmodel.a", artifact.path)
    arguments, text = reference()
    assert call(program, artifact.path, *arguments) == text


def test_a_form_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="library, static, source"):
        qigen.compile(GGUF, tmp_path / "a.qgn", emit="binary")
