"""BitNet b1.58 checkpoints as the transformers library stores them.

``weight`` uint8 ``[N / 4, K]``: byte r has at bit ``2 * i`` the weight of row ``r + i * N / 4``, as
0, 1 or 2 for -1, 0 or 1. ``weight_scale`` is one float of the tensor. ``BitLinear`` divides its
result by it, ``AutoBitLinear`` (``linear_class: autobitlinear``) multiplies:

    W = (code - 1) / weight_scale,    or (code - 1) * weight_scale

The reciprocal is rounded to float32 once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qigen.errors import Unsupported
from qigen.formats.algebra import Array
from qigen.formats.catalog import by_name
from qigen.formats.grouped import bits_of, padded
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends.checkpoints.grouped import PackedMatrix
from qigen.frontends.checkpoints.raw import Module, RawTensor, modules
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import Settings, shown

_CLASSES = ("bitlinear", "autobitlinear")


def read(
    tensors: Mapping[str, RawTensor], settings: Settings
) -> tuple[dict[str, SourceTensor], set[str]]:
    """The matrices of a BitNet checkpoint, and the names of the tensors that they consist of."""
    kind = settings.text("linear_class", "bitlinear")
    mode = settings.text("quantization_mode", "offline")
    if kind not in _CLASSES or mode != "offline":
        raise Unsupported(
            f"BitNet layers '{shown(kind)}' quantized '{shown(mode)}' are not read; known are "
            f"{' and '.join(_CLASSES)}, quantized offline",
            settings.where,
        )
    result: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for module in modules(tensors, "weight_scale"):
        result[f"{module.name}.weight"] = _layer(module, kind == "bitlinear")
        used |= module.used
    return result, used


def _layer(module: Module, divides: bool) -> SourceTensor:
    weight = module.get("weight", "weight_scale")
    if len(weight.shape) != 2:
        raise weight.bad(f"has the shape {list(weight.shape)}, expected [N / 4, K]")
    quarter, k = weight.shape
    stored: Array = weight.expect((quarter, k), "U8").array()
    illegal = stored & (stored >> np.uint8(1)) & np.uint8(0x55)
    if illegal.any():
        raise weight.bad(
            f"has a 3 in row {int(np.argwhere(illegal)[0][0])}, which is no ternary weight; the "
            "file is damaged"
        )
    scale = module.get("weight_scale", "weight_scale")
    value = scale.floats().reshape(-1)
    if value.size != 1:
        raise scale.bad(f"has {value.size} numbers, expected one")
    if divides and not value[0]:
        raise scale.bad("is zero, and the layer divides by it")
    factor = np.float32(1) / value[0] if divides else value[0]

    row = by_name("ternary2")

    def read(first: int, last: int) -> QuantizedTensor:
        rows = np.arange(first, last)
        shift = (2 * (rows // quarter)).astype(np.uint8)
        codes: Array = stored[rows % quarter] >> shift[:, None] & np.uint8(3)
        scales = np.full((last - first, 1, 1), factor, np.float32)
        fields = {"codes": padded(codes, row), "d": bits_of(scales, row.field("d"))}
        return QuantizedTensor(row, (last - first, k), fields)

    name, shape = f"{module.name}.weight", (4 * quarter, k)
    return PackedMatrix(weight.file, name, shape, row, weight.data, read)
