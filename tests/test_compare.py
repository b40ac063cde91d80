"""Outputs and layers beside a reference's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qigen.cli import main
from qigen.compare import compare_outputs, difference, layer_errors
from qigen.errors import BadInput
from tests.frontends.tiny_onnx import write_tiny_onnx

HERE = Path(__file__).parent
IDS = np.arange(40, dtype=np.int32)[None] % 300 + 5


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> Any:
        code = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


def test_differences_of_arrays() -> None:
    one = np.array([3.0, 4.0])
    assert difference(one, one) == {"relative_error": 0.0, "cosine": 1.0}
    assert difference(-one, one) == {"relative_error": 2.0, "cosine": -1.0}
    assert difference(np.array([4.0, -3.0]), one)["cosine"] == pytest.approx(0.0)
    assert difference(np.zeros(2), np.zeros(2)) == {"relative_error": 0.0, "cosine": 1.0}
    assert difference(one, np.zeros(2)) == {"relative_error": float("inf"), "cosine": 0.0}
    assert np.isnan(difference(np.array([np.nan, 1]), one)["cosine"])


def test_outputs_over_samples() -> None:
    samples = [{"x": np.array([1.0, 0.0])}, {"x": np.array([0.0, 2.0])}]

    def twisted(inputs: Any) -> Any:
        return {"y": inputs["x"] + [0.0, 1.0]}

    (row,) = compare_outputs(twisted, lambda inputs: {"y": inputs["x"]}, samples, ["y"], ["x"])
    assert row["samples"] == 2 and row["cosine_min"] == pytest.approx(2**-0.5)
    assert row["cosine_mean"] == pytest.approx((1 + 2**-0.5) / 2)
    assert (row["relative_error"], row["relative_error_max"]) == (0.75, 1.0)
    given = [{**s, "y": s["x"] + [0.0, 1.0]} for s in samples]
    (row,) = compare_outputs(twisted, None, given, ["y"], ["x"])
    assert row["cosine_min"] == pytest.approx(1.0)
    with pytest.raises(BadInput, match=r"sample 0.*none of the outputs y"):
        compare_outputs(twisted, None, samples, ["y"], ["x"])
    with pytest.raises(BadInput, match="has the shape"):
        compare_outputs(twisted, lambda i: {"y": np.zeros(3)}, samples, ["y"], ["x"])


def test_layers_of_a_model(stories_artifact: Any) -> None:
    exact = stories_artifact()
    same = layer_errors(exact, exact, IDS)
    assert [r["layer"] for r in same] == [0, 1, 2, 3, 4, "logits"]
    assert all(r["relative_error"] == 0 == r["own_relative_error"] for r in same)
    rounded = layer_errors(stories_artifact(weights="s8g32"), exact, IDS)
    assert all(0 < r["relative_error"] < 0.05 and r["cosine"] > 0.999 for r in rounded)
    # the first layer gets the same input in both cases, but for the table of embeddings
    assert all(r["own_relative_error"] < 0.02 for r in rounded)
    assert rounded[4]["relative_error"] > rounded[4]["own_relative_error"]


def test_eval_with_layers(run_json: Any, stories_artifact: Any) -> None:
    text = HERE / "data" / "smollm2" / "wikitext2-head.txt"
    result = run_json("eval", stories_artifact(weights="s8g32"), "--text", text, "--context", 64,
                      "--chunks", 2, "--against", stories_artifact(), "--layers")
    assert len(result["layers"]) == 6 and result["kl_mean_se"] > 0
    assert abs(result["log_ratio"]) < 0.1 and result["top1_agreement_se"] >= 0


def test_eval_of_a_graph(run_json: Any, artifact_of: Any, tmp_path: Path,
                         capsys: pytest.CaptureFixture[str]) -> None:
    artifact = artifact_of(write_tiny_onnx(tmp_path / "tiny.onnx"))
    result = run_json("eval", artifact, "--against", artifact, "--shape", "x=3x4")
    assert result["made_up"] and all(r["cosine_min"] == pytest.approx(1) for r in result["outputs"])
    assert main(["eval", str(artifact)]) == 2
    assert "--against" in capsys.readouterr().err
    assert main(["eval", str(artifact), "--samples", str(tmp_path)]) == 3
    assert "no .npz" in capsys.readouterr().err
