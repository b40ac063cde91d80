"""Quantized Hugging Face folders: codes, scales and zeros as the writers of packing.py put them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from qigen.errors import BadInput, QigenError, Unsupported
from qigen.frontends import build_graph, load_huggingface
from qigen.frontends.checkpoints import READERS, RawTensor, read_quantized
from qigen.frontends.huggingface import read_safetensors
from qigen.frontends.model import TensorHandle
from qigen.frontends.settings import Settings
from qigen.ir.interpreter import Interpreter
from qigen.passes.pipeline import optimize
from tests.frontends.packing import (
    Family,
    Tensors,
    aqlm,
    awq,
    bitnet,
    bnb_4bit,
    bnb_int8,
    compressed,
    fp8,
    fp8_blocks,
    gptq,
    hqq,
    mxfp4,
    nvfp4,
    spqr,
    write_model,
    write_packed,
    write_safetensors,
)
from tests.frontends.tiny import tiny, weights, write_tiny_hf

# rows of zeros have scales below 2^-17, where not every bf16 is an f16
INT8_ROWS = {"s8g64", "s8gchannel", "s8g64_bf16"}
INT8_ZEROS = {"z8g64", "z8gchannel", "z8g64_bf16"}

FAMILIES: dict[str, tuple[Family, set[str]]] = {
    "gptq-2": (gptq(2, 32), {"z2g32"}),
    "gptq-3": (gptq(3, 64), {"z3g64"}),
    "gptq-3-sym": (gptq(3, 32, sym=True), {"s3g32"}),
    "gptq-4-tail": (gptq(4, 128), {"z4g128"}),
    "gptq-4-row": (gptq(4, -1, sym=True), {"s4g64", "s4gchannel"}),
    "gptq-8": (gptq(8, 64), {"z8g64"}),
    "gptq-v2": (gptq(4, 32, version=2), {"z4g32"}),
    "gptq-v2-2": (gptq(2, 64, version=2), {"z2g64"}),
    "gptq-act-order": (gptq(4, 32, act_order=True), {"z4g32"}),
    "gptq-act-order-tail": (gptq(3, 128, sym=True, act_order=True), {"s3g128"}),
    "awq-gemm": (awq(64), {"z4g64"}),
    "awq-gemm-tail": (awq(128), {"z4g128"}),
    "awq-gemv": (awq(32, "gemv"), {"z4g32"}),
    "awq-gemv-64": (awq(64, "gemv"), {"z4g64"}),
    "hqq-2": (hqq(2, 32), {"h2g32"}),
    "gptq-48": (gptq(4, 48), {"z4g16"}),
    "hqq-3": (hqq(3, 64, "BF16"), {"h3g64"}),
    "hqq-4": (hqq(4, 64), {"h4g64"}),
    "hqq-8-f32": (hqq(8, 32, "F32"), {"h8g32_f32"}),
    "hqq-4-axis-0": (hqq(4, 32, axis=0), {"f32"}),
    "hqq-3-axis-0": (hqq(3, 64, "BF16", axis=0), {"f32"}),
    "ct-4-group": (compressed(4, "group", 64), {"s4g64"}),
    "ct-4-asym": (compressed(4, "group", 32, sym=False, dtype="F16"), {"z4g32"}),
    "ct-4-act-order": (compressed(4, "group", 32, sym=False, act_order=True), {"z4g32"}),
    "ct-3-channel": (compressed(3, "channel"), {"s3g64", "s3gchannel"}),
    "ct-8-packed": (compressed(8, "channel", dtype="F32"), {"s8g64_f32", "s8gchannel_f32"}),
    "ct-int8": (compressed(8, "channel", packed=False), INT8_ROWS),
    "ct-int8-asym": (compressed(8, "channel", sym=False, packed=False), INT8_ZEROS),
    "ct-int8-tensor": (compressed(8, "tensor", packed=False), {"s8g64", "s8gchannel"}),
    "ct-nvfp4": (nvfp4(), {"nvfp4"}),
    "bnb-int8": (bnb_int8(), {"s8g64_f32", "s8gchannel_f32"}),
    "bitnet": (bitnet("bitlinear"), {"ternary2"}),
    "bitnet-auto": (bitnet("autobitlinear"), {"ternary2"}),
    "bnb-nf4": (bnb_4bit("nf4"), {"nf4g64_f32"}),
    "bnb-nf4-nested": (bnb_4bit("nf4", 32, nested=True), {"nf4g32_f32"}),
    "bnb-fp4": (bnb_4bit("fp4"), {"fp4g64_f32"}),
    "ct-fp8": (fp8("channel"), {"fp8_e4m3g64", "fp8_e4m3g64_bf16", "fp8_e4m3"}),
    "ct-fp8-tensor": (fp8("tensor", "F32"), {"fp8_e4m3g64_f32", "fp8_e4m3_f32"}),
    "fp8-blocks": (fp8_blocks(), {"fp8_e4m3g128_f32"}),
    "mxfp4": (mxfp4(), {"mxfp4"}),
    "aqlm-2x8": (aqlm(2, 8), {"aqlm_2x8"}),
    "aqlm-1x12": (aqlm(1, 12), {"aqlm_1x12"}),
    "spqr": (spqr(), {"h3g16_o2"}),
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


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    """AutoGPTQ wrote quantize_config.json before config.json had a place for it."""
    packed, _, quantized = write_model(tmp_path, gptq(4, 32))
    config = json.loads((packed / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="has the type I32; only floats are read"):
        load_huggingface(packed)
    (packed / "quantize_config.json").write_text(json.dumps(settings))
    values = load_huggingface(packed).tensors["blk.0.attn_q.weight"].load().dequantize()
    assert np.array_equal(values, quantized["model.layers.0.self_attn.q_proj.weight"])


def test_parts_of_a_fused_projection(tmp_path: Path) -> None:
    """phi3 has q, k and v in one tensor: each takes its rows, all share the order of columns."""
    folder = write_tiny_hf(tmp_path / "m", "phi3")
    made = weights(tiny("phi3"))
    family = gptq(4, 32, act_order=True)
    packed: Tensors = {}
    dense = {}
    for name, w in made.items():
        if ".qkv_proj." in name or ".gate_up_proj." in name:
            layer = name.removesuffix(".weight")
            tensors, dense[name] = family.pack(layer, w)
            packed.update({f"{layer}.{part}": tensor for part, tensor in tensors.items()})
        else:
            packed[name] = ("F32", w)
    write_safetensors(folder / "model.safetensors", packed)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = family.config
    (folder / "config.json").write_text(json.dumps(config))
    model = load_huggingface(folder)
    for stems, name in ((("attn_q", "attn_k", "attn_v"), "self_attn.qkv_proj"),
                        (("ffn_gate", "ffn_up"), "mlp.gate_up_proj")):
        handles = [model.tensors[f"blk.1.{stem}.weight"] for stem in stems]
        values = np.concatenate([handle.load().dequantize() for handle in handles])
        values = values[:, np.argsort(handles[0].columns)]
        assert np.array_equal(values, dense[f"model.layers.1.{name}.weight"])
    graph = optimize(build_graph(model))
    assert sum(node.op == "SelectColumns" for node in graph.nodes) == 2 * model.config.n_layers


def test_bytes_count_scales_and_zeros(tmp_path: Path) -> None:
    packed, _, _ = write_model(tmp_path, awq(64))
    found = load_huggingface(packed).source_tensors["model.layers.0.mlp.down_proj.weight"]
    assert found.nbytes == 64 * 192 // 2 + 64 * 3 * (2 + 1)


def raw(tensors: dict[str, np.ndarray]) -> dict[str, RawTensor]:
    kinds = {"int32": "I32", "float16": "F16"}
    return {name: RawTensor(Path("m.safetensors"), name, kinds[a.dtype.name], a.shape,
                            np.ascontiguousarray(a).reshape(-1).view(np.uint8))
            for name, a in tensors.items()}


@pytest.mark.parametrize("group", [128, 32, -1])
def test_marlin(group: int) -> None:
    """Packed code by code as the lanes of a tensor core take them."""
    n, k = 192, 384
    rng = np.random.default_rng(14)
    codes = rng.integers(0, 16, (n, k))
    scales = rng.uniform(0.01, 0.1, (k // group if group > 0 else 1, n)).astype(np.float16)
    words = np.zeros((k // 16, 2 * n), np.uint32)
    for tile in range(k // 16):
        for lane in range(32):
            for column in range(n // 16):
                mine = [codes[16 * column + lane // 4 + more, 16 * tile + 2 * (lane % 4) + r]
                        for more in (0, 8) for r in (0, 1, 8, 9)]
                at = 128 * (column // 4) + 4 * lane + column % 4
                for nibble, which in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    words[tile, at] |= np.uint32(int(mine[which]) << (4 * nibble))
    if group > 0:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    stored = scales.reshape(-1, len(order))[:, order].reshape(scales.shape)
    tensors = raw({"a.B": words.view(np.int32), "a.s": stored,
                   "a.workspace": np.zeros(12, np.int32)})
    config = {"quant_method": "gptq", "checkpoint_format": "marlin", "bits": 4, "sym": True,
              "group_size": group}
    matrices, used = read_quantized(tensors, Settings(config, "config.json"))
    found = matrices["a.weight"]
    assert used == set(tensors) and found.shape == (n, k)
    assert found.format.name == ("s4gchannel" if group < 0 else f"s4g{group}")
    each = np.repeat(scales.T.astype(np.float32), k // len(scales), axis=1)
    expected = (codes - 8).astype(np.float32) * each
    assert np.array_equal(found.load(0, n).dequantize(), expected)
    assert np.array_equal(found.load(19, 70).dequantize(), expected[19:70])
    for change, kind, text in (
        ({"bits": 8}, Unsupported, "not 8 bits"), ({"sym": False}, Unsupported, "with zeros"),
        ({"group_size": 64}, BadInput, "a.s' has the shape"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            read_quantized(tensors, Settings({**config, **change}, "config.json"))
    with pytest.raises(BadInput, match=r"a\.B' has the shape \[24, 300\]"):
        read_quantized({**tensors, **raw({"a.B": np.zeros((24, 300), np.int32)})},
                       Settings(config, "config.json"))


def test_experts_of_mxfp4(tmp_path: Path) -> None:
    """gpt-oss: the matrices of all experts behind one another, each one as it is alone."""
    rng = np.random.default_rng(15)
    weights = [rng.normal(0, 0.1, (24, 96)).astype(np.float32) for _ in range(3)]
    made = [mxfp4().pack("e", w) for w in weights]
    packed: Tensors = {}
    for part in ("blocks", "scales"):
        stacked = np.stack([tensors[f"weight_{part}"][1] for tensors, _ in made])
        packed[f"mlp.experts.gate_up_proj_{part}"] = ("U8", stacked)
    write_safetensors(tmp_path / "m.safetensors", packed)
    tensors = read_safetensors(tmp_path / "m.safetensors")
    matrices, used = read_quantized(tensors, Settings({"quant_method": "mxfp4"}, "config.json"))
    assert used == set(tensors)
    assert list(matrices) == [f"mlp.experts.gate_up_proj.{i}" for i in range(3)]
    for matrix, (_, values) in zip(matrices.values(), made, strict=True):
        assert np.array_equal(matrix.load(0, 24).dequantize(), values)
        assert np.array_equal(matrix.load(5, 9).dequantize(), values[5:9])
        assert matrix.format.name == "mxfp4"


def test_every_reader_is_tested() -> None:
    tested = {family.config["quant_method"] for family, _ in FAMILIES.values()}
    assert tested == {reader.quant_method for reader in READERS}


# -- files that another tool wrote -----------------------------------------------------------------

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
WHOLE = "QIGEN_TEST_CHECKPOINTS"
"""Names a folder of whole checkpoints (4 bits, groups of 64) whose every layer is compared too."""


def unpacked(method: str, part: Callable[[str], np.ndarray]) -> np.ndarray:
    """float32 [N, K] of a layer of 4 bits, number by number from the texts of the packings."""
    words, zero_words = part("qweight").view(np.uint32), part("qzeros").view(np.uint32)
    scales = part("scales").astype(np.float32)
    if method == "gptq":
        k, n = 8 * words.shape[0], words.shape[1]
        codes = np.stack([words[i // 8] >> (4 * (i % 8)) & 15 for i in range(k)])
        zeros = np.stack([zero_words[:, j // 8] >> (4 * (j % 8)) & 15 for j in range(n)], axis=1)
        zeros, index = zeros + 1, part("g_idx")
    else:
        k, n = words.shape[0], 8 * words.shape[1]
        nibble = [(0, 2, 4, 6, 1, 3, 5, 7).index(j % 8) for j in range(n)]
        codes = np.stack([words[:, j // 8] >> (4 * nibble[j]) & 15 for j in range(n)], axis=1)
        zeros = np.stack([zero_words[:, j // 8] >> (4 * nibble[j]) & 15 for j in range(n)], axis=1)
        index = np.arange(k) // 64
    centred = codes.astype(np.int64) - zeros.astype(np.int64)[index]
    return (scales[index] * centred.astype(np.float32)).T


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_projections_of_another_packer(method: str) -> None:
    path = DATA / f"{method}_w4g64.safetensors"
    settings = Settings(json.loads(path.with_suffix(".json").read_text()), str(path))
    matrices, used = read_quantized(read_safetensors(path), settings)
    with safe_open(path, framework="numpy") as file:
        assert used == set(file.keys())
        for name, matrix in matrices.items():
            layer = name.removesuffix("weight")
            expected = unpacked(method, lambda part, at=layer: file.get_tensor(at + part))
            assert matrix.shape == expected.shape == (192, 576)
            assert matrix.format.name == {"gptq": "s4g64", "awq": "z4g64"}[method]
            assert np.array_equal(matrix.load(0, 192).dequantize(), expected)
            assert np.array_equal(matrix.load(37, 70).dequantize(), expected[37:70])
    assert len(matrices) == 2


@pytest.mark.skipif(WHOLE not in os.environ, reason=f"{WHOLE} names no folder of checkpoints")
def test_whole_checkpoints_of_another_packer() -> None:
    found = 0
    for folder in sorted(Path(os.environ[WHOLE]).iterdir()):
        model = load_huggingface(folder)
        method = json.loads((folder / "config.json").read_text())["quantization_config"]
        with safe_open(folder / "model.safetensors", framework="numpy") as file:
            for handle in model.tensors.values():
                layer = handle.source.tensor.removesuffix("weight")
                if f"{layer}qweight" in file.keys():  # noqa: SIM118 (it is no dictionary)
                    expected = unpacked(method["quant_method"],
                                        lambda part, at=layer: file.get_tensor(at + part))
                    assert np.array_equal(handle.load().dequantize(), expected), handle.name
                    found += 1
    assert found


# -- bad input -------------------------------------------------------------------------------------

LAYER = "model.layers.1.self_attn.k_proj"
Damage = Callable[[dict[str, RawTensor], dict[str, Any]], None]


def put(part: str, change: Callable[[np.ndarray], np.ndarray], dtype: str = "") -> Damage:
    """Change the numbers of a tensor of LAYER."""

    def damage(tensors: dict[str, RawTensor], config: dict[str, Any]) -> None:
        old = tensors[f"{LAYER}.{part}"]
        array = np.ascontiguousarray(change(old.array().copy()))
        tensors[old.name] = RawTensor(old.file, old.name, dtype or old.dtype, array.shape,
                                      array.reshape(-1).view(np.uint8))

    return damage


def drop(part: str) -> Damage:
    return lambda tensors, config: tensors.__delitem__(f"{LAYER}.{part}")


def both(first: Damage, second: Damage) -> Damage:
    def damage(tensors: dict[str, RawTensor], config: dict[str, Any]) -> None:
        first(tensors, config)
        second(tensors, config)

    return damage


def setting(**values: Any) -> Damage:
    return lambda tensors, config: config.update(values)


def scheme(**values: Any) -> Damage:
    return lambda tensors, config: config["config_groups"]["group_0"]["weights"].update(values)


def at(place: Any, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[place] = value
        return array

    return change


G4, G4_ORDER, G4_SYM = gptq(4, 32), gptq(4, 32, act_order=True), gptq(4, 32, sym=True)
CT4, CT8 = compressed(4, "group", 32, sym=False), compressed(8, "channel", packed=False)
BAD: dict[str, tuple[Family, Damage, type[QigenError], str]] = {
    # GPTQ: bits, groups and shapes that contradict each other
    "other bits": (G4, setting(bits=8), BadInput, "down_proj.scales' has the shape"),
    "odd bits": (G4, setting(bits=5), Unsupported, "GPTQ with 5 bits"),
    "no bits": (G4, setting(bits=None), BadInput, "'bits' is missing"),
    "other group": (G4, setting(group_size=64), BadInput, "down_proj.scales' has the shape [6, 64],"
                    " expected [3, 64]"),
    "no group": (G4, setting(group_size=0), BadInput, "groups of 0 weights"),
    "no row": (gptq(4, 40), setting(), Unsupported, "'model.layers.0.mlp.down_proj.qweight' "
               "(gptq) has 4 bits in groups of 40"),
    "shape of zeros": (G4, put("qzeros", lambda x: x[:, 1:]), BadInput, "k_proj.qzeros' has the "
                       "shape [2, 3], expected [2, 4]"),
    "shape of codes": (G4, put("qweight", lambda x: x[1:]), BadInput, "k_proj."),
    "type": (G4, put("qweight", lambda x: x, "F32"), BadInput, "k_proj.qweight' has the type F32"),
    "no scales": (G4, drop("scales"), BadInput, "k_proj.scales' is missing"),
    "no zeros": (G4, drop("qzeros"), BadInput, "k_proj.qzeros' is missing"),
    "NaN": (G4, put("scales", at(5, np.nan)), BadInput, "k_proj.scales' holds a NaN or an infin"),
    "infinity": (G4, put("scales", at(5, np.inf)), BadInput, "an infinity at [0, 5]"),
    # zeros of the other version
    "v2 as v1, sym": (gptq(4, 32, sym=True, version=2), setting(checkpoint_format="gptq"),
                      BadInput, "stores 8 for every zero, but a symmetric model of 4 bits has zeros"
                      " of 8: this looks like a file of checkpoint_format 'gptq_v2'"),
    "v1 as v2, sym": (G4_SYM, setting(checkpoint_format="gptq_v2"), BadInput,
                      "stores 7 for every zero"),
    "v2 as v1": (gptq(4, 32, version=2), both(setting(checkpoint_format="gptq"),
                                              put("qzeros", at(0, -1))), BadInput,
                 "k_proj.qzeros' stores 15 at [0, 0], which in version 1 means a zero of 16, more "
                 "than 4 bits hold: this looks like a file of checkpoint_format 'gptq_v2'"),
    "layout": (G4, setting(checkpoint_format="exl2"), Unsupported, "layout 'exl2'"),
    "marlin as gptq": (G4_SYM, setting(checkpoint_format="marlin"), BadInput, "but no tensor is"),
    "dynamic": (G4, setting(dynamic={"x": {}}), Unsupported, "'dynamic'"),
    # act-order
    "no g_idx": (G4_ORDER, drop("g_idx"), BadInput, "k_proj.g_idx' is missing, though 'desc_act'"),
    "g_idx too large": (G4_ORDER, put("g_idx", at(7, 2)), BadInput,
                        "k_proj.g_idx' puts column 7 in group 2, but there are 2 groups of 32"),
    "g_idx negative": (G4_ORDER, put("g_idx", at(7, -1)), BadInput, "puts column 7 in group -1"),
    "g_idx uneven": (G4_ORDER, put("g_idx", lambda x: np.where(np.arange(64) < 40, 0, 1).astype(
                     np.int32)), BadInput, "k_proj.g_idx' gives group 0 40 columns"),
    "g_idx short": (G4_ORDER, put("g_idx", lambda x: x[1:]), BadInput, "[63], expected [64]"),
    # AWQ
    "awq version": (awq(32), setting(version="marlin"), Unsupported, "packing 'marlin'"),
    "awq bits": (awq(32), setting(bits=3), Unsupported, "AWQ with 3 bits"),
    "awq group": (awq(32), setting(group_size=64), BadInput, "down_proj.scales' has the shape"),
    "awq as gemv": (awq(32), setting(version="gemv"), BadInput, "down_proj.scales"),
    "awq scale": (awq(32), put("scales", at(0, -np.inf)), BadInput, "k_proj.scales' holds"),
    # HQQ
    "hqq axis": (hqq(4, 32), put("axis", at(0, 2)), BadInput, "k_proj.axis' holds 2, expected 0"),
    "hqq axis 0": (hqq(4, 32, axis=0), put("scale", lambda x: x.T), BadInput,
                   "k_proj.scale' has the shape"),
    "hqq bits": (hqq(4, 32), put("nbits", at(0, 3)), BadInput, "3 bits in the packing '4bit_u8'"),
    "hqq group": (hqq(4, 32), put("group_size", at(0, 48)), BadInput, "groups of 48, which do not"),
    "hqq zero": (hqq(4, 32), put("zero", at(3, np.nan)), BadInput, "k_proj.zero' holds a NaN"),
    "hqq shape": (hqq(4, 32), drop("shape"), BadInput, "k_proj.shape' is missing"),
    # compressed-tensors
    "ct bits": (CT4, scheme(num_bits=8), BadInput, "down_proj.weight_packed' has the shape"),
    "ct group": (CT4, scheme(group_size=64), BadInput, "down_proj.weight_scale' has the shape"),
    "ct shape": (CT4, put("weight_shape", at(1, 72)), BadInput, "k_proj.weight_packed' has the"),
    "ct zeros": (CT4, drop("weight_zero_point"), BadInput, "k_proj.weight_zero_point' is missing"),
    "ct symmetric": (CT4, scheme(symmetric=True), BadInput, "though the scheme says that the "
                     "weights are symmetric"),
    "ct order": (CT4, scheme(actorder="group"), BadInput, "down_proj.weight_g_idx' is missing"),
    "ct scale": (CT4, put("weight_scale", at(0, 0x7FC0)), BadInput, "k_proj.weight_scale' holds a"),
    "ct targets": (CT4, lambda tensors, config: config["config_groups"]["group_0"].update(
                       targets=["re:.*q_proj"]), BadInput, "no group of layers names it"),
    "ct pattern": (CT4, lambda tensors, config: config["config_groups"]["group_0"].update(
                       targets=["re:("]), BadInput, "is no pattern"),
    "ct sparse": (CT4, setting(sparsity_config={"format": "sparse-bitmask"}), Unsupported,
                  "sparse weights"),
    "ct type": (CT4, scheme(type="float"), Unsupported, "has codes of the type float"),
    "ct channel": (CT8, put("weight_scale", lambda x: x[1:]), BadInput,
                   "k_proj.weight_scale' has the shape [31, 1], expected [32, 1]"),
    "nvfp4 scale": (nvfp4(), put("weight_scale", at(9, 0x7F)), BadInput, "holds a NaN in row 2"),
    "nvfp4 global": (nvfp4(), put("weight_global_scale", at(0, 0)), BadInput, "other than zero"),
    # the others
    "nf4 state": (bnb_4bit("nf4"), put("weight.quant_state.bitsandbytes__nf4", at(0, 0)), BadInput,
                  "holds no JSON object"),
    "nf4 table": (bnb_4bit("nf4"), put("weight.quant_map", at(3, 0.5)), Unsupported,
                  "has a table that is not that of nf4"),
    "nf4 scales": (bnb_4bit("nf4"), put("weight.absmax", lambda x: x[1:]), BadInput,
                   "k_proj.weight.absmax' has the shape [31], expected [32]"),
    "nf4 nested": (bnb_4bit("nf4", 32, nested=True), drop("weight.nested_absmax"), BadInput,
                   "k_proj.weight.nested_absmax' is missing"),
    "nf4 blocks": (bnb_4bit("nf4", 1024), setting(), Unsupported,
                   "(bitsandbytes) has nf4 codes in groups of 1024"),
    "fp8 shape": (fp8_blocks(), put("weight_scale_inv", lambda x: x[:, :0]), BadInput,
                  "k_proj.weight_scale_inv' has the shape [1, 0], expected [1, 1]"),
    "fp8 blocks": (fp8_blocks(), setting(weight_block_size=[128]), BadInput, "two numbers above"),
    "bnb scale": (bnb_int8(), put("SCB", at(1, np.inf)), BadInput, "k_proj.SCB' holds"),
    "bnb rows": (bnb_int8(), put("SCB", lambda x: x[1:]), BadInput, "[31], expected [32]"),
    "bitnet code": (bitnet("bitlinear"), put("weight", at(64, 0x0C)), BadInput, "has a 3 in row 1"),
    "bitnet scale": (bitnet("bitlinear"), put("weight_scale", at(0, 0)), BadInput, "is zero, and"),
    "bitnet online": (bitnet("bitlinear"), setting(quantization_mode="online"), Unsupported,
                      "quantized 'online'"),
    "mxfp4 scales": (mxfp4(), drop("weight_scales"), BadInput, "k_proj.weight_scales' is missing"),
    "mxfp4 shape": (mxfp4(), put("weight_blocks", lambda x: x[:, 1:]), BadInput,
                    "k_proj.weight_scales' has the shape [32, 2], expected [32, 1]"),
    "mxfp4 experts": (mxfp4(), put("weight_blocks", lambda x: x[None]), BadInput,
                      "k_proj.weight_scales' has the shape"),
    "aqlm code": (aqlm(1, 12), put("codes", at(5, 1 << 12)), BadInput,
                  "k_proj.codes' names entry 4096 at [0, 5, 0], but books of 12 bits have 4096"),
    "aqlm books": (aqlm(2, 8), setting(num_codebooks=1), BadInput, "codes' has the shape"),
    "aqlm rows": (aqlm(2, 8), setting(out_group_size=2), Unsupported, "for 2 x 8 weights"),
    "aqlm scale": (aqlm(2, 8), put("scales", at(0, np.nan)), BadInput, "k_proj.scales' holds"),
    "spqr bits": (spqr(), setting(bits=4), Unsupported, "SpQR with 4 bits in tiles of 16 x 16"),
    "spqr rows": (spqr(), put("row_offsets", lambda x: x[::16]), Unsupported,
                  "k_proj.dense_weights' (spqr) has 128 words for 2 rows"),
    "spqr offsets": (spqr(), put("row_offsets", at(3, 9999)), BadInput,
                     "k_proj.row_offsets' does not ascend from 0"),
    "spqr range": (spqr(), put("col_vals", at(1, 64)), BadInput, "in column 64, but there are 64"),
    "spqr order": (spqr(), put("col_vals", lambda x: x[::-1]), BadInput, "do not ascend"),
    "spqr outlier": (spqr(), put("col_vals", at(0, 0x7C00 << 16)), BadInput,
                     "k_proj.col_vals' holds a NaN or an infinity at 0"),
    "spqr tile": (spqr(), put("dense_weights", lambda x: x ^ at(5, 1 << 54)(np.zeros_like(x))),
                  BadInput, "k_proj.dense_weights' has two copies"),
    "spqr scale": (spqr(), put("dense_weights", lambda x: x | (np.int64(0x7C) << 54)), BadInput,
                   "k_proj.dense_weights' holds a NaN"),
    "spqr parts": (spqr(), drop("col_vals"), BadInput, "k_proj.col_vals' is missing"),
    "unknown": (G4, setting(quant_method="quip"), Unsupported, "by 'quip'; known are gptq, awq"),
    "nothing": (G4, lambda tensors, config: tensors.clear(), BadInput, "but no tensor is"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tmp_path: Path) -> None:
    family, damage, kind, text = BAD[name]
    packed = write_packed(tmp_path, family)
    tensors = {n: t for n, t in read_safetensors(packed).items() if "_proj." in n}
    config = copy.deepcopy(family.config)
    damage(tensors, config)
    with pytest.raises(QigenError) as caught:
        read_quantized(tensors, Settings(config, str(packed)))
    assert isinstance(caught.value, kind) and text in str(caught.value), caught.value
    assert str(packed) in str(caught.value)


def test_an_infinite_power_of_two_is_found_when_it_is_loaded(tmp_path: Path) -> None:
    packed = write_packed(tmp_path, mxfp4())
    tensors = read_safetensors(packed)
    put("weight_scales", at(3, 0xFF))(tensors, {})
    matrices, _ = read_quantized(tensors, Settings({"quant_method": "mxfp4"}, str(packed)))
    handle = TensorHandle("k", matrices[f"{LAYER}.weight"], (0, 32))
    with pytest.raises(BadInput, match=r"k_proj\.weight: row 1 has a NaN"):
        handle.load()
