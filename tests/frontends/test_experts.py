"""Experts of quantized checkpoints, of old GGUF files, and in another layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qigen.errors import Unsupported
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends import LanguageModel, build_graph, load_gguf, load_huggingface
from qigen.ir.interpreter import Interpreter
from tests.frontends.packing import Family, awq, gptq, write_mixtral
from tests.frontends.tiny import gguf_weights, tiny, weights, write_tiny_gguf, write_tiny_hf

STEMS = {"w1": "gate", "w3": "up", "w2": "down"}


def logits(model: LanguageModel) -> np.ndarray:
    step = {"input_ids": [1, 5, 9, 33, 12, 7, 80]}
    return Interpreter(build_graph(model), dtype=np.float64).step(step)["logits"]


@pytest.mark.parametrize(
    "family",
    # rows of w2 have 96 weights: one group of 64, and one of the 32 that are left
    [gptq(4, 64), gptq(3, 32), awq(32)],
    ids=["gptq-tail", "gptq-3", "awq"],
)
def test_quantized_mixtral(family: Family, tmp_path: Path) -> None:
    folder, quantized = write_mixtral(tmp_path / "m", family)
    model = load_huggingface(folder)
    for layer in range(2):
        for e in range(4):
            for part, stem in STEMS.items():
                handle = model.tensors[f"blk.{layer}.ffn_{stem}_exps.{e}.weight"]
                found = handle.load()
                assert isinstance(found, QuantizedTensor) and found.format.code_bits < 5
                name = f"model.layers.{layer}.block_sparse_moe.experts.{e}.{part}.weight"
                assert np.array_equal(found.dequantize(), quantized[name])
    assert np.isfinite(logits(model)).all()


def test_reordered_columns_are_refused(tmp_path: Path) -> None:
    folder, _ = write_mixtral(tmp_path / "m", gptq(4, 32, act_order=True))
    model = load_huggingface(folder)
    with pytest.raises(Unsupported, match="reordered columns") as error:
        build_graph(model)
    assert error.value.where == "blk.0.ffn_gate_exps.0.weight"


def test_old_gguf_has_a_tensor_an_expert(tmp_path: Path) -> None:
    """llama.cpp wrote ``blk.0.ffn_gate.3.weight`` before it stacked experts."""
    new = load_gguf(write_tiny_gguf(tmp_path / "new.gguf", "mixtral"))
    apart = {}
    for name, tensor in gguf_weights(tiny("mixtral")).items():
        if "_exps" in name:
            for e, w in enumerate(tensor):
                apart[name.replace("_exps.", f".{e}.")] = w
    path = tmp_path / "old.gguf"
    old = load_gguf(write_tiny_gguf(path, "mixtral", tensors=apart, without="_exps"))
    assert np.array_equal(logits(old), logits(new))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_floats_of_gpt_oss_are_transposed(dtype: str, tmp_path: Path) -> None:
    """Stored as ``[experts, K, N]``, with gate and up in turns; an odd K is padded."""
    spec = {"d_ff": 95}
    model = load_huggingface(write_tiny_hf(tmp_path / "m", "gpt-oss", dtype=dtype, **spec))
    stored = weights(tiny("gpt-oss", **spec))
    experts = "model.layers.1.mlp.experts"
    both, down = stored[f"{experts}.gate_up_proj"][4].T, stored[f"{experts}.down_proj"][4].T
    bias = stored[f"{experts}.gate_up_proj_bias"][4]
    for stem, w in (("gate", both[0::2]), ("up", both[1::2]), ("down", down)):
        found = model.tensors[f"blk.1.ffn_{stem}_exps.4.weight"].load()
        assert isinstance(found, QuantizedTensor) and found.shape == w.shape
        assert np.abs(found.dequantize() - w).max() < 2**-7 * np.abs(w).max()
    found_bias = model.tensors["blk.1.ffn_up_exps.4.bias"].load()
    assert isinstance(found_bias, np.ndarray) and found_bias.shape == (95,)
    assert np.abs(found_bias - bias[1::2]).max() < 2**-7 * np.abs(bias).max()
