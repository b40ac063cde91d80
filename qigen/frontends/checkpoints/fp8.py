"""fp8 checkpoints with scales of square blocks (DeepSeek-V3, Qwen3-FP8).

``weight`` E4M3 ``[N, K]`` and ``weight_scale_inv`` float ``[ceil(N / a), ceil(K / b)]``, where
``weight_block_size`` holds a and b (128 and 128):

    W[n, k] = weight[n, k] * weight_scale_inv[n // a, k // b]
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qigen.frontends.checkpoints.grouped import small_floats
from qigen.frontends.checkpoints.raw import RawTensor, modules
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import Settings


def read(
    tensors: Mapping[str, RawTensor], settings: Settings
) -> tuple[dict[str, SourceTensor], set[str]]:
    """The matrices of an fp8 checkpoint, and the names of the tensors that they consist of."""
    block = settings.values.get("weight_block_size", [128, 128])
    good = isinstance(block, list) and len(block) == 2
    if not good or not all(type(side) is int and side > 0 for side in block):
        raise settings.bad("weight_block_size", "two numbers above zero")
    result: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for module in modules(tensors, "weight_scale_inv"):
        weight = module.get("weight", "weight_scale_inv")
        if len(weight.shape) != 2:
            raise weight.bad(f"has the shape {list(weight.shape)}, expected [N, K]")
        n, k = weight.expect(weight.shape, "F8_E4M3").shape
        scale = module.get("weight_scale_inv", "weight")
        scale.expect((-(-n // block[0]), -(-k // block[1])), "F32", "F16", "BF16")
        scales = np.repeat(scale.floats(), block[0], axis=0)[:n]
        result[f"{module.name}.weight"] = small_floats(
            module.name, weight, block[1], scales, "fp8"
        )
        used |= module.used
    return result, used
