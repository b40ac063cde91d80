"""Benchmarks of ONNX models: the shape of the results, inputs, peers."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qigen import bench_graph as module
from qigen.bench_graph import bench_graph
from qigen.bench_graph_worker import OnnxRuntimeInt8, OpenVinoInt8, serve
from qigen.cli import main
from qigen.errors import BadInput, Unsupported, UsageError
from tests.frontends.tiny_onnx import write_tiny_onnx


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_onnx(tmp_path_factory.mktemp("tiny") / "tiny.onnx")


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TURN_S", 0.001)


def check(side: dict[str, Any]) -> None:
    """The part of the result that all sides have."""
    assert side["threads"] == 1 and side["load_s"] > 0 and side["peak_rss_bytes"] > 1 << 20
    assert len(side["runs"]) == 3 and side["latency_ms"] == statistics.median(side["runs"]) > 0


def test_result(artifact_of: Any, tiny: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((6, 4), np.float32))
    stages = []
    result = bench_graph(
        artifact_of(tiny),
        inputs={"x": tmp_path / "x.npy"},
        threads=1,
        repeat=3,
        progress=lambda *state: stages.append(state),
    )
    check(result)
    assert result["weight_bytes"] == 8192 and result["peers"] == {}
    first, second = result["inputs"]
    assert first["file"] == str(tmp_path / "x.npy") and second["file"] is None
    assert first["shape"] == second["shape"] == [6, 4]  # both are [n, 4]
    assert stages[0] == ("load", 0, 1) and stages[-1] == ("measure", 3, 3)
    json.dumps(result)


def test_command(artifact_of: Any, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(artifact_of(tiny)), "--repeat", "3", "--threads", "1"]
    assert main([*arguments, "--shape", "z=5x4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    check(result)
    assert [entry["shape"] for entry in result["inputs"]] == [[5, 4], [5, 4]]
    assert main(arguments) == 0
    assert "x 1x4, z 1x4" in capsys.readouterr().out


@pytest.mark.parametrize("peer", ["onnxruntime", "openvino", "tvm", "tvm-tuned"])
def test_peers(
    peer: str, artifact_of: Any, tiny: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if importlib.util.find_spec(peer.removesuffix("-tuned")) is None:
        pytest.skip(f"{peer} is not installed")
    monkeypatch.setattr(module, "TRIALS", 2)
    result = bench_graph(
        artifact_of(tiny), shapes={"x": (64, 4)}, threads=1, repeat=3, peers=[peer]
    )
    side = result["peers"][peer]
    check(side)
    assert side["max_difference"] < 1e-5 < side["max_output"] and side["model"] == str(tiny)
    pairs = zip(result["runs"], side["runs"], strict=True)
    assert side["ratio"] == statistics.median(theirs / ours for ours, theirs in pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qigen.bench_graph.bench_graph", lambda *_, **__: result)
        assert main(["bench", str(artifact_of(tiny)), "--vs", peer, "--source", str(tiny)]) == 0
    assert peer in (text := capsys.readouterr().out) and f"{side['ratio']:.2f}" in text


def test_what_peers_need(
    artifact_of: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = artifact_of(tiny)
    with pytest.raises(Unsupported, match="peer 'llama"):
        bench_graph(artifact, peers=["llama.cpp"])
    with pytest.raises(UsageError, match="precision f16"):
        bench_graph(artifact, peers=["openvino"], peer_precision="f16")
    with pytest.raises(UsageError, match="repeat"):
        bench_graph(artifact, repeat=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(BadInput, match="--source"):
        bench_graph(artifact, peers=["openvino"], peer_model=tmp_path / "none.onnx")
    with pytest.raises(Unsupported, match="bf16"):
        bench_graph(artifact, peers=["onnxruntime"], peer_precision="bf16")
    with pytest.raises(Unsupported, match="measured in f32"):
        bench_graph(artifact, peers=["tvm"], peer_precision="int8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"qigen\[tvm\]"):
        bench_graph(artifact, peers=["tvm-tuned"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name != "nncf" else None)
    with pytest.raises(Unsupported, match=r"nncf is not installed.*qigen\[bench\]"):
        bench_graph(artifact, peers=["openvino"], peer_precision="int8")


def test_open_dimensions(artifact_of: Any, tiny: Path) -> None:
    artifact = module.Artifact(artifact_of(tiny))
    made = module.model_inputs(artifact, {}, {})
    assert made["x"].shape == made["z"].shape == (1, 4)
    interface = {
        "inputs": [
            {"name": "ids", "dtype": "i64", "shape": ["b", "n"]},
            {"name": "half", "dtype": "f16", "shape": ["n", 2]},
        ]
    }
    artifact.manifest["interface"] = interface
    made = module.model_inputs(artifact, {}, {"ids": (2, "7")})
    assert made["half"].shape == (7, 2) and made["half"].dtype == np.float16
    assert made["ids"].tolist() == [[1] * 7] * 2
    with pytest.raises(UsageError, match="--shape ids=bxn"):
        module.model_inputs(artifact, {}, {})


def test_difference() -> None:
    nan, inf = math.nan, math.inf
    a = [np.array([1.0, nan, inf, 3]), np.zeros(0)]
    assert module._difference(a, a) == {"max_difference": 0, "max_output": 3}
    b = [np.array([1.5, nan, inf, 3]), np.zeros(0)]
    assert module._difference(a, b)["max_difference"] == 0.5
    c = [np.array([1.0, 2, inf, 3]), np.zeros(0)]
    assert module._difference(a, c)["max_difference"] == inf
    assert module._difference(a, a[:1])["max_difference"] is None


def test_requests(tmp_path: Path) -> None:
    class Side:
        threads, load_s, runs = 1, 0.0, 0

        def run(self) -> list[np.ndarray]:
            self.runs += 1
            return [np.arange(3), np.array(True)]

    side = Side()
    assert len(serve(side, {"do": "run", "runs": 3})["seconds"]) == 3 and side.runs == 4
    assert serve(side, {"do": "outputs", "folder": str(tmp_path)}) == {"count": 2}
    assert np.load(tmp_path / "0.npy").tolist() == [0, 1, 2]
    assert serve(side, {"do": "memory"})["peak_rss_bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MatMul", "Conv"])
def test_int8_models_of_peers(kind: str, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    ov = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    import onnx
    from onnx import helper

    from tests.frontends.tiny_onnx import F32, model

    rng = np.random.default_rng(1)
    shape = (4, 64) if kind == "MatMul" else (1, 8, 12, 12)
    w = rng.standard_normal((64, 32) if kind == "MatMul" else (16, 8, 3, 3), np.float32)
    info = helper.make_tensor_value_info
    source = tmp_path / "m.onnx"
    onnx.save(
        model(
            [helper.make_node(kind, ["x", "w"], ["p"]), helper.make_node("Relu", ["p"], ["y"])],
            [info("x", F32, shape)],
            [info("y", F32, None)],
            {"w": w},
        ),
        source,
    )
    x = rng.standard_normal(shape, np.float32)
    np.save(tmp_path / "x.npy", x)
    inputs = [{"name": "x", "file": str(tmp_path / "x.npy"), "dtype": "float32"}]
    exact = ort.InferenceSession(source).run(None, {"x": x})[0]
    OnnxRuntimeInt8(str(source), inputs, str(tmp_path / "q.onnx"))
    theirs = ort.InferenceSession(tmp_path / "q.onnx").run(None, {"x": x})[0]
    assert 0 < np.abs(theirs - exact).max() < 0.05 * np.abs(exact).max()
    OpenVinoInt8(str(source), inputs, str(tmp_path / "q.xml"))
    compiled = ov.Core().compile_model(tmp_path / "q.xml", "CPU")
    assert np.abs(compiled(x)[0] - exact).max() < 0.05 * np.abs(exact).max()
