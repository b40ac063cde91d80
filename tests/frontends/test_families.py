"""Every family of the table: both containers give one model, and llama.cpp agrees."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qigen.errors import UsageError
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends import LanguageModel, build_graph, load_gguf, load_huggingface
from qigen.frontends.families import FAMILIES
from qigen.frontends.model import SourceTensor
from qigen.ir.interpreter import Interpreter
from qigen.ir.verify import verify
from tests.frontends.tiny import (
    LLAMA3_SCALING,
    REFERENCE,
    REFERENCE_CASES,
    REFERENCE_TOKENS,
    TINY,
    gguf_weights,
    tiny,
    write_tiny_gguf,
    write_tiny_hf,
)

# llama.cpp's GELU reads a table of half-precision results; everything else is float32.
LLAMA_CPP_TOLERANCE = {"gemma2": 3e-3, "gemma3": 3e-3}
LOGITS = json.loads(REFERENCE.read_text())["logits"]


def logits(model: LanguageModel, max_seq: int | None = None) -> np.ndarray:
    """float64 logits of the last of the reference tokens."""
    interpreter = Interpreter(build_graph(model, max_seq), dtype=np.float64)
    return interpreter.step({"input_ids": REFERENCE_TOKENS})["logits"][0]


@pytest.mark.parametrize("key", LOGITS)
def test_logits_are_those_of_llama_cpp(key: str, tmp_path: Path) -> None:
    name, n_ctx = key.rsplit("-", 1)
    case = REFERENCE_CASES[name]
    model = load_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", **case))
    found = logits(model, min(int(n_ctx), model.config.max_position))
    tolerance = LLAMA_CPP_TOLERANCE.get(case["family"], 5e-5)
    assert np.abs(found - np.array(LOGITS[key])).max() < tolerance


CASES: dict[str, dict[str, Any]] = {
    **{name: {"family": name} for name in TINY},
    "llama-llama3": {"family": "llama", "rope_scaling": LLAMA3_SCALING},
    "llama-linear": {"family": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-tied-bias": {"family": "llama", "bias": True, "tied": True},
    "llama-tails": {"family": "llama", "d_ff": 172},
    "phi3-window": {"family": "phi3", "window": 7},
    "phi3-tied": {"family": "phi3", "tied": True},
    "mixtral-many": {"family": "mixtral", "experts": 9, "used": 4, "d_ff": 44},
    "qwen3moe-share": {"family": "qwen3moe", "normalize": False},
}


@pytest.mark.parametrize("name", CASES)
def test_gguf_and_huggingface_give_one_model(name: str, tmp_path: Path) -> None:
    case = dict(CASES[name])
    scaling = case.get("rope_scaling", {})
    if scaling.get("type") == "linear":
        case["rope_scaling"] = {**scaling, "rope_type": "linear"}
    a = load_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", **case))
    b = load_huggingface(write_tiny_hf(tmp_path / "tiny", **case))
    verify(build_graph(a))
    verify(build_graph(b))
    assert set(a.tensors) == set(b.tensors)
    for tensor, handle in a.tensors.items():
        assert handle.shape == b.tensors[tensor].shape
    for max_seq in (32, a.config.max_position):
        # The factors are float32 in a GGUF, so longrope differs by their rounding.
        assert np.abs(logits(a, max_seq) - logits(b, max_seq)).max() < 1e-5
    assert a.config.window == b.config.window
    assert a.config.eos_ids == b.config.eos_ids == (2,)
    assert a.config.bos_id == b.config.bos_id == 1


def test_the_window_the_scaling_and_the_softcaps_matter(tmp_path: Path) -> None:
    """The tiny models are no evidence for what does not change their logits."""

    def run(family: str, **config: Any) -> np.ndarray:
        return logits(load_huggingface(write_tiny_hf(tmp_path / "m", family, config=config)))

    for family, changes in {
        "mistral": [{"sliding_window": 4}],
        "gemma2": [
            {"sliding_window": 5},
            {"attn_logit_softcapping": 5.0},
            {"final_logit_softcapping": 5.0},
            {"query_pre_attn_scalar": 20},
        ],
        "gemma3": [
            {"sliding_window": 5},
            {"sliding_window_pattern": 5},
            {"rope_local_base_freq": 1e5},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ],
        "phi3": [{"max_position_embeddings": 2048}],
    }.items():
        base = run(family)
        for change in changes:
            assert np.abs(run(family, **change) - base).max() > 0.01, (family, change)


def test_every_family_of_the_table_has_a_tiny_model() -> None:
    assert {family.name for family in FAMILIES} == set(TINY)
    for attribute in ("gguf", "model_types", "classes"):
        names = [
            (name, attribute == "gguf" and family.mixture is not None)
            for family in FAMILIES
            for name in getattr(family, attribute)
        ]
        assert len(names) == len(set(names))


def test_gemma3_configuration(tmp_path: Path) -> None:
    config = load_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", "gemma3")).config
    assert config.head_dim == 24
    assert config.n_heads * config.head_dim != config.d_model
    assert config.sliding_layers == (True,) * 5 + (False,) + (True,)
    assert config.rope_of(0).base == 1e4
    assert config.rope_of(0).position_scale == 1.0
    assert config.rope_of(5).base == 1e6
    assert config.rope_of(5).position_scale == 1 / 8
    assert config.embedding_scale == 8.0
    assert config.qk_norm
    assert config.post_norms
    assert config.attn_scale == pytest.approx(24**-0.5)
    json.dumps(config.to_json())


def test_the_27b_gemmas_scale_queries_by_their_width(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", "gemma3", n_layers=62)
    assert load_gguf(path).config.attn_scale == pytest.approx((64 / 4) ** -0.5)


def test_longrope_depends_on_the_compiled_length(tmp_path: Path) -> None:
    model = load_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", "phi3"))
    rope = model.config.rope
    assert rope.rotary_dim == 12
    assert rope.attn_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(256)))
    short, long = build_graph(model, 256), build_graph(model, 257)
    assert short.constants["rope_factors"][2] == np.float32(1.1)
    assert long.constants["rope_factors"][2] == np.float32(2.0)


def test_a_window_that_holds_every_position_is_none(tmp_path: Path) -> None:
    model = load_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", "mistral"))

    def windows(max_seq: int) -> set[int]:
        nodes = build_graph(model, max_seq).nodes
        return {node.attrs["window"] for node in nodes if node.op == "Attention"}

    assert windows(5) == {0}
    assert windows(6) == {5}


@pytest.mark.parametrize("max_seq", [0, 65])
def test_lengths_the_model_was_not_made_for(max_seq: int, tmp_path: Path) -> None:
    model = load_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", "llama"))
    with pytest.raises(UsageError, match="positions are outside"):
        build_graph(model, max_seq)


def test_graph_is_lazy_tagged_and_complete(tmp_path: Path) -> None:
    model = load_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", "qwen3", "q4_0"))
    graph = build_graph(model)
    assert graph.inputs == ["input_ids", "positions", "rows"]
    assert graph.outputs == ["logits"]
    assert graph.values["logits"].shape == ("R", 96)
    assert graph.meta["config"] is model.config
    assert set(graph.constants) == set(model.tensors)
    matrices = [c for c in graph.constants.values() if len(c.shape) == 2]
    assert all(c in model.tensors.values() for c in matrices)
    assert {node.layer for node in graph.nodes} == {None, 0, 1, 2}
    for node in graph.nodes:
        assert (node.layer is not None) == node.name.startswith("blk.")


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_fused_tensors_are_split_by_rows_without_loss(quant: str, tmp_path: Path) -> None:
    model = load_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", "phi3", quant))
    whole = model.source_tensors["blk.1.attn_qkv.weight"]
    rows = {name: model.tensors[f"blk.1.{name}.weight"] for name in ("attn_q", "attn_k", "attn_v")}
    assert [h.source.rows for h in rows.values()] == [(0, 64), (64, 96), (96, 128)]
    assert {h.source.tensor for h in rows.values()} == {"blk.1.attn_qkv.weight"}
    assert not any(h.source.whole for h in rows.values())
    joined = np.concatenate([h.raw() for h in rows.values()])
    assert joined.tobytes() == whole.data.tobytes()
    loaded = [h.load() for h in rows.values()]
    assert all(isinstance(x, QuantizedTensor) for x in loaded)
    gate, up = (model.tensors[f"blk.1.{name}.weight"] for name in ("ffn_gate", "ffn_up"))
    assert (gate.source.rows, up.source.rows) == ((0, 96), (96, 192))
    if quant == "f32":
        expected = gguf_weights(tiny("phi3"))["blk.1.ffn_up.weight"]
        assert (gate.load().dequantize() == expected[:96]).all()
        assert (up.load().dequantize() == expected[96:]).all()


def test_bf16_vectors_and_odd_rows(tmp_path: Path) -> None:
    """bf16 is stored in pairs; rows of an odd length are padded when they are loaded."""
    folder = write_tiny_hf(tmp_path / "m", "llama", dtype="BF16", d_ff=95)
    model = load_huggingface(folder)
    down = model.tensors["blk.0.ffn_down.weight"]
    values = down.load().dequantize()
    assert values.shape == (64, 95)
    bits = down.origin.data.view("<u2").reshape(64, 95).astype("<u4") << 16
    assert (values == bits.view("<f4")).all()
    assert np.isfinite(logits(model)).all()
    assert isinstance(down.origin, SourceTensor)
