"""The command line on ONNX models and their artifacts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import qigen
from qigen.arrays import file_names, parse_files, read_array, write_arrays
from qigen.errors import BadInput, Unsupported, UsageError
from tests.frontends.tiny_onnx import ODD, model, tiny_result, write_tiny_onnx


@pytest.fixture
def run_json(run: Any) -> Any:
    """``run_json(*arguments)`` -> what a command that succeeds prints with ``--json``."""

    def call(*arguments: object) -> Any:
        code, out, err = run(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_onnx(tmp_path_factory.mktemp("tiny") / "tiny.onnx")


@pytest.fixture
def artifact(artifact_of: Any, tiny: Path) -> Path:
    path: Path = artifact_of(tiny)
    return path


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, np.ndarray]:
    """x and z, in files of those names in ``tmp_path``."""
    rng = np.random.default_rng(0)
    made = {name: rng.standard_normal((3, 4), np.float32) for name in "xz"}
    for name, array in made.items():
        np.save(tmp_path / f"{name}.npy", array)
    return made


# ---- compile, inspect, verify --------------------------------------------------------------------


def test_compile(run: Any, run_json: Any, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.qgn"
    summary = run_json("compile", tiny, "-o", out, "--shape", "x=..7x4", "--explain")
    assert summary["kind"] == "graph" and summary["name"] == "tiny"
    assert summary["inputs"][0] == {"name": "x", "dtype": "f32", "shape": ["n", 4]}
    assert [entry["name"] for entry in summary["outputs"]] == [ODD, "s"]
    assert summary["limits"] == {"n": 7} and summary["operators"]
    assert summary["memory"]["arena_bytes"] >= summary["memory"]["activations_lower_bound_bytes"]
    assert summary["explain"] == qigen.Artifact(out).explain()
    assert summary["quantization"] == [] and qigen.Artifact(out).is_graph
    code, text, err = run("compile", tiny, "-o", out, "--shape", "x=5x4", "--explain")
    assert (code, err) == (0, "") and "tiny for" in text and "5x4" in text and "memory" in text
    assert qigen.load(out).inputs[1] == {"name": "z", "dtype": "float32", "shape": (5, 4)}


def test_tiles_are_explained(run: Any, run_json: Any, tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    w = np.random.default_rng(0).standard_normal((32, 48), np.float32)
    product = onnx.ModelProto()
    product.CopyFrom(
        model(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            [info("x", onnx.TensorProto.FLOAT, ["n", 32])],
            [info("y", onnx.TensorProto.FLOAT, ["n", 48])],
        )
    )
    product.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    onnx.save(product, tmp_path / "p.onnx")
    out = tmp_path / "p.qgn"
    summary = run_json("compile", tmp_path / "p.onnx", "-o", out, "--shape", "x=..9x32",
                       "--explain")  # fmt: skip
    (row,) = summary["tiles"]
    assert row["nodes"] == 1 and 0 < row["predicted_us"] <= row["rule_us"]
    assert row["kernel"] in summary["explain"][0]["kernel"]
    code, text, _ = run("compile", tmp_path / "p.onnx", "-o", out, "--explain")
    assert code == 0 and "channels" in text and "bound by" in text


def test_inspect_a_model(run: Any, run_json: Any, tiny: Path, tmp_path: Path) -> None:
    about = run_json("inspect", tiny)
    assert about["kind"] == "onnx" and about["name"] == "tiny" and "problem" not in about
    assert about["opsets"] == {"": 18} and (about["parameters"], about["bytes"]) == (4, 16)
    assert about["operators"] == {"Add": 1, "Mul": 1, "Relu": 1, "Shape": 1}
    assert about["inputs"][0] == {"name": "x", "dtype": "float", "shape": ["n", 4]}
    code, text, err = run("inspect", tiny, "--tensors")
    assert (code, err) == (0, "") and ODD in text and "nx4" in text and "Relu" in text
    info = helper.make_tensor_value_info
    text = helper.make_node("StringNormalizer", ["x"], ["y"])
    types = onnx.TensorProto.STRING
    onnx.save(model([text], [info("x", types, [2])], [info("y", types, [2])]), tmp_path / "t.onnx")
    about = run_json("inspect", tmp_path / "t.onnx")
    assert about["operators"] == {"StringNormalizer": 1} and "STRING" in about["problem"]
    assert about["inputs"] == [{"name": "x", "dtype": "string", "shape": [2]}]


def test_inspect_and_verify_an_artifact(
    run: Any, run_json: Any, artifact: Path, tmp_path: Path
) -> None:
    about = run_json("inspect", artifact)
    assert about["kind"] == "artifact" and about["config"] is None
    assert [entry["name"] for entry in about["outputs"]] == [ODD, "s"] and about["operators"]
    code, text, err = run("inspect", artifact, "--tensors")
    assert (code, err) == (0, "") and "arena" in text and ODD in text
    assert run_json("verify", artifact)["valid"] is True
    copy = tmp_path / "copy.qgn"
    shutil.copytree(artifact, copy)
    with (copy / "weights.bin").open("r+b") as weights:
        weights.seek(4100)
        weights.write(b"\x7f")
    assert run("verify", copy)[0] == 3


# ---- run -----------------------------------------------------------------------------------------


def test_run(
    run: Any, run_json: Any, artifact: Path, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    arguments = (
        "run", artifact, "--input", f"x={tmp_path / 'x.npy'}", "--input", f"z={tmp_path / 'z.npy'}",
        "--output", results, "--threads", 1,
    )  # fmt: skip
    summary = run_json(*arguments)
    assert summary["threads"] == 1 and summary["run_s"] > 0
    assert [entry["shape"] for entry in summary["inputs"]] == [[3, 4], [3, 4]]
    first, second = summary["outputs"]
    assert first == {
        "name": ODD, "file": str(results / "y_out_0.npy"), "dtype": "float32", "shape": [3, 4]
    }  # fmt: skip
    np.testing.assert_allclose(np.load(first["file"]), tiny_result(**arrays), 1e-6)
    assert np.load(second["file"]).tolist() == [3, 4]
    code, text, err = run(*arguments)
    assert (code, err) == (0, "") and f"{ODD}, float32[3, 4]" in text
    assert {file.name for file in results.iterdir()} == {"y_out_0.npy", "s.npy"}


@pytest.mark.parametrize(
    ("inputs", "code", "kind", "message"),
    [
        (["x=x.npy"], 3, "bad-input", "input z is missing"),
        (["x=x.npy", "z=z.npy", "a=x.npy"], 3, "bad-input", "no such input"),
        (["x=x.npy", "x=z.npy"], 2, "usage", "each name once"),
        (["x=x.npy", "z"], 2, "usage", "NAME=FILE.npy"),
        (["x=x.npy", "z=none.npy"], 3, "bad-input", "No such file"),
        (["x=x.npy", "z=."], 3, "bad-input", "cannot be read"),
        (["x=x.npy", "z=text.npy"], 3, "bad-input", "no .npy file"),
        (["x=x.npy", "z=cut.npy"], 3, "bad-input", "no .npy file"),
        (["x=x.npy", "z=huge.npy"], 3, "bad-input", "fit into memory"),
        (["x=x.npy", "z=objects.npy"], 3, "bad-input", "no .npy file"),
        (["x=x.npy", "z=several.npz"], 3, "bad-input", "archive"),
        (["x=x.npy", "z=double.npy"], 3, "bad-input", "must be float32, not float64"),
        (["x=x.npy", "z=strings.npy"], 3, "bad-input", "must be float32"),
        (["x=x.npy", "z=vector.npy"], 3, "bad-input", "2 dimensions"),
        (["x=x.npy", "z=other.npy"], 3, "bad-input", "elsewhere it is 3"),
    ],
)
def test_run_refuses(
    inputs: list[str],
    code: int,
    kind: str,
    message: str,
    run: Any,
    artifact: Path,
    arrays: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    x = arrays["x"]
    np.save("double.npy", x.astype(float))
    np.save("vector.npy", x[0])
    np.save("other.npy", x[:2])
    np.save("strings.npy", np.array([["a"] * 4] * 3))
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez("several.npz", x=x)
    whole = Path("x.npy").read_bytes()
    Path("cut.npy").write_bytes(whole[:-5])
    Path("text.npy").write_text("no numbers\n")
    declared = b"(" + b"9" * 13 + b", 4), }"
    huge = whole.replace(b"(3, 4), }" + b" " * 12, declared)
    assert len(huge) == len(whole) and huge != whole
    Path("huge.npy").write_bytes(huge)
    options = [part for entry in inputs for part in ("--input", entry)]
    got, out, err = run("run", artifact, *options, "--output", "OUT", "--json")
    error = json.loads(out)["error"]
    assert (got, error["kind"]) == (code, kind) and message in error["message"], error
    assert err.count("\n") == 1 and not (tmp_path / "OUT").exists()


def test_results_appear_all_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict[str, np.ndarray]
) -> None:
    names = ["a/b", "a:b", "..", "", "-x", "a" * 300, "é"]
    made = file_names(names)
    assert len(set(made.values())) == len(names)
    assert made["a/b"] == "a_b" and made["a:b"] == "a_b_2" and made[".."] == "_." and made["é"]
    real, calls = np.save, []

    def save(stream: Any, array: Any) -> None:
        calls.append(array)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(stream, array)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", save)
        with pytest.raises(OSError, match="space"):
            write_arrays(tmp_path / "new", arrays)
    assert not (tmp_path / "new").exists()
    files = write_arrays(tmp_path / "new", arrays)
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == ["x.npy", "z.npy"]
    assert np.array_equal(read_array(files["x"]), arrays["x"])


def test_names_with_equals_signs(tmp_path: Path) -> None:
    (tmp_path / "f.npy").touch()
    file = tmp_path / "f.npy"
    assert parse_files([f"a=b={file}"]) == {"a=b": file}
    assert parse_files(["a=b=none.npy"]) == {"a": Path("b=none.npy")}


def test_run_writes_into_a_folder(run: Any, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, err = run("run", artifact, "--output", tmp_path / "file")
    assert code == 2 and "is a file" in err


# ---- what makes no sense -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compile", "TINY", "-o", "OUT", "--shape", "x"], 2, "NAME=1x3"),
        (["compile", "TINY", "-o", "OUT", "--shape", "y=1x4"], 2, "the model has x, z"),
        (["compile", "TINY", "-o", "OUT", "--shape", "x=4"], 2, "dimensions"),
        (["compile", "TINY", "-o", "OUT", "--shape", "x=ax4"], 2, "no size"),
        (["compile", "TINY", "-o", "OUT", "--shape", "x=1x5"], 2, "fixes it to 4"),
        (["compile", "TINY", "-o", "OUT", "--shape", "x=1x4", "--shape", "x=1x4"], 2, "twice"),
        (["compile", "TINY", "-o", "OUT", "--shape", "x=1x4", "--shape", "z=2x4"], 2, "elsewhere"),
        (["compile", "TINY", "-o", "OUT", "--max-seq", "5"], 2, "--max-seq"),
        (["compile", "TINY", "-o", "OUT", "--kv", "int8"], 2, "--kv"),
        (["compile", "TINY", "-o", "OUT", "--activations", "int4"], 2, "takes f32, bf16 or int8"),
        (["compile", "STORIES", "-o", "OUT", "--shape", "x=1"], 2, "--shape"),
        (["compile", "STORIES", "-o", "OUT", "--calibration", "x"], 2, "--calibration"),
        (["compile", "none.onnx", "-o", "OUT"], 3, "none.onnx"),
        (["inspect", "none.onnx"], 3, "none.onnx"),
        (["generate", "ARTIFACT", "-p", "a"], 4, "no language model"),
        (["tokenize", "ARTIFACT", "-p", "a"], 4, "no language model"),
        (["eval", "ARTIFACT", "--text", "TINY.txt"], 4, "no language model"),
        (["bench", "ARTIFACT", "--prefill", "5"], 2, "--prefill"),
        (["bench", "ARTIFACT", "--vs", "llama.cpp"], 4, "onnxruntime"),
        (["bench", "ARTIFACT", "--shape", "q=5"], 3, "no such input"),
        (["bench", "ARTIFACT", "--shape", "x=5x5"], 2, "does not fit"),
        (["bench", "ARTIFACT", "--shape", "x=?x4"], 2, "needs numbers"),
    ],
)
def test_errors(
    arguments: list[str],
    code: int,
    message: str,
    run: Any,
    tiny: Path,
    artifact: Path,
    stories_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TINY.txt").write_text("text")
    names = {"TINY": tiny, "ARTIFACT": artifact, "STORIES": stories_gguf}
    got, out, err = run(*(names.get(argument, argument) for argument in arguments))
    assert (got, out) == (code, "") and message in err and err.count("\n") == 1
    assert not (tmp_path / "OUT").exists()


def test_no_sessions(artifact: Path) -> None:
    model = qigen.load(artifact)
    assert not model.is_language_model
    for call in (
        model.session,
        lambda: model.batch_eval([], []),
        lambda: model.generate("a"),
        lambda: model.generate_tokens([1]),
        model._raw.session,
    ):
        with pytest.raises(Unsupported, match="no language model"):
            call()


def test_bench_of_the_wrong_kind(artifact: Path, stories_artifact: Any) -> None:
    from qigen.bench import bench
    from qigen.bench_graph import bench_graph

    with pytest.raises(Unsupported, match="bench_graph"):
        bench(artifact)
    with pytest.raises(UsageError, match="language model"):
        bench_graph(stories_artifact())
    with pytest.raises(BadInput, match="no artifact"):
        bench_graph(artifact / "none")
