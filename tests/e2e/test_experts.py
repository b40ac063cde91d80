"""Mixtures of experts: MXFP4 checkpoints of gpt-oss, prompts whose rows spread unevenly, and all
that the command line does with a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qigen
from qigen.artifact import Artifact
from qigen.errors import BadInput, Unsupported
from qigen.frontends import build_graph, load_huggingface
from qigen.ir.interpreter import Interpreter
from qigen.quantize.weights import requantized
from tests.e2e.harness import JOBS, Compiled, relative_error
from tests.e2e.test_families import TOKENS, TOLERANCE, check
from tests.frontends.packing import gptq, write_gpt_oss, write_mixtral
from tests.frontends.tiny import Tiny, tiny

NEVER = 3
"""An expert that no token goes to."""

LONG = np.random.default_rng(3).integers(3, 96, 150).tolist()
"""A prompt that gives some experts several tiles of rows."""

OVERRIDES = {"context": 256}


def plain_gpt_oss(spec: Tiny, w: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """float64 [T, vocab]: the model as its description has it, one token and expert at a time.

    Written from the text of the model card (arXiv:2508.10925), the release's ``torch/model.py`` and
    the paper on YaRN (arXiv:2309.00071).
    """
    w = {name: values.astype(np.float64) for name, values in w.items()}
    hd, group = spec.head_dim, spec.n_heads // spec.n_kv_heads
    s = spec.rope_scaling

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]

    def project(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    # fast pairs turn as they did, slow ones are slowed down; between them goes a ramp
    i = np.arange(hd // 2)
    frequency = spec.rope_base ** (-2 * i / hd)

    def pair(turns: float) -> float:  # the number of the pair that turns so often, not rounded
        share = s["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return hd * math.log(share) / (2 * math.log(spec.rope_base))

    low, high = max(pair(s["beta_fast"]), 0), min(pair(s["beta_slow"]), hd - 1)
    kept = 1 - np.clip((i - low) / (high - low), 0, 1)
    frequency = frequency * kept + frequency / s["factor"] * (1 - kept)
    angles = np.arange(len(tokens))[:, None, None] * frequency
    amplitude = 0.1 * math.log(s["factor"]) + 1

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = x[..., : hd // 2], x[..., hd // 2 :]
        cos, sin = np.cos(angles) * amplitude, np.sin(angles) * amplitude
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(spec.n_layers):
        name = f"model.layers.{layer}"
        h = norm(x, f"{name}.input_layernorm")
        q, k, v = (project(h, f"{name}.self_attn.{p}_proj").reshape(len(tokens), -1, hd)
                   for p in "qkv")  # fmt: skip
        q, k = rotate(q), rotate(k)
        out = np.empty((len(tokens), spec.n_heads, hd))
        for t in range(len(tokens)):
            first = max(0, t + 1 - spec.window) if layer % 2 == 0 else 0
            for head in range(spec.n_heads):
                keys = k[first : t + 1, head // group]
                scores = np.append(keys @ q[t, head] / math.sqrt(hd),
                                   w[f"{name}.self_attn.sinks"][head])  # fmt: skip
                p = np.exp(scores - scores.max())
                out[t, head] = (p / p.sum())[:-1] @ v[first : t + 1, head // group]
        x = x + project(out.reshape(len(tokens), -1), f"{name}.self_attn.o_proj")
        h = norm(x, f"{name}.post_attention_layernorm")
        logits = project(h, f"{name}.mlp.router")
        for t in range(len(tokens)):
            best = np.argsort(-logits[t])[: spec.used]
            share = np.exp(logits[t, best]) / np.exp(logits[t, best]).sum()
            for e, part in zip(best, share, strict=True):
                experts = f"{name}.mlp.experts"
                both = w[f"{experts}.gate_up_proj"][e] @ h[t] + w[f"{experts}.gate_up_proj_bias"][e]
                gate, up = np.minimum(both[0::2], 7), np.clip(both[1::2], -7, 7)
                inner = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
                down = w[f"{experts}.down_proj"][e] @ inner + w[f"{experts}.down_proj_bias"][e]
                x[t] = x[t] + part * down
    return norm(x, "model.norm") @ w["lm_head.weight"].T


@dataclass
class GptOss:
    folder: Path
    weights: dict[str, np.ndarray]
    artifact: Artifact
    activations: str

    def expected(self, tokens: list[int]) -> np.ndarray:
        graph = build_graph(load_huggingface(self.folder))
        rows = np.arange(len(tokens), dtype=np.int32)
        run = Interpreter(graph, activations=self.activations, kv="f16")
        return run.step({"input_ids": tokens, "rows": rows})["logits"]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], GptOss]:
    made: dict[str, GptOss] = {}

    def get(activations: str) -> GptOss:
        if activations not in made:
            base = tmp_path_factory.mktemp("gpt-oss")
            folder, weights = write_gpt_oss(base / "model", never=NEVER, **OVERRIDES)
            artifact = qigen.compile(folder, base / "m.qgn", activations=activations, jobs=JOBS)
            made[activations] = GptOss(folder, weights, artifact, activations)
        return made[activations]

    return get


def test_the_reference_is_the_model(tmp_path: Path) -> None:
    """The interpreter in float64 against the model written down plainly."""
    folder, weights = write_gpt_oss(tmp_path / "m", **OVERRIDES)
    graph = build_graph(load_huggingface(folder))
    rows = np.arange(len(TOKENS), dtype=np.int32)
    found = Interpreter(graph, dtype=np.float64).step({"input_ids": TOKENS, "rows": rows})["logits"]
    expected = plain_gpt_oss(tiny("gpt-oss", **OVERRIDES), weights, TOKENS)
    assert np.abs(found - expected).max() < 1e-6 * expected.std()  # biases are float32 numbers


def test_the_prompt_spreads_unevenly(gpt_oss: Callable[[str], GptOss]) -> None:
    """What the tests below are about: experts with many rows, with few, and with none."""
    graph = build_graph(load_huggingface(gpt_oss("int8").folder))
    graph.outputs = ["blk.0.router", "blk.1.router"]
    step = Interpreter(graph).step({"input_ids": LONG, "rows": [0]})
    for name in graph.outputs:
        counts = (step[name] != 0).sum(axis=0)
        assert counts[NEVER] == 0 and len(set(counts)) > 3
        assert counts.sum() == 2 * len(LONG)


@pytest.mark.parametrize("activations", [pytest.param("f32", marks=pytest.mark.slow), "int8"])
def test_logits_of_mxfp4(gpt_oss: Callable[[str], GptOss], activations: str) -> None:
    model = gpt_oss(activations)
    limit = TOLERANCE[activations, "f16"]
    expected = model.expected(LONG)
    by_threads = []
    for threads in (1, 2, 3):
        loaded = qigen.load(model.artifact.path, threads=threads)
        prompt = loaded.session().eval(LONG, all=True)
        assert relative_error(prompt, expected) < limit
        session = loaded.session()
        session.eval(LONG[:-20])
        decoded = np.stack([session.eval([token]) for token in LONG[-20:]])
        assert relative_error(decoded, expected[-20:]) < limit
        by_threads.append(np.concatenate([prompt, decoded]))
    assert np.array_equal(by_threads[0], by_threads[1])  # threads do not change a bit
    assert np.array_equal(by_threads[0], by_threads[2])


def test_a_batch_of_sessions(gpt_oss: Callable[[str], GptOss]) -> None:
    """Rows of several sessions go to experts together."""
    loaded = qigen.load(gpt_oss("int8").artifact.path, threads=2)
    prompts = [LONG[:7], LONG[20:25], LONG[40:52]]
    alone = []
    for prompt in prompts:
        session = loaded.session()
        session.eval(prompt)
        alone.append(session.eval([9]))
    sessions = [loaded.session() for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.eval(prompt)
    together = loaded.batch_eval(sessions, [9, 9, 9])
    assert relative_error(np.stack(list(together)), np.stack(alone)) < TOLERANCE["int8", "f16"]


def test_codes_of_experts_come_back(gpt_oss: Callable[[str], GptOss]) -> None:
    """MXFP4 is kept without loss: the packed weights give the checkpoint's numbers."""
    model = gpt_oss("int8")
    model.artifact.verify()
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        for e in range(5):
            both = model.weights[f"{experts}.gate_up_proj"][e]
            down = model.weights[f"{experts}.down_proj"][e]
            for stem, values in (("gate", both[0::2]), ("up", both[1::2]), ("down", down)):
                found = model.artifact.unpack(f"blk.{layer}.ffn_{stem}_exps.{e}.weight")
                assert found.format.name == "mxfp4"
                assert np.array_equal(found.dequantize(), values)


def test_what_a_token_reads(gpt_oss: Callable[[str], GptOss]) -> None:
    """Two of five experts; the manifest and the plan say so."""
    manifest = gpt_oss("int8").artifact.manifest
    graph = build_graph(load_huggingface(gpt_oss("int8").folder))
    sizes = {name: graph.constant_bytes(name) for name in graph.constants
             if len(graph.values[name].shape) == 2 and name != "token_embd.weight"}  # fmt: skip
    experts = sum(n for name, n in sizes.items() if "_exps." in name)
    rest = sum(n for name, n in sizes.items() if "_exps." not in name)
    assert manifest["weights_read_per_token"] == rest + experts * 2 // 5
    assert manifest["config"]["experts"]["used"] == 2
    assert {k["format"] for k in manifest["plan"]["kernels"]} == {"mxfp4", "bf16"}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"quant": "q4_0", "activations": "int8"}),
        ("qwen3moe", {"container": "hf", "weights": "u4g32", "activations": "int8"}),
        pytest.param("qwen3moe", {"container": "hf", "overrides": {"normalize": False}},
                     marks=pytest.mark.slow),
        pytest.param("mixtral", {"quant": "f32"}, marks=pytest.mark.slow),
        pytest.param("mixtral", {"quant": "q4_0", "activations": "bf16"}, marks=pytest.mark.slow),
        pytest.param("gpt-oss", {"quant": "mxfp4", "activations": "int4"}, marks=pytest.mark.slow),
        pytest.param("gpt-oss", {"quant": "mxfp4", "kv": "int8"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_families(compiled: Callable[..., Compiled], family: str, options: dict[str, Any]) -> None:
    check(compiled(family=family, **options))


@pytest.mark.slow
def test_sinks_beyond_a_chunk(compiled: Callable[..., Compiled]) -> None:
    """Attention over more than 256 positions is combined from parts: the sink counts once."""
    tokens = np.random.default_rng(8).integers(3, 96, 600).tolist()
    made = compiled(family="gpt-oss", quant="q8_0", overrides={"context": 1024, "n_layers": 2})
    session = made.session()
    session.eval(tokens[:590])
    found = np.stack([session.eval([token]) for token in tokens[590:]])
    assert relative_error(found, made.expected(tokens)[590:]) < TOLERANCE["f32", "f16"]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["u4g32", "s3g32"])
def test_experts_are_rounded(tmp_path: Path, weights: str) -> None:
    folder, _ = write_gpt_oss(tmp_path / "m")
    artifact = qigen.compile(folder, tmp_path / "m.qgn", weights=weights, activations="f32",
                             jobs=JOBS)  # fmt: skip
    found = qigen.load(artifact.path, threads=2).session().eval(TOKENS, all=True)
    graph = requantized(build_graph(load_huggingface(folder)), qigen.formats.by_name(weights))
    rows = np.arange(len(TOKENS), dtype=np.int32)
    expected = Interpreter(graph, kv="f16").step({"input_ids": TOKENS, "rows": rows})["logits"]
    assert relative_error(found, expected) < TOLERANCE["f32", "f16"]


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["f32", "int8"])
def test_mixtral_of_gptq(tmp_path: Path, activations: str) -> None:
    """Groups of 64 along rows of 96: the last one of every row of the down matrices is short."""
    folder, _ = write_mixtral(tmp_path / "m", gptq(4, 64))
    artifact = qigen.compile(folder, tmp_path / "m.qgn", activations=activations, jobs=JOBS)
    found = qigen.load(artifact.path, threads=2).session().eval(TOKENS, all=True)
    rows = np.arange(len(TOKENS), dtype=np.int32)
    run = Interpreter(build_graph(load_huggingface(folder)), activations=activations, kv="f16")
    expected = run.step({"input_ids": TOKENS, "rows": rows})["logits"]
    assert relative_error(found, expected) < TOLERANCE[activations, "f16"]


@pytest.mark.slow
def test_calibrated_methods(tmp_path: Path) -> None:
    """Attention is quantized by its Hessian, experts without statistics; what folds into
    neighbours, or chooses formats, is refused by name."""
    folder, _ = write_gpt_oss(tmp_path / "m", **OVERRIDES)
    text = tmp_path / "ids.npy"
    np.save(text, np.random.default_rng(0).integers(3, 96, 512))
    artifact = qigen.compile(folder, tmp_path / "m.qgn", weights="u4g32", calibration=text,
                             jobs=JOBS)  # fmt: skip
    methods = {o["matrix"]: o["method"] for o in artifact.manifest["quantization"]}
    assert methods["blk.0.attn_q.weight"] == "gptq"
    assert methods["blk.0.ffn_up_exps.0.weight"] == "clip"
    for method in ("awq", "hadamard"):
        with pytest.raises(Unsupported, match=f"method {method} folds"):
            qigen.compile(folder, tmp_path / "x", weights="u4g32", calibration=text, method=method)


def test_what_is_refused(tmp_path: Path) -> None:
    folder, _ = write_gpt_oss(tmp_path / "m")
    with pytest.raises(Unsupported, match="formats are not chosen for mixtures of experts"):
        qigen.compile(folder, tmp_path / "x", weights="auto", budget="bits=4")
    with pytest.raises(Unsupported, match=r"(experts|sinks) have no GPU kernels"):
        qigen.compile(folder, tmp_path / "x", target="sm_80")


DAMAGES: dict[str, tuple[dict[str, Any], str, str]] = {
    # settings, tensor that is changed, message
    "router": ({}, "model.layers.1.mlp.router.weight", "has the shape [4, 64], but the config"),
    "router bias": ({}, "model.layers.1.mlp.router.bias", "has the shape [4], but the config"),
    "sinks": ({}, "model.layers.0.self_attn.sinks", "has the shape [3], but the config"),
    "experts": ({"num_local_experts": 6}, "", "_bias' holds 5 experts, but the configuration"),
    "scales": ({}, "model.layers.0.mlp.experts.down_proj_scales", "has the shape [4, 64, 3]"),
    "blocks": ({}, "model.layers.0.mlp.experts.down_proj_blocks", "has the shape [5, 64, 3], ex"),
    "bias": ({}, "model.layers.0.mlp.experts.gate_up_proj_bias", "holds 4 experts, but the conf"),
    "too many chosen": ({"num_experts_per_tok": 6}, "", "6 experts are to compute a token, but"),
    "width": ({"intermediate_size": 64}, "", "gate_up_proj.0.weight' has the shape [192, 64]"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(name: str, tmp_path: Path) -> None:
    settings, tensor, message = DAMAGES[name]
    folder, _ = write_gpt_oss(tmp_path / "m", config=settings)
    if tensor:
        _edit(folder, tensor, lambda array: array[:-1])
    with pytest.raises(BadInput) as error:
        load_huggingface(folder)
    assert message in error.value.message
    assert not tensor or tensor.rsplit("_", 1)[0] in error.value.message
    assert str(folder) in error.value.where


def test_scales_that_are_missing_or_no_numbers(tmp_path: Path) -> None:
    folder, _ = write_gpt_oss(tmp_path / "m")
    name = "model.layers.1.mlp.experts.down_proj_scales"

    def not_a_number(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[2, 7, 1] = 255
        return array

    _edit(folder, name, not_a_number)
    with pytest.raises(BadInput, match="NaN") as error:
        qigen.compile(folder, tmp_path / "m.qgn", jobs=JOBS)
    assert "model.safetensors" in error.value.where
    assert "model.layers.1.mlp.experts.down_proj.2" in error.value.where
    _edit(folder, name, None)
    with pytest.raises(BadInput, match=r"experts.down_proj_scales' is missing"):
        load_huggingface(folder)


def _edit(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray] | None) -> None:
    """Change, or leave out, a tensor of a checkpoint."""
    from qigen.frontends.huggingface import read_safetensors
    from tests.frontends.tiny import Tensors, write_safetensors

    tensors: Tensors = {}
    for key, raw in read_safetensors(folder / "model.safetensors").items():
        array = np.array(raw.array())
        if key == name and change is None:
            continue
        tensors[key] = (raw.dtype, change(array) if key == name and change else array)
    write_safetensors(folder / "model.safetensors", tensors)


def test_the_llvm_backend_gives_the_same_bits(
    gpt_oss: Callable[[str], GptOss], tmp_path: Path
) -> None:
    pytest.importorskip("llvmlite")
    model = gpt_oss("int8")
    other = qigen.compile(model.folder, tmp_path / "l.qgn", activations="int8", backend="llvm",
                          jobs=JOBS)  # fmt: skip
    found = [qigen.load(path, threads=2).session().eval(LONG, all=True)
             for path in (other.path, model.artifact.path)]  # fmt: skip
    assert np.array_equal(*found)


def test_the_command_line(gpt_oss: Callable[[str], GptOss], run: Any, tmp_path: Path) -> None:
    model = gpt_oss("int8")
    path = model.artifact.path

    def answer(*arguments: object) -> Any:
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    about = answer("inspect", path)
    assert about["config"]["experts"]["count"] == 5
    assert about["formats"]["mxfp4"]["tensors"] == 2 * 5 * 3
    assert answer("inspect", model.folder)["config"]["experts"]["used"] == 2
    text = answer("generate", path, "--prompt", "the", "-n", 5, "--greedy")
    assert len(text["tokens"]) <= 5
    (tmp_path / "t.txt").write_text("the word is not the end of the line, and so on. " * 10)
    assert answer("eval", path, "--text", tmp_path / "t.txt", "--context", 64)["perplexity"] > 1
    speed = answer("bench", path, "--prefill", 16, "--decode", 4, "--repeat", 1)
    assert speed["weight_bytes"] == model.artifact.manifest["weights_read_per_token"]
