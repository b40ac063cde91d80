"""The Hugging Face reader: containers, configurations, and its errors."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from qigen.errors import BadInput, QigenError, Unsupported
from qigen.formats.blocks import to_blocks
from qigen.frontends import LanguageModel, build_graph, load_huggingface, load_model
from qigen.ir.interpreter import Interpreter
from tests.frontends.tiny import (
    LLAMA3_SCALING,
    REFERENCE_TOKENS,
    llama3_factors,
    tiny,
    weights,
    write_floats,
    write_tiny_hf,
)


def logits(model: LanguageModel) -> np.ndarray:
    """Logits of the last of the reference tokens."""
    return Interpreter(build_graph(model)).step({"input_ids": REFERENCE_TOKENS})["logits"][0]


# -- containers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_dtypes_are_kept(dtype: str, tmp_path: Path) -> None:
    model = load_huggingface(write_tiny_hf(tmp_path / "m", "llama", dtype=dtype))
    made = weights(tiny("llama"))
    for handle in model.tensors.values():
        assert handle.format.name == dtype.lower()
        loaded, expected = handle.load(), made[handle.source.tensor]
        tolerance = {"F32": 0.0, "F16": 1e-3, "BF16": 1e-2}[dtype]
        if isinstance(loaded, np.ndarray):
            assert loaded.dtype == np.float32
            values = loaded
        else:
            assert to_blocks(loaded).tobytes() == handle.raw().tobytes()
            values = loaded.dequantize()
        assert np.allclose(values, expected, rtol=tolerance, atol=1e-6)


def test_files_of_the_safetensors_package(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "m", "qwen3")
    before = logits(load_huggingface(folder))
    made = weights(tiny("qwen3"))
    safetensors.numpy.save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    assert (logits(load_huggingface(folder)) == before).all()


def test_shards(tmp_path: Path) -> None:
    one = load_huggingface(write_tiny_hf(tmp_path / "one", "gemma3"))
    three = load_huggingface(write_tiny_hf(tmp_path / "three", "gemma3", shards=3))
    assert len(three.metadata.files) == 3
    assert (logits(one) == logits(three)).all()
    assert {h.source.file for h in three.tensors.values()} == set(three.metadata.files)


def test_gemma_norms_get_their_one(tmp_path: Path) -> None:
    model = load_huggingface(write_tiny_hf(tmp_path / "m", "gemma3"))
    made = weights(tiny("gemma3"))
    for stem, name in {
        "attn_norm": "input_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }.items():
        loaded = model.tensors[f"blk.2.{stem}.weight"].load()
        assert np.allclose(loaded, made[f"model.layers.2.{name}.weight"] + 1.0)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("language_model.model.", "language_model.lm_head."),
        ("model.language_model.", "lm_head."),
    ],
)
def test_text_part_of_a_multimodal_gemma3(prefix: str, head: str, tmp_path: Path) -> None:
    plain = load_huggingface(write_tiny_hf(tmp_path / "plain", "gemma3", tied=False))
    folder = write_tiny_hf(tmp_path / "m", "gemma3", tied=False)
    config = json.loads((folder / "config.json").read_text())
    outer = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [2, 5],
        "text_config": {k: v for k, v in config.items() if k != "eos_token_id"},
        "vision_config": {},
    }
    (folder / "config.json").write_text(json.dumps(outer))
    made = {
        name.replace("model.", prefix, 1).replace("lm_head.", head, 1): tensor
        for name, tensor in weights(tiny("gemma3", tied=False)).items()
    }
    vision = "model.vision_tower" if prefix.startswith("model") else "vision_tower"
    made[f"{vision}.patch.weight"] = np.zeros((2, 3, 4, 4), np.float32)
    made["multi_modal_projector.norm.weight"] = np.zeros(4, np.float32)
    write_floats(folder / "model.safetensors", made)
    model = load_huggingface(folder)
    assert (logits(model) == logits(plain)).all()
    assert model.config.eos_ids == (2, 5)
    assert "2 tensors" in model.metadata.notes[0]


def test_tied_head_in_the_file_is_not_used(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "m", "qwen2")
    before = logits(load_huggingface(folder))
    made = weights(tiny("qwen2"))
    made["lm_head.weight"] = np.zeros((96, 64), np.float32)
    made["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    write_floats(folder / "model.safetensors", made)
    assert (logits(load_huggingface(folder)) == before).all()


def test_metadata(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "my-model", "llama")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    model = load_model(folder)
    assert model.metadata.name == "my-model"
    assert model.metadata.licence == "apache-2.0"
    assert model.config.eos_ids == (2, 7)
    assert model.tokenizer_source.container == "huggingface"
    assert model.tokenizer_source.path == folder


# -- configurations -------------------------------------------------------------------------------


def test_newer_rope_parameters_mean_the_same(tmp_path: Path) -> None:
    def run(family: str, scaling: dict[str, Any], **config: Any) -> np.ndarray:
        folder = write_tiny_hf(tmp_path / "m", family, rope_scaling=scaling, config=config)
        return logits(load_huggingface(folder))

    old = run("llama", LLAMA3_SCALING)
    parameters = {**LLAMA3_SCALING, "rope_theta": 10000.0}
    assert (run("llama", {}, rope_parameters=parameters, rope_theta=None) == old).all()

    linear = {"rope_type": "linear", "factor": 8.0}
    old = run("gemma3", linear)
    parameters = {
        "full_attention": {**linear, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    changes = {"rope_theta": None, "rope_local_base_freq": None, "sliding_window_pattern": None}
    types = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    new = run("gemma3", {}, rope_parameters=parameters, layer_types=types, **changes)
    assert (new == old).all()


def test_llama3_factors(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "m", "llama", rope_scaling=LLAMA3_SCALING)
    factors = load_huggingface(folder).config.rope.factors
    expected = llama3_factors(tiny("llama", rope_scaling=LLAMA3_SCALING))
    assert np.allclose(factors, expected, rtol=1e-6)
    assert 1.0 < expected.max() <= 8.0


def test_sliding_layers_of_qwen(tmp_path: Path) -> None:
    def config(**changes: Any) -> Any:
        return load_huggingface(write_tiny_hf(tmp_path / "m", "qwen2", config=changes)).config

    assert config(sliding_window=8).window == 0
    found = config(sliding_window=8, use_sliding_window=True, max_window_layers=1)
    assert (found.window, found.sliding_layers) == (8, (False, True, True))
    assert config(sliding_window=8, use_sliding_window=True, max_window_layers=3).window == 0


def test_defaults_of_the_families(tmp_path: Path) -> None:
    """What a configuration leaves out is what the family's own code assumes."""
    folder = write_tiny_hf(
        tmp_path / "a", "mistral", config={"sliding_window": None, "head_dim": None}
    )
    config = load_huggingface(folder).config
    assert (config.window, config.head_dim) == (4096, 16)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sliding_window": None}))
    assert load_huggingface(folder).config.window == 0  # null is not the same as absent
    changes = dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"))
    config = load_huggingface(write_tiny_hf(tmp_path / "b", "gemma2", config=changes)).config
    assert (config.attn_softcap, config.final_softcap) == (50.0, 30.0)


# -- errors ---------------------------------------------------------------------------------------

CONFIG_ERRORS: dict[str, tuple[str, dict[str, Any], type[QigenError], str]] = {
    "model type": ("llama", {"model_type": "mamba"}, Unsupported, "'mamba' is not supp"),
    "class": (
        "llama", {"architectures": ["LlamaForSequenceClassification"]}, Unsupported,
        "'LlamaForSequenceClassification' is not supported",
    ),
    "quantized": (
        "llama", {"quantization_config": {"quant_method": "quip", "bits": 4}}, Unsupported,
        "quantized by 'quip'",
    ),
    "yarn": (
        "llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4, "mscale": 0.7}}, Unsupported,
        "yarn with 'mscale'",
    ),
    "no yarn": ("llama", {"rope_scaling": {"rope_type": "yarn"}}, BadInput, "'factor' is missing"),
    "more chosen": ("mixtral", {"num_experts_per_tok": 5}, BadInput, "but there are 4"),
    "more experts": (
        "mixtral", {"num_local_experts": 5}, BadInput,
        r"moe.gate.weight' has the shape \[4, 64\], but the configuration asks for \[5, 64",
    ),
    "stacked experts": (
        "gpt-oss", {"num_local_experts": 4}, BadInput,
        "mlp.experts.gate_up_proj' holds 5 experts, but the configuration says 4",
    ),
    "dense layers": ("qwen3moe", {"mlp_only_layers": [0]}, Unsupported, "layers without experts"),
    "wide experts": (
        "qwen3moe", {"moe_intermediate_size": 48}, BadInput,
        r"0.gate_proj.weight' has the shape \[40, 64\], but the configuration asks for \[48",
    ),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4}}, Unsupported, "'dyn"),
    "activation": ("llama", {"hidden_act": "relu"}, Unsupported, "activation 'relu'"),
    "bidirectional": (
        "gemma3", {"use_bidirectional_attention": True}, Unsupported, "bidirectional",
    ),
    "layer type": (
        "gemma3", {"layer_types": ["chunked_attention"] * 7}, Unsupported, "'chunked_attention'",
    ),
    "layer types": ("gemma3", {"layer_types": ["full_attention"]}, BadInput, "a list of 7 names"),
    "missing": ("llama", {"hidden_size": None}, BadInput, "'hidden_size' is missing"),
    "negative": ("llama", {"num_hidden_layers": -1}, BadInput, "'num_hidden_layers' is -1"),
    "layers": ("llama", {"num_hidden_layers": 60000}, BadInput, "60000 layers"),
    "more layers": (
        "llama", {"num_hidden_layers": 4}, BadInput, "'model.layers.3.input_layernorm.weight'",
    ),
    "fewer layers": ("llama", {"num_hidden_layers": 2}, BadInput, "does not belong to a llama"),
    "fraction": ("llama", {"hidden_size": 64.5}, BadInput, "a whole number"),
    "flag": ("llama", {"tie_word_embeddings": "yes"}, BadInput, "true or false"),
    "heads": ("llama", {"num_key_value_heads": 3}, BadInput, "cannot share 3"),
    "no head_dim": (
        "llama", {"head_dim": None, "num_attention_heads": 5}, BadInput, "5 heads do not divide",
    ),
    "width": ("llama", {"hidden_size": 32}, BadInput, r"has the shape \[96, 64\]"),
    "vocabulary": ("llama", {"vocab_size": 97}, BadInput, "97 tokens but the embedding"),
    "eos": ("llama", {"eos_token_id": 96}, BadInput, "token ids below 96"),
    "bos": ("llama", {"bos_token_id": -1}, BadInput, "from 0 to 95"),
    "bias": ("llama", {"attention_bias": True}, BadInput, "q_proj.bias' is missing"),
    "surplus bias": ("qwen2", {"model_type": "llama", "architectures": None}, BadInput, "belong"),
    "rope": ("llama", {"rope_theta": 0}, BadInput, "'rope_theta' is 0"),
    "odd rope": ("phi3", {"partial_rotary_factor": 0.7}, BadInput, "numbers|must be even"),
    "llama3": (
        "llama", {"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 1.0}}, BadInput,
        "above low_freq_factor",
    ),
    "factors": (
        "phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}},
        BadInput, "a list of 6 numbers",
    ),
    "rope object": ("llama", {"rope_scaling": 3}, BadInput, "an object"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_configurations_that_are_refused(name: str, tmp_path: Path) -> None:
    family, config, kind, message = CONFIG_ERRORS[name]
    folder = write_tiny_hf(tmp_path / "m", family, config=config)
    with pytest.raises(kind, match=message) as error:
        load_huggingface(folder)
    assert error.value.where.startswith(str(folder))
    assert error.value.message.isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"[" * 200_000, "not valid JSON"),
    ],
)
def test_damaged_configuration(text: bytes, message: str, tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "m", "llama")
    (folder / "config.json").write_bytes(text)
    with pytest.raises(BadInput, match=message):
        load_huggingface(folder)


WEIGHT_ERRORS: dict[str, tuple[Callable[[bytes], bytes], type[QigenError], str]] = {
    "empty": (lambda d: b"", BadInput, "is empty"),
    "short": (lambda d: d[:5], BadInput, "no valid safetensors"),
    "truncated": (lambda d: d[:-1], BadInput, "no valid safetensors"),
    "padded": (lambda d: d + b"\0", BadInput, "no valid safetensors"),
    "header length": (lambda d: b"\xff" * 8 + d[8:], BadInput, "no valid safetensors"),
    "type": (lambda d: d.replace(b'"F32"', b'"I32"', 1), Unsupported, "the type I32"),
    "name": (
        lambda d: d.replace(b"layers.1.mlp.up_proj", b"layers.1.mlp.op_proj", 1), BadInput,
        "'model.layers.1.mlp.up_proj.weight' is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHT_ERRORS)
def test_damaged_weights(name: str, tmp_path: Path) -> None:
    edit, kind, message = WEIGHT_ERRORS[name]
    folder = write_tiny_hf(tmp_path / "m", "llama")
    path = folder / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(kind, match=message) as error:
        load_huggingface(folder)
    assert error.value.where.startswith(str(folder))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", "..", 3]
)
def test_index_may_not_leave_the_folder(name: Any, tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "m", "llama", shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    (tmp_path / "secret.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="no plain file name"):
        load_huggingface(folder)


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "m", "llama", shards=2)
    path = folder / "model.safetensors.index.json"
    text = path.read_text()
    index = json.loads(text)
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(BadInput, match=r"'model.norm.weight' is not in the index"):
        load_huggingface(folder)
    index = json.loads(text)
    index["weight_map"]["model.more.weight"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(BadInput, match=r"'model.more.weight' is missing"):
        load_huggingface(folder)
    path.write_text(text)
    next(folder.glob("*-00002-*")).unlink()
    with pytest.raises(BadInput, match="no such file"):
        load_huggingface(folder)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        load_huggingface(tmp_path / "none")
    with pytest.raises(BadInput, match="no such file"):
        load_huggingface(tmp_path)
    folder = write_tiny_hf(tmp_path / "m", "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"convert 'pytorch_model.bin' to safetensors"):
        load_huggingface(folder)


def test_damaged_folders_are_refused_cleanly(tmp_path: Path) -> None:
    """Random damage to the configuration and to the header of the weights."""
    folder = write_tiny_hf(tmp_path / "m", "phi3", n_layers=1)
    rng = random.Random(5)
    refused = 0
    for round in range(800):
        path = folder / ("config.json" if round % 2 else "model.safetensors")
        data = path.read_bytes()
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 2, 8))):
            at = rng.randrange(min(len(damaged), 1500))
            if rng.random() < 0.6:
                damaged[at] = rng.choice(b'0123456789"{}[]:,-. enulltrue\x00\xff')
            elif rng.random() < 0.5:
                del damaged[at : at + rng.randrange(20)]
            else:
                damaged[at:at] = rng.choice([b"9" * 400, b"null", b"[", b"{}", b"-1", b"1e999"])
        path.write_bytes(damaged)
        try:
            build_graph(load_huggingface(folder))
        except (BadInput, Unsupported) as error:
            assert error.where.startswith(str(folder))
            assert error.message.isprintable()
            refused += 1
        path.write_bytes(data)
    assert refused > 500
