"""Static int8 from samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qigen
from qigen.artifact import Artifact
from qigen.calibration import quantizer, read_samples
from qigen.errors import BadInput, UsageError
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
