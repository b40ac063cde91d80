"""Writers of quantized checkpoints, each plainly from the specification of its packing.

A writer takes a float matrix ``[N, K]`` and returns the tensors of its layer, and the float32 matrix
that they stand for. They share nothing with the readers: what the readers unpack is compared with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

STORIES = Path(__file__).parents[1] / "data" / "stories260k" / "hf"

Tensors = dict[str, tuple[str, np.ndarray]]
"""By the part of the name behind the layer's: safetensors' type, and the numbers (or their bits)."""

_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file by its specification."""
    header: dict[str, Any] = {}
    chunks, offset = [], 0
    for name, (dtype, array) in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        assert len(data) == _SIZES[dtype] * array.size, (name, dtype, array.dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


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
    """AutoGPTQ's QuantLinear; with ``act_order`` all layers that read the same input share g_idx."""

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
        width = -(-(-(-groups // 8)) // multiple) * multiple
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
