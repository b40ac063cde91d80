"""Models that are compiled without a C++ compiler: the same logits to the last bit."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qigen
from qigen import compiler, targets, toolchain
from qigen.backends.cpu.isa import ISAS
from qigen.demo import demo_model
from qigen.errors import ToolchainError, Unsupported
from qigen.targets.features import host_architecture
from qigen.tuning import database
from qigen.tuning.database import Database
from tests.conftest import ArtifactMaker
from tests.e2e.harness import JOBS
from tests.e2e.test_cross import embed, reference

pytest.importorskip("llvmlite")

from qigen.backends.llvm import find_compiler

pytestmark = pytest.mark.skipif(host_architecture() != "x86_64", reason="needs an x86-64 machine")


def without_compilers(model: Path, out: Path, *options: str) -> dict[str, Any]:
    """What ``qigen compile --backend llvm`` says where the PATH has nothing."""
    from qigen.backends.llvm import host_library

    host_library()  # an installation brings it along, a source tree builds it once
    environment = {**os.environ, "PATH": "/nonexistent", "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("CXX", "QIGEN_CXX"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "qigen", "compile", str(model), "-o", str(out), "--backend",
               "llvm", "--json", *options]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def logits(artifact: Path, tokens: list[int]) -> Any:
    return qigen.load(artifact, threads=2).session().eval(np.array(tokens, np.int32), all=True)


@pytest.mark.parametrize(
    "options", [{}, {"weights": "u4g32", "kv": "int8"}, {"kv": "int4"}], ids=str
)
def test_the_same_to_the_last_bit(
    stories_artifact: ArtifactMaker, stories_gguf: Path, stories_reference: dict[str, Any],
    tmp_path: Path, options: dict[str, str],
) -> None:  # fmt: skip
    words = [w for name, value in options.items() for w in (f"--{name}", value)]
    without_compilers(stories_gguf, tmp_path / "m.qgn", *words)
    tokens = stories_reference["prompt_ids"] + stories_reference["greedy_ids"][:40]
    assert np.array_equal(logits(tmp_path / "m.qgn", tokens),
                          logits(stories_artifact(**options), tokens))  # fmt: skip


def test_in_a_program_of_c(stories_gguf: Path, tmp_path: Path) -> None:
    """The library is like any other: it is loaded and asked through the C interface."""
    artifact = qigen.compile(stories_gguf, tmp_path / "c.qgn", backend="llvm", jobs=JOBS)
    embed(tmp_path, "gcc")
    arguments, text = reference()
    done = subprocess.run([tmp_path / "c_embed", artifact.path, *arguments], check=False,
                          capture_output=True)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, text), done.stderr


def test_several_targets_in_one_library(stories_gguf: Path, tmp_path: Path) -> None:
    wanted = [("x86-64-v3", "avx2"), ("x86-64-v4", "avx512")]
    here = [isa for _, isa in wanted if targets.native().has(ISAS[isa].features)]
    artifact = qigen.compile(stories_gguf, tmp_path / "f.qgn", backend="llvm", jobs=JOBS,
                             target=",".join(name for name, _ in wanted))  # fmt: skip
    if here:
        assert qigen.load(artifact.path).info["isa"] == here[-1]


def test_what_it_does_not_do(stories_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="aarch64 linux"):
        qigen.compile(stories_gguf, tmp_path / "x", backend="llvm", target="raspberrypi5")
    with pytest.raises(Unsupported, match="emit static"):
        qigen.compile(stories_gguf, tmp_path / "x", backend="llvm", emit="static")
    with pytest.raises(Unsupported, match="backend tpu does not exist"):
        qigen.compile(stories_gguf, tmp_path / "x", backend="tpu")


def test_kernels_are_measured(
    stories_gguf: Path, stories_reference: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As LLVM makes them, and a later compilation with LLVM knows what was found."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ for the program that measures")
    monkeypatch.setenv("QIGEN_DATA", str(tmp_path / "data"))
    short = functools.partial(compiler.tune_products, seconds=0.01, top=2, buckets=(1, 16))
    monkeypatch.setattr(compiler, "tune_products", short)
    measured = qigen.compile(stories_gguf, tmp_path / "m.qgn", backend="llvm", tune="measure",
                             isa="scalar", threads=1, jobs=JOBS)  # fmt: skip
    model = qigen.load(measured.path, threads=1)
    tokens = list(model.generate_tokens(stories_reference["prompt_ids"], max_tokens=8))
    assert tokens == stories_reference["greedy_ids"][:8]
    with Database() as data:
        found = list(data.entries())
    assert found and {e.status for e in found} == {"ok"}
    llvm = database.compiler_key(find_compiler(targets.native()).version)
    assert {e.compiler for e in found} == {llvm}
    again = qigen.compile(stories_gguf, tmp_path / "n.qgn", backend="llvm", isa="scalar",
                          threads=1, jobs=JOBS)  # fmt: skip
    assert [k["schedule"] for k in again.explain()] == [k["schedule"] for k in measured.explain()]
    assert any("measured" in str(k) for k in again.explain())


def test_measuring_needs_a_compiler(
    stories_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    for name in ("CXX", "QIGEN_CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "_find_zig", lambda architecture, system: None)
    with pytest.raises(ToolchainError, match=r"measured by a program.*--tune measure.*apt-get"):
        qigen.compile(stories_gguf, tmp_path / "x", backend="llvm", tune="measure")


def test_llvm_is_missing(stories_gguf: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match=r"qigen\[llvm\]"):
        qigen.compile(stories_gguf, tmp_path / "x", backend="llvm")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "avx512vnni"])
def test_smollm2(smollm2_artifact: ArtifactMaker, tmp_path: Path, isa: str) -> None:
    if not targets.native().has(ISAS[isa].features):
        pytest.skip(f"this machine has no {isa}")
    without_compilers(demo_model(), tmp_path / "s.qgn", "--isa", isa)
    texts = [
        qigen.load(path, threads=2).generate("The capital of France is", max_tokens=32,
                                             temperature=0.0)
        for path in (tmp_path / "s.qgn", smollm2_artifact(isa=isa))
    ]  # fmt: skip
    assert texts[0] == texts[1]
