"""Writers of quantized checkpoints, each plainly from the specification of its packing.

A writer takes a float matrix ``[N, K]`` and returns the tensors of its layer, and the float32
matrix that they stand for. They share nothing with the readers, whose values are compared with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tests.frontends.tiny import Tensors, tiny, weights, write_safetensors, write_tiny_hf

STORIES = Path(__file__).parents[1] / "data" / "stories260k" / "hf"



def bf16(values: np.ndarray) -> np.ndarray:
    """uint16: the bits of float32 ``values`` cut to bfloat16."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Groups:
    """``w[n, k] ~ scales[n, g] * (codes[n, k] - zeros[n, g])`` with ``g = index[k]``."""

    codes: np.ndarray  # uint8 [N, K]
    scales: np.ndarray  # float32 [N, G], each a number of the stored type
    zeros: np.ndarray  # int [N, G]
    index: np.ndarray  # [K]

    def dequantized(self) -> np.ndarray:
        centred = self.codes.astype(np.int64) - self.zeros[:, self.index]
        return self.scales[:, self.index] * centred.astype(np.float32)


def grouped(
    w: np.ndarray,
    bits: int,
    group: int,
    *,
    sym: bool,
    least_zero: int = 0,
    order: np.ndarray | None = None,
    to_stored: Callable[[np.ndarray], np.ndarray] = lambda x: x.astype(np.float16),
) -> Groups:
    """Round to nearest; ``order`` is the order of the columns from which groups are cut."""
    n, k = w.shape
    order = np.arange(k) if order is None else order
    index = np.empty(k, np.int64)
    index[order] = np.arange(k) // group
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    scales = np.empty((n, -(-k // group)), np.float32)
    zeros = np.empty(scales.shape, np.int64)
    codes = np.empty((n, k), np.uint8)
    for g in range(scales.shape[1]):
        part = w[:, index == g].astype(np.float64)
        low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
        width = 2 * np.maximum(-low, high) if sym else high - low
        scale = to_stored(np.maximum(width, 1e-3) / top).astype(np.float32)
        zero = np.full(n, middle) if sym else np.clip(np.rint(-low / scale), least_zero, top)
        scales[:, g], zeros[:, g] = scale, zero
        rounded = np.rint(part / scale[:, None]) + zero[:, None]
        codes[:, index == g] = np.clip(rounded, 0, top)
    return Groups(codes, scales, zeros, index)


def bit_string(numbers: np.ndarray, bits: int) -> np.ndarray:
    """int32 [W, ...]: numbers [count, ...] as one string of bits along the first axis."""
    words = np.zeros((numbers.shape[0] * bits // 32, *numbers.shape[1:]), np.uint32)
    for i, number in enumerate(numbers):
        for bit in range(bits):
            place = i * bits + bit
            words[place // 32] |= ((number.astype(np.uint32) >> bit) & 1) << np.uint32(place % 32)
    return words.view(np.int32)


@dataclass(frozen=True)
class Family:
    """A way to write a checkpoint: its ``quantization_config``, and how it packs a layer."""

    config: dict[str, Any]
    pack: Callable[[str, np.ndarray], tuple[Tensors, np.ndarray]]


# -- GPTQ ------------------------------------------------------------------------------------------


def gptq(
    bits: int, group: int, *, version: int = 1, sym: bool = False, act_order: bool = False
) -> Family:
    """AutoGPTQ's QuantLinear; with ``act_order`` all layers of the same input share g_idx."""

    def pack(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        k = w.shape[1]
        kind = name.rsplit(".", 1)[-1]
        seed = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "gate_proj": 2, "up_proj": 2}.get(kind, 3)
        order = np.random.default_rng(seed).permutation(k) if act_order else None
        g = grouped(w, bits, k if group == -1 else group, sym=sym, order=order,
                    least_zero=1 if version == 1 else 0)
        stored = g.zeros - (1 if version == 1 else 0)
        return {
            "qweight": ("I32", bit_string(g.codes.T, bits)),
            "qzeros": ("I32", bit_string(stored, bits).T),
            "scales": ("F16", g.scales.T.astype(np.float16)),
            "g_idx": ("I32", g.index.astype(np.int32)),
        }, g.dequantized()

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym,
              "desc_act": act_order}
    if version == 2:
        config["checkpoint_format"] = "gptq_v2"
    return Family(config, pack)


# -- AWQ -------------------------------------------------------------------------------------------


def awq(group: int, version: str = "gemm") -> Family:
    """AutoAWQ's WQLinear_GEMM and WQLinear_GEMV: 4 bits."""

    def gemm(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        g = grouped(w, 4, group, sym=False)

        def words(numbers: np.ndarray) -> np.ndarray:  # [rows, N] -> [rows, N / 8]
            out = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
            for column in range(out.shape[1]):
                for i, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    nibble = numbers[:, 8 * column + place].astype(np.uint32)
                    out[:, column] |= nibble << np.uint32(4 * i)
            return out.view(np.int32)

        return {
            "qweight": ("I32", words(g.codes.T)),
            "qzeros": ("I32", words(g.zeros.T)),
            "scales": ("F16", g.scales.T.astype(np.float16)),
        }, g.dequantized()

    def gemv(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        g = grouped(w, 4, group, sym=False)
        n, groups = g.scales.shape
        multiple = 1 if group >= 128 else 128 // group
        words = (groups + 7) // 8
        width = (words + multiple - 1) // multiple * multiple
        zeros = np.zeros((n, 8 * width), np.int64)
        scales = np.zeros((n, 8 * width), np.float16)
        zeros[:, :groups], scales[:, :groups] = g.zeros, g.scales
        return {
            "qweight": ("I32", bit_string(g.codes.T, 4).T),
            "qzeros": ("I32", bit_string(zeros.T, 4).T),
            "scales": ("F16", scales),
        }, g.dequantized()

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": version,
              "zero_point": True}
    return Family(config, gemm if version == "gemm" else gemv)


# -- HQQ -------------------------------------------------------------------------------------------


def hqq(bits: int, group: int, dtype: str = "F16", axis: int = 1) -> Family:
    """HQQLinear: rows of groups (axis 0: columns), packed far apart; float zeros."""
    packing, slots, letters = {8: ("8bit_u8", 1, "U8"), 4: ("4bit_u8", 2, "U8"),
                               3: ("3bit_32", 10, "I32"), 2: ("2bit_u8", 4, "U8")}[bits]

    def stored(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if dtype == "BF16":
            return bf16(x), from_bf16(bf16(x))
        kept = x.astype({"F16": np.float16, "F32": np.float32}[dtype])
        return kept, kept.astype(np.float32)

    def pack(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        n, k = w.shape
        rows = w.reshape(-1, group) if axis else w.reshape(group, -1)
        low, high = rows.min(axis=axis, keepdims=True), rows.max(axis=axis, keepdims=True)
        kept_scale, scale = stored(np.maximum(high - low, 1e-3) / ((1 << bits) - 1))
        kept_zero, zero = stored(-low / scale)
        codes = np.clip(np.rint(rows / scale + zero), 0, (1 << bits) - 1).astype(np.uint8)
        values = (codes.astype(np.float32) - zero) * scale
        padded = -(-len(codes) // slots) * slots
        codes = np.pad(codes, ((0, padded - len(codes)), (0, 0)))
        step = padded // slots
        words = np.zeros((step, codes.shape[1]), np.uint32)
        for slot in range(slots):
            part = codes[slot * step : (slot + 1) * step].astype(np.uint32)
            words |= part << np.uint32(bits * (slots - 1 - slot))
        return {
            "W_q": (letters, words.view(np.int32) if letters == "I32" else words.astype(np.uint8)),
            "scale": (dtype, kept_scale),
            "zero": (dtype, kept_zero),
            "nbits": ("I64", np.array(bits)),
            "group_size": ("I64", np.array(group)),
            "axis": ("I64", np.array(axis)),
            "shape": ("I64", np.array([n, k])),
            "packing": ("U8", np.frombuffer(packing.encode(), np.uint8)),
            "encoded_state_dict": ("U8", np.array([1], np.uint8)),
        }, values.reshape(n, k)

    return Family({"quant_method": "hqq", "skip_modules": ["lm_head"]}, pack)


# -- compressed-tensors ----------------------------------------------------------------------------


def words_of(numbers: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., ceil(K / p)]: numbers [..., K], ``p = 32 // bits`` a word."""
    per = 32 // bits
    words = np.zeros((*numbers.shape[:-1], -(-numbers.shape[-1] // per)), np.uint32)
    for k in range(numbers.shape[-1]):
        words[..., k // per] |= numbers[..., k].astype(np.uint32) << np.uint32(bits * (k % per))
    return words.view(np.int32)


def compressed(
    bits: int,
    strategy: str,
    group: int | None = None,
    *,
    sym: bool = True,
    dtype: str = "BF16",
    act_order: bool = False,
    packed: bool = True,
) -> Family:
    """pack-quantized and int-quantized."""

    def store(x: np.ndarray) -> np.ndarray:
        return bf16(x) if dtype == "BF16" else x.astype({"F16": "f2", "F32": "f4"}[dtype])

    def value(x: np.ndarray) -> np.ndarray:
        return from_bf16(bf16(x)) if dtype == "BF16" else store(x).astype(np.float32)

    def pack(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        n, k = w.shape
        order = None
        if act_order:
            order = np.random.default_rng(0 if k == 64 else 1).permutation(k)
        g = grouped(w, bits, group or k, sym=sym, order=order, to_stored=value)
        if strategy == "tensor":
            step = value(np.abs(w).max(keepdims=True) / 127)
            codes = np.clip(np.rint(w / step), -128, 127).astype(np.int64) + 128
            g = Groups(codes.astype(np.uint8), np.repeat(step, n, axis=0),
                       np.full((n, 1), 128), np.zeros(k, int))
        middle = 1 << (bits - 1)
        scales = g.scales[:1] if strategy == "tensor" else g.scales
        tensors: Tensors = {"weight_scale": (dtype, store(scales))}
        if packed:
            tensors["weight_packed"] = ("I32", words_of(g.codes, bits))
            tensors["weight_shape"] = ("I64", np.array([n, k]))
            if not sym:
                tensors["weight_zero_point"] = ("I32", words_of(g.zeros.T, bits).T)
        else:
            tensors["weight"] = ("I8", (g.codes.astype(np.int64) - middle).astype(np.int8))
            if not sym:
                tensors["weight_zero_point"] = ("I8", (g.zeros - middle).astype(np.int8))
        if act_order:
            tensors["weight_g_idx"] = ("I32", g.index.astype(np.int32))
        return tensors, g.dequantized()

    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": strategy,
               "group_size": group, "actorder": "group" if act_order else None, "dynamic": False}
    return Family({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights,
                                      "input_activations": None, "output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }, pack)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3(bits: int) -> float:
    """The value of an E4M3 number (0x7f and 0xff are NaN)."""
    sign, exponent, fraction = -1 if bits & 0x80 else 1, bits >> 3 & 15, bits & 7
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.abs(values[..., None] - table).argmin(axis=-1)


def nvfp4() -> Family:
    """nvfp4-pack-quantized: groups of 16 with E4M3 scales, and one that divides for the tensor."""
    numbers = np.array([e4m3(bits) for bits in range(0x7F)], np.float32)

    def pack(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        n, k = w.shape
        groups = w.reshape(n, k // 16, 16)
        divisor = np.float32(6 * 448 / np.abs(w).max())
        scales = nearest(np.abs(groups).max(axis=2) / 6 * divisor, numbers).astype(np.uint8)
        step = (numbers[scales] * (np.float32(1) / divisor))[..., None]
        codes = nearest(groups / np.where(step > 0, step, 1), E2M1).reshape(n, k).astype(np.uint8)
        values = E2M1[codes].reshape(groups.shape) * step
        return {
            "weight_packed": ("U8", codes[:, 0::2] | codes[:, 1::2] << 4),
            "weight_scale": ("F8_E4M3", scales),
            "weight_global_scale": ("F32", divisor.reshape(1)),
            "input_global_scale": ("F32", np.ones(1, np.float32)),
        }, values.reshape(n, k).astype(np.float32)

    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
               "group_size": 16}
    return Family({
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["re:.*_proj"], "weights": weights}},
        "ignore": ["lm_head"],
    }, pack)


def fp8(strategy: str, dtype: str = "BF16") -> Family:
    """float-quantized: E4M3 codes with a scale of the tensor or of each row."""
    numbers = np.array([e4m3(bits) if bits & 0x7F != 0x7F else np.inf for bits in range(256)])

    def pack(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        largest = np.abs(w).max(axis=None if strategy == "tensor" else 1, keepdims=True)
        scale = np.maximum(largest, 1e-3).astype(np.float32) / np.float32(448)
        kept = bf16(scale) if dtype == "BF16" else scale
        scale = from_bf16(kept) if dtype == "BF16" else scale
        codes = nearest(w / scale, numbers).astype(np.uint8)
        values = numbers[codes].astype(np.float32) * scale
        return {
            "weight": ("F8_E4M3", codes),
            "weight_scale": (dtype, kept.reshape(1) if strategy == "tensor" else kept),
        }, values

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy,
               "dynamic": False}
    return Family({
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }, pack)


def fp8_blocks() -> Family:
    """DeepSeek's fp8: a scale for every block of 128 by 128."""
    numbers = np.array([e4m3(bits) if bits & 0x7F != 0x7F else np.inf for bits in range(256)])

    def pack(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        n, k = w.shape
        scale = np.empty((-(-n // 128), -(-k // 128)), np.float32)
        codes, values = np.empty((n, k), np.uint8), np.empty((n, k), np.float32)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                scale[i, j] = np.maximum(np.abs(w[at]).max(), 1e-3) / 448
                codes[at] = nearest(w[at] / scale[i, j], numbers)
                values[at] = numbers[codes[at]].astype(np.float32) * scale[i, j]
        return {"weight": ("F8_E4M3", codes), "weight_scale_inv": ("F32", scale)}, values

    return Family({"quant_method": "fp8", "weight_block_size": [128, 128]}, pack)


# -- bitsandbytes, BitNet, MXFP4 -------------------------------------------------------------------


def bnb_int8() -> Family:
    """Int8Params: the largest magnitude of every row is 127."""

    def pack(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        largest = np.abs(w).max(axis=1)
        largest[largest == 0] = 1
        codes = np.rint(w * 127 / largest[:, None]).astype(np.int8)
        return {
            "weight": ("I8", codes),
            "SCB": ("F32", largest.astype(np.float32)),
            "weight_format": ("U8", np.array(0, np.uint8)),
        }, codes.astype(np.float32) * (largest.astype(np.float32) / np.float32(127))[:, None]

    return Family({"quant_method": "bitsandbytes", "load_in_8bit": True}, pack)


# get_4bit_type of the library: nf4 is the table of QLoRA; fp4 are these over 12.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0], np.float32)  # fmt: skip
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3],
               np.float32) / np.float32(12)


def bnb_4bit(kind: str, group: int = 64, nested: bool = False) -> Family:
    """QuantState: blocks of the flattened matrix, perhaps with quantized scales."""
    table = NF4 if kind == "nf4" else FP4

    def pack(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        n, k = w.shape
        blocks = w.reshape(-1, group)
        absmax = np.maximum(np.abs(blocks).max(axis=1), 1e-3)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": group, "dtype": "float16",
                                 "shape": [n, k]}
        tensors: Tensors = {}
        if nested:
            offset = np.float32(absmax.mean())
            code = np.linspace(-1, 1, 256, dtype=np.float32)
            part = (absmax - offset).reshape(-1)
            size = 32
            largest = np.array([np.maximum(np.abs(part[i : i + size]).max(), 1e-6)
                                for i in range(0, len(part), size)], np.float32)
            of = np.arange(len(part)) // size
            numbers = nearest(part / largest[of], code).astype(np.uint8)
            absmax = code[numbers] * largest[of] + offset
            state.update(nested_blocksize=size, nested_dtype="float32", nested_offset=float(offset))
            tensors["weight.absmax"] = ("U8", numbers)
            tensors["weight.nested_absmax"] = ("F32", largest)
            tensors["weight.nested_quant_map"] = ("F32", code)
        else:
            tensors["weight.absmax"] = ("F32", absmax)
        codes = nearest(blocks / absmax[:, None], table).astype(np.uint8)
        flat = codes.reshape(-1)
        tensors["weight"] = ("U8", (flat[0::2] << 4 | flat[1::2]).reshape(-1, 1))
        tensors["weight.quant_map"] = ("F32", table)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = ("U8", text)
        return tensors, (table[codes] * absmax[:, None]).reshape(n, k)

    return Family({"quant_method": "bitsandbytes", "load_in_4bit": True,
                   "bnb_4bit_quant_type": kind}, pack)


def bitnet(kind: str) -> Family:
    """Ternary weights, four rows a byte, that lie a quarter of the rows apart."""

    def pack(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        n, k = w.shape
        mean = np.abs(w).mean(dtype=np.float64)
        scale = bf16(np.array([1 / mean if kind == "bitlinear" else mean], np.float32))
        codes = np.clip(np.rint(w / mean), -1, 1).astype(np.int64) + 1
        packed = np.zeros((n // 4, k), np.uint8)
        for row in range(n):
            packed[row % (n // 4)] |= (codes[row] << (2 * (row // (n // 4)))).astype(np.uint8)
        factor = from_bf16(scale)[0]
        factor = np.float32(1) / factor if kind == "bitlinear" else factor
        return {
            "weight": ("U8", packed),
            "weight_scale": ("BF16", scale),
        }, (codes - 1).astype(np.float32) * factor

    return Family({"quant_method": "bitnet", "linear_class": kind,
                   "quantization_mode": "offline"}, pack)


def mxfp4() -> Family:
    """gpt-oss's NAME_blocks and NAME_scales, of plain matrices."""

    def pack(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        n, k = w.shape
        blocks = w.reshape(n, k // 32, 32)
        largest = np.maximum(np.abs(blocks).max(axis=2), 1e-9)
        exponent = np.floor(np.log2(largest)).astype(int) - 2
        step = np.exp2(exponent.astype(np.float64))[..., None]
        codes = nearest((blocks / step).astype(np.float32), E2M1).astype(np.uint8)
        values = (E2M1[codes] * step).astype(np.float32)
        return {
            "weight_blocks": ("U8", codes[..., 0::2] | codes[..., 1::2] << 4),
            "weight_scales": ("U8", (exponent + 127).astype(np.uint8)),
        }, values.reshape(n, k)

    return Family({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, pack)


def aqlm(books: int, bits: int) -> Family:
    """Codebooks that hold the matrix's own vectors, halved, and others around them."""

    def pack(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        n, k = w.shape
        rng = np.random.default_rng(n)
        scales = np.maximum(np.abs(w).max(axis=1), 1e-3).astype(np.float16)
        vectors = (w / scales[:, None]).reshape(-1, 8)
        entries = rng.normal(0, 0.3, (books, 1 << bits, 8)).astype(np.float16)
        codes = np.empty((len(vectors), books), np.int64)
        rest = vectors.copy()
        for i in range(books):
            places = rng.permutation(1 << bits)[: len(vectors)]
            entries[i, places] = rest[: len(places)] if i == 0 else rest[: len(places)] / 2
            distances = -2 * rest @ entries[i].T.astype(np.float32)
            distances += (entries[i].astype(np.float32) ** 2).sum(axis=1)
            codes[:, i] = distances.argmin(axis=1)
            rest -= entries[i, codes[:, i]]
        values = entries[0, codes[:, 0]].astype(np.float32)
        for i in range(1, books):
            values = values + entries[i, codes[:, i]].astype(np.float32)
        kept = codes.astype(np.uint8 if bits == 8 else np.uint16).reshape(n, k // 8, books)
        return {
            "codes": ("I8" if bits == 8 else "I16", kept),
            "codebooks": ("F16", entries.reshape(books, 1 << bits, 1, 8)),
            "scales": ("F16", scales.reshape(n, 1, 1, 1)),
        }, values.reshape(n, k) * scales.astype(np.float32)[:, None]

    return Family({"quant_method": "aqlm", "num_codebooks": books, "nbits_per_codebook": bits,
                   "in_group_size": 8, "out_group_size": 1}, pack)


def spqr(bits: int = 3) -> Family:
    """Tiles of 16 by 16: what 16 rows share lies byte by byte in pairs of them; CSR outliers."""

    def pack(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        n, k = w.shape
        rng = np.random.default_rng(k)
        outlier = np.argsort(np.argsort(-np.abs(w), axis=1), axis=1) < np.arange(n)[:, None] % 3
        rest = np.where(outlier, 0, w)
        half = np.float16
        words = np.zeros((n // 16, k // 16, 16), np.uint64)
        values = np.empty((n, k), np.float32)
        for i in range(n // 16):
            for j in range(k // 16):
                tile = rest[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
                step = max(float(tile.max() - tile.min()), 1e-2) / 7
                # scales of 1 to 3 steps of a third, zeros about the middle
                ss, zs = half(step / 3), half(0.5)
                sz, zz = half(rng.integers(-4, 0)), half(rng.integers(-3, 1))
                shared = np.array([ss, zs, sz, zz], half).tobytes()
                for r in range(16):
                    s, z = int(rng.integers(0, 3)), int(rng.integers(4, 8))
                    scale, zero = ss * (half(s) - sz), zs * (half(z) - zz)
                    codes = np.clip(np.rint(tile[r] / float(scale) + float(zero)), 0, 7)
                    word = s | z << 3 | shared[r // 2] << 54
                    for c, code in enumerate(codes.astype(int).tolist()):
                        word |= code << (6 + 3 * c)
                    words[i, j, r] = word
                    values[16 * i + r, 16 * j : 16 * j + 16] = (
                        (codes.astype(np.float32) - np.float32(zero)) * np.float32(scale))
        offsets, pairs = [0], []
        for r in range(n):
            for c in np.flatnonzero(outlier[r]).tolist():
                more = half(w[r, c] - values[r, c])
                values[r, c] += np.float32(more)
                pairs.append(c | int(more.view(np.uint16)) << 16)
            offsets.append(len(pairs))
        return {
            "dense_weights": ("I64", words.reshape(-1).view(np.int64)),
            "row_offsets": ("I32", np.array(offsets, np.int32)),
            "col_vals": ("I32", np.array(pairs, np.uint32).view(np.int32)),
            "in_perm": ("I32", np.zeros(k // 2, np.int32)),
        }, values

    return Family({"quant_method": "spqr", "bits": bits, "beta1": 16, "beta2": 16,
                   "shapes": {}}, pack)


# -- whole models ----------------------------------------------------------------------------------

HIDDEN = 192
"""stories260K's 172, with rows and columns of zeros: most packings want multiples of 32."""


def stories() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and float32 weights of stories260K."""
    config = json.loads((STORIES / "config.json").read_text())
    weights = {name: np.asarray(w, np.float32) for name, w in
               safetensors.numpy.load_file(STORIES / "model.safetensors").items()}
    more = HIDDEN - config["intermediate_size"]
    for name, w in weights.items():
        if ".gate_proj." in name or ".up_proj." in name:
            weights[name] = np.pad(w, ((0, more), (0, 0)))
        elif ".down_proj." in name:
            weights[name] = np.pad(w, ((0, 0), (0, more)))
    return {**config, "intermediate_size": HIDDEN}, weights


def write_model(folder: Path, family: Family) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """stories260K quantized by a family, the same with the dequantized weights in float32, and
    those weights of the quantized layers by name."""
    config, weights = stories()
    packed: Tensors = {}
    dense: dict[str, np.ndarray] = {}
    quantized: dict[str, np.ndarray] = {}
    for name, w in weights.items():
        if "_proj." in name:
            layer = name.removesuffix(".weight")
            tensors, values = family.pack(layer, w)
            packed.update({f"{layer}.{part}": tensor for part, tensor in tensors.items()})
            dense[name] = quantized[name] = values
        else:
            packed[name] = ("F32", w)
            dense[name] = w
    for path in (folder / "packed", folder / "dense"):
        path.mkdir(parents=True)
    write_safetensors(folder / "packed" / "model.safetensors", packed)
    write_safetensors(folder / "dense" / "model.safetensors",
                      {name: ("F32", w) for name, w in dense.items()})
    (folder / "dense" / "config.json").write_text(json.dumps(config))
    (folder / "packed" / "config.json").write_text(
        json.dumps({**config, "quantization_config": family.config}))
    return folder / "packed", folder / "dense", quantized


def write_packed(folder: Path, family: Family) -> Path:
    """The safetensors file of the first two layers of stories260K, quantized by a family."""
    packed: Tensors = {}
    for name, w in stories()[1].items():
        if "_proj." in name and name.split(".")[2] in "01":
            layer = name.removesuffix(".weight")
            tensors, _ = family.pack(layer, w)
            packed.update({f"{layer}.{part}": tensor for part, tensor in tensors.items()})
    write_safetensors(folder / "model.safetensors", packed)
    return folder / "model.safetensors"


# -- gpt-oss ---------------------------------------------------------------------------------------

_STACKED = re.compile(r".*\.mlp\.experts\.(gate_up|down)_proj")


def write_gpt_oss(
    folder: Path,
    *,
    never: int | None = None,
    config: dict[str, Any] | None = None,
    **overrides: Any,
) -> tuple[Path, dict[str, np.ndarray]]:
    """A tiny gpt-oss as its makers store it, experts in MXFP4 and the rest in bfloat16, and the
    float32 weights that it stands for by name; matrices of experts ``[E, N, K]``.

    ``never`` is an expert that no token goes to. ``config``: settings that replace others;
    ``overrides``: fields of :class:`tests.frontends.tiny.Tiny`.
    """
    folder = write_tiny_hf(folder, "gpt-oss", **overrides)
    spec = tiny("gpt-oss", **overrides)
    packed: Tensors = {}
    values: dict[str, np.ndarray] = {}
    for name, w in weights(spec).items():
        if name.endswith("mlp.router.bias") and never is not None:
            w[never] = -1000.0
        if _STACKED.fullmatch(name):
            made = [mxfp4().pack(name, np.ascontiguousarray(m.T)) for m in w]
            for part in ("blocks", "scales"):
                each = np.stack([tensors[f"weight_{part}"][1] for tensors, _ in made])
                packed[f"{name}_{part}"] = ("U8", each)
            values[name] = np.stack([m for _, m in made])
        else:
            packed[name] = ("BF16", bf16(w))
            values[name] = from_bf16(packed[name][1])
    write_safetensors(folder / "model.safetensors", packed)
    path = folder / "config.json"
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    settings = {**json.loads(path.read_text()), "quantization_config": quantization}
    path.write_text(json.dumps({**settings, **(config or {})}))
    return folder, values


def write_mixtral(folder: Path, family: Family) -> tuple[Path, dict[str, np.ndarray]]:
    """A tiny Mixtral whose attention and experts are quantized by a family, as the tools that
    quantize such models leave it, and the float32 matrices that these stand for by name."""
    folder = write_tiny_hf(folder, "mixtral")
    packed: Tensors = {}
    quantized: dict[str, np.ndarray] = {}
    for name, w in weights(tiny("mixtral")).items():
        if re.search(r"_proj\.|experts\.", name):
            layer = name.removesuffix(".weight")
            tensors, quantized[name] = family.pack(layer, w)
            packed.update({f"{layer}.{part}": tensor for part, tensor in tensors.items()})
        else:
            packed[name] = ("F32", w)
    write_safetensors(folder / "model.safetensors", packed)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "quantization_config": family.config}))
    return folder, quantized
