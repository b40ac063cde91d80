"""ONNX models for several targets in one artifact, as static libraries and as sources."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import qigen
from qigen import graph_compiler, targets
from qigen.backends.cpu.isa import ISAS
from qigen.describe import variants
from qigen.formats.layout import Layout
from qigen.targets.features import host_architecture
from tests.e2e.test_fat import TARGETS
from tests.e2e.test_forms import ROOT, call, need

MAIN = Path(__file__).with_name("graph_main.c")
HEADERS = f"-I{ROOT / 'runtime' / 'include'}"
ONES = np.linspace(-1, 1 - 1 / 64, 128, dtype=np.float32).reshape(2, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = relu(x A + b) B of any number of rows x."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.normal(0, 0.2, s).astype(np.float32) for s in ((64, 48), (48,), (48, 32)))
    nodes = [
        helper.make_node("MatMul", ["x", "A"], ["xa"]),
        helper.make_node("Add", ["xa", "b"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("MatMul", ["r", "B"], ["y"]),
    ]
    kind, info = onnx.TensorProto.FLOAT, helper.make_tensor_value_info
    constants = [numpy_helper.from_array(v, n) for n, v in (("A", a), ("b", b), ("B", c))]
    graph = helper.make_graph(nodes, "two_products", [info("x", kind, ["n", 64])],
                              [info("y", kind, ["n", 32])], constants)  # fmt: skip
    path = tmp_path_factory.mktemp("graph") / "two.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The outputs of the ordinary artifact, which are near those of exact arithmetic."""
    artifact = qigen.compile(model, tmp_path_factory.mktemp("plain") / "two.qgn", isa="scalar")
    y = qigen.load(artifact.path).run({"x": ONES})["y"]
    a, b, c = (numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer)
    assert np.allclose(y, np.maximum(ONES @ a + b, 0) @ c, atol=1e-5)
    return [float(v) for v in y.reshape(-1)]


def program(folder: Path) -> Path:
    target = folder / "graph_main"
    if not target.exists():
        call("gcc", "-std=c11", "-O1", HEADERS, MAIN, "-ldl", "-o", target)
    return target


def numbers(text: bytes) -> list[float]:
    return [float.fromhex(line) for line in text.decode().split()]


def emulated(cpu: str, folder: Path, artifact: Path) -> subprocess.CompletedProcess[bytes]:
    need("gcc", "qemu-x86_64")
    return subprocess.run(["qemu-x86_64", "-cpu", cpu, program(folder), artifact],
                          capture_output=True, check=False)  # fmt: skip


@pytest.mark.skipif(host_architecture() != "x86_64", reason="needs an x86-64 machine")
def test_one_library_for_two_processors(
    model: Path, expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = qigen.compile(model, tmp_path / "fat.qgn", target=TARGETS)
    isas = [t["isa"] for t in (plain.manifest["target"], *plain.manifest["variants"])]
    assert isas == ["avx512", "avx2"]
    taken = next(isa for isa in isas if targets.native().has(ISAS[isa].features))
    assert [v["isa"] for v in variants(plain.manifest) if v["taken"]] == [taken]
    here = qigen.load(plain.path)
    assert here.info["isa"] == taken
    assert np.allclose(here.run({"x": ONES})["y"].reshape(-1), expected, atol=1e-5)
    done = emulated("Haswell", tmp_path, plain.path)
    assert done.returncode == 0, done.stderr
    assert np.allclose(numbers(done.stdout), expected, atol=1e-5)
    done = emulated("Nehalem", tmp_path, plain.path)
    assert done.returncode == 6 and b"compiled for avx512 or avx2" in done.stderr

    # matrices in formats lie there once, or twice where one layout is bad for the other target
    def other_layouts(wanted: Any, layouts: Any, *_: Any) -> dict[Any, tuple[Layout, float]]:
        return {key: (Layout(16, 3 - layout.blocks), 0.0) for key, layout in layouts.items()
                if key[2] == 64}  # fmt: skip

    once = qigen.compile(model, tmp_path / "once.qgn", target=TARGETS, weights="s4g32")
    monkeypatch.setattr(graph_compiler, "shared_product_layouts", other_layouts)
    twice = qigen.compile(model, tmp_path / "twice.qgn", target=TARGETS, weights="s4g32")
    assert not [name for name in once.tensors if "@" in name]
    assert [name for name in twice.tensors if name.endswith("@avx2")]
    twice.verify()
    outputs = {emulated("Haswell", tmp_path, a.path).stdout for a in (once, twice)}
    assert len(outputs) == 1 and len(numbers(outputs.pop())) == 64


def test_a_static_library(model: Path, expected: list[float], tmp_path: Path) -> None:
    need("gcc", "g++", "ar")
    artifact = qigen.compile(model, tmp_path / "s.qgn", emit="static", isa="scalar")
    assert not (artifact.path / "model.so").exists()
    call("gcc", "-std=c11", "-O1", "-DQIGEN_STATIC", HEADERS, "-c", MAIN, "-o", tmp_path / "m.o")
    one = tmp_path / "one"
    call("g++", tmp_path / "m.o", artifact.path / "libmodel.a", "-pthread", "-o", one)
    assert numbers(call(one, artifact.path)) == expected


@pytest.mark.slow
def test_sources_build_without_qigen(model: Path, expected: list[float], tmp_path: Path) -> None:
    need("cmake", "gcc", "g++")
    artifact = qigen.compile(model, tmp_path / "src.qgn", emit="source", isa="scalar")
    moved = shutil.move(artifact.path, tmp_path / "elsewhere")
    call("cmake", "-S", moved, "-B", tmp_path / "build", "-DCMAKE_BUILD_TYPE=Release")
    call("cmake", "--build", tmp_path / "build")
    assert numbers(call(program(tmp_path), moved)) == expected
