"""Static int8 from samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qigen
from qigen.artifact import Artifact
from qigen.calibration import GraphRounder, Rounding, quantizer, read_samples
from qigen.codegen.reference import evaluate
from qigen.errors import BadInput, Unsupported, UsageError
from qigen.passes.tensor.simplify import simplify
from tests.passes.test_tensor import cnn, imported

SHAPE = (1, 3, 20, 28)


def samples(count: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(5)
    return [{"x": rng.standard_normal(SHAPE).astype(np.float32)} for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "cnn.onnx"
    onnx.save(cnn(), path)
    return path


def test_scales_from_samples(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    for i, sample in enumerate(samples(3)):
        np.savez(folder / f"{i}.npz", **sample)
    shape = {"x": SHAPE}
    exact = qigen.load(qigen.compile(model, tmp_path / "f.qgn", shape=shape).path, threads=1)
    made = qigen.compile(model, tmp_path / "q.qgn", shape=shape, activations="int8",
                         calibration=folder)
    rows = made.manifest["quantization"]
    assert {row["precision"] for row in rows} <= {"int8", "f32"}
    # nothing is rounded at run time, and what is int8 reads codes of constant scales
    operators = made.manifest["operators"]
    assert "QuantizeImage" not in operators and "QuantizeRows" not in operators
    kernels = [k["kernel"] for k in made.manifest["plan"]["kernels"]]
    assert sum("u8s8" in k for k in kernels) == sum(row["precision"] == "int8" for row in rows) > 0
    (image,) = samples(4)[3:]
    (wanted,) = exact.run(image).values()
    (got,) = qigen.load(made.path, threads=2).run(image).values()
    assert np.abs(got - wanted).max() < 0.1 and np.abs(got - wanted).mean() < 0.02


def test_bad_samples(model: Path, tmp_path: Path) -> None:
    graph = imported(cnn())
    with pytest.raises(BadInput, match=r"no \.npz files"):
        read_samples(tmp_path, graph)
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(BadInput, match="damaged"):
        read_samples(damaged, graph)
    for name, array, message in (
        ("y", np.zeros(SHAPE, np.float32), "no array for the input x"),
        ("x", np.zeros((3, 20, 28), np.float32), "the model takes x"),
        ("x", np.zeros(SHAPE), "float64"),
        ("x", np.full(SHAPE, np.nan, np.float32), "NaN"),
    ):
        np.savez(tmp_path / "sample.npz", **{name: array})
        with pytest.raises(BadInput, match=message):
            read_samples(tmp_path / "sample.npz", graph)
    with pytest.raises(UsageError, match="activations int8"):
        qigen.compile(model, tmp_path / "out.qgn", calibration=tmp_path / "sample.npz")
    assert not (tmp_path / "out.qgn").exists()


def test_ranges_hold_zero() -> None:
    assert quantizer(0.0, 0.0) == (1.0, 0)
    scale, zero = quantizer(-1.0, 3.0)
    assert zero == 64 and abs(float(scale) - 4 / 255) < 1e-7
    assert quantizer(2.0, 5.0)[1] == 0


def test_artifact_has_no_rows_without_calibration(model: Path, tmp_path: Path) -> None:
    out = qigen.compile(model, tmp_path / "f.qgn", shape={"x": SHAPE}).path
    assert Artifact(out).manifest["quantization"] == []


# -- formats of the catalog, with samples ----------------------------------------------------------

WIDTH = 64


def encoder_model() -> onnx.ModelProto:
    """x [B, T, 64], attention_mask [B, T] -> three products with biases, none of zero mean."""
    rng = np.random.default_rng(0)
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    nodes, constants, x = [], [], "x"
    for i in range(3):
        w = (rng.standard_normal((WIDTH, WIDTH)) / 8).astype(np.float32)
        constants += [onnx.numpy_helper.from_array(w, f"w{i}"),
                      onnx.numpy_helper.from_array(np.full(WIDTH, 0.5, np.float32), f"b{i}")]
        nodes += [helper.make_node("MatMul", [x, f"w{i}"], [f"p{i}"]),
                  helper.make_node("Add", [f"p{i}", f"b{i}"], [f"s{i}"]),
                  helper.make_node("Relu", [f"s{i}"], [f"r{i}"])]
        x = f"r{i}"
    nodes += [helper.make_node("Cast", ["attention_mask"], ["m"], to=floats),
              helper.make_node("Unsqueeze", ["m", "axes"], ["m1"]),
              helper.make_node("Mul", [x, "m1"], ["y"])]
    constants.append(onnx.numpy_helper.from_array(np.array([2]), "axes"))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "encoder", [info("x", floats, ["B", "T", WIDTH]),
                           info("attention_mask", onnx.TensorProto.INT64, ["B", "T"])],
        [info("y", floats, ["B", "T", WIDTH])], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def padded(count: int, seed: int, mean: float = 1.0) -> dict[str, np.ndarray[Any, Any]]:
    """Correlated inputs, each sequence with padding that is nothing like them."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(7).standard_normal((12, WIDTH))
    x = mean + rng.standard_normal((count, 20, 12)) @ common
    mask = (np.arange(20) < rng.integers(5, 21, (count, 1))).astype(np.int64)
    x[mask == 0] = 100 * rng.standard_normal((int((mask == 0).sum()), WIDTH))
    return {"x": x.astype(np.float32), "attention_mask": mask}


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QIGEN_CACHE", str(tmp_path / "cache"))
    for i in range(8):
        np.savez(tmp_path / f"{i}.npz", **padded(8, i))
    return tmp_path


def rounder(folder: Path, method: str = "gptq", **options: Any) -> GraphRounder:
    rounding = Rounding("s3g32", method, calibration=folder, **options)
    return GraphRounder(imported(encoder_model()), rounding, "model", lambda *_: None)


def missed(found: GraphRounder) -> float:
    """The error of the output with the rounded matrices, relative to its square."""
    graph, sample = simplify(imported(encoder_model())), padded(16, 99)
    (wanted,) = evaluate(graph, sample).values()
    for i in range(3):
        w = np.asarray(graph.constants[f"w{i}"])
        made = found(np.ascontiguousarray(w.T), f"w{i}")
        assert made is not None
        tensor, shift = made
        graph.constants[f"w{i}"] = np.ascontiguousarray(tensor.dequantize().T)
        if shift is not None:
            graph.constants[f"b{i}"] = np.asarray(graph.constants[f"b{i}"]) + shift
    (got,) = evaluate(graph, sample).values()
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


def test_a_graph_is_calibrated_in_its_order(calibrated: Path) -> None:
    nearest = missed(rounder(calibrated, "rtn"))
    found = rounder(calibrated)
    assert missed(found) < nearest / 3
    assert [row["matrix"] for row in found.outcomes] == ["w0", "w1", "w2"]
    # what is finished is not computed again
    again = rounder(calibrated)
    assert again.outcomes == found.outcomes and missed(again) == missed(found)
    # a matrix that a pass has changed is none of those
    other = again(np.eye(WIDTH, dtype=np.float32), "w0")
    assert other is not None and other[1] is None
    np.testing.assert_array_equal(other[0].dequantize(), np.eye(WIDTH))


def test_the_compiled_model_has_what_was_calibrated(calibrated: Path) -> None:
    onnx.save(encoder_model(), calibrated / "encoder.onnx")
    samples = calibrated / "samples"
    samples.mkdir()
    for i in range(4):
        np.savez(samples / f"{i}.npz", **padded(8, i))
    sample = padded(4, 99)
    (wanted,) = evaluate(imported(encoder_model()), sample).values()
    errors = []
    for options in ({}, {"calibration": samples}):
        made = qigen.compile(calibrated / "encoder.onnx", calibrated / "e.qgn", weights="s3g32",
                             **options)
        (got,) = qigen.load(made.path, threads=1).run(sample).values()
        errors.append(float(np.square(got - wanted).sum() / np.square(wanted).sum()))
    assert errors[1] < errors[0] / 3
    assert [row["method"] for row in made.manifest["quantization"]] == ["gptq"] * 3


def test_calibration_that_does_not_fit(calibrated: Path) -> None:
    with pytest.raises(UsageError, match=r"64 columns take 0\.0 MiB.*calibration-memory 1MiB"):
        rounder(calibrated, memory=1000)
    with pytest.raises(UsageError, match=r"activations of 8 samples take .* fewer --samples"):
        rounder(calibrated, memory=100000)
    with pytest.raises(Unsupported, match="done for language models alone"):
        rounder(calibrated, "awq+gptq")
