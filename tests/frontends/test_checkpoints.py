"""Quantized Hugging Face folders: codes, scales and zeros as the writers of packing.py put them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qigen.frontends import build_graph, load_huggingface
from qigen.frontends.checkpoints import READERS
from qigen.ir.interpreter import Interpreter
from qigen.passes.pipeline import optimize
from tests.frontends.packing import (
    Family,
    awq,
    bitnet,
    bnb_int8,
    compressed,
    gptq,
    hqq,
    mxfp4,
    nvfp4,
    write_model,
)

# rows of zeros have scales below 2^-17, where not every bf16 is an f16
INT8_ROWS = {"s8g64", "s8g128", "s8g128_f32"}
INT8_ZEROS = {"z8g64", "z8g128", "z8g128_f32"}

FAMILIES: dict[str, tuple[Family, set[str]]] = {
    "gptq-2": (gptq(2, 32), {"z2g32"}),
    "gptq-3": (gptq(3, 64), {"z3g64"}),
    "gptq-3-sym": (gptq(3, 32, sym=True), {"s3g32"}),
    "gptq-4-tail": (gptq(4, 128), {"z4g128"}),
    "gptq-4-row": (gptq(4, -1, sym=True), {"s4g64", "s4g128"}),
    "gptq-8": (gptq(8, 64), {"z8g64"}),
    "gptq-v2": (gptq(4, 32, version=2), {"z4g32"}),
    "gptq-v2-2": (gptq(2, 64, version=2), {"z2g64"}),
    "gptq-act-order": (gptq(4, 32, act_order=True), {"z4g32"}),
    "gptq-act-order-tail": (gptq(3, 128, sym=True, act_order=True), {"s3g128"}),
    "awq-gemm": (awq(64), {"z4g64"}),
    "awq-gemm-tail": (awq(128), {"z4g128"}),
    "awq-gemv": (awq(32, "gemv"), {"z4g32"}),
    "awq-gemv-64": (awq(64, "gemv"), {"z4g64"}),
    "hqq-2": (hqq(2, 32), {"zf2g32"}),
    "hqq-3": (hqq(3, 64, "BF16"), {"zf3g64"}),
    "hqq-4": (hqq(4, 64), {"zf4g64"}),
    "hqq-8-f32": (hqq(8, 32, "F32"), {"zf8g32_f32"}),
    "ct-4-group": (compressed(4, "group", 64), {"s4g64"}),
    "ct-4-asym": (compressed(4, "group", 32, sym=False, dtype="F16"), {"z4g32"}),
    "ct-4-act-order": (compressed(4, "group", 32, sym=False, act_order=True), {"z4g32"}),
    "ct-3-channel": (compressed(3, "channel"), {"s3g64", "s3g128"}),
    "ct-8-packed": (compressed(8, "channel", dtype="F32"), {"s8g128_f32"}),
    "ct-int8": (compressed(8, "channel", packed=False), INT8_ROWS),
    "ct-int8-asym": (compressed(8, "channel", sym=False, packed=False), INT8_ZEROS),
    "ct-int8-tensor": (compressed(8, "tensor", packed=False), {"s8g64", "s8g128"}),
    "ct-nvfp4": (nvfp4(), {"e2m1g16_f32"}),
    "bnb-int8": (bnb_int8(), {"s8g128_f32"}),
    "bitnet": (bitnet("bitlinear"), {"s2g128_f32"}),
    "bitnet-auto": (bitnet("autobitlinear"), {"s2g64", "s2g128"}),
    "mxfp4": (mxfp4(), {"mxfp4"}),
}

STEMS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}  # fmt: skip
TOKENS = [1, 403, 407, 261, 378, 286, 261, 420, 270, 9]


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_those_of_the_writer(name: str, tmp_path: Path) -> None:
    family, rows = FAMILIES[name]
    packed, dense, quantized = write_model(tmp_path, family)
    model = load_huggingface(packed)
    found = set()
    for layer in range(model.config.n_layers):
        for stem, theirs in STEMS.items():
            handle = model.tensors[f"blk.{layer}.{stem}.weight"]
            found.add(handle.format.name)
            values = handle.load().dequantize()
            if handle.columns is not None:
                values = values[:, np.argsort(handle.columns)]
            expected = quantized[f"model.layers.{layer}.{theirs}.weight"]
            assert np.array_equal(values, expected), handle.name
    assert found == rows
    # and so the graph computes what it computes with the dequantized weights
    step = {"input_ids": TOKENS}
    expected = Interpreter(build_graph(load_huggingface(dense)), dtype="f8").step(step)["logits"]
    graph = build_graph(model)
    for found_graph in (graph, optimize(graph)):
        logits = Interpreter(found_graph, dtype="f8").step(step)["logits"]
        assert np.abs(logits - expected).max() < 1e-9


def test_columns_are_put_in_order_once_for_all_that_share_them(tmp_path: Path) -> None:
    packed, _, _ = write_model(tmp_path, gptq(4, 32, act_order=True))
    graph = optimize(build_graph(load_huggingface(packed)))
    made = [n for n in graph.nodes if n.op == "SelectColumns" and n.layer == 1]
    assert [n.name for n in made] == [
        "blk.1.attn_q.ordered.early", "blk.1.attn_output.ordered", "blk.1.ffn_gate.ordered.early",
        "blk.1.ffn_down.ordered",
    ]  # fmt: skip
    norms = [n.attrs["prologue"] for n in graph.nodes if n.op == "MatMulGroup" and n.layer == 1]
    assert norms == ["rmsnorm", "none", "rmsnorm", "none"]


def test_every_reader_is_tested() -> None:
    tested = {family.config["quant_method"] for family, _ in FAMILIES.values()}
    assert tested == {reader.quant_method for reader in READERS}
