"""bitsandbytes checkpoints: int8 (``LLM.int8()``) with a scale a row.

``weight`` int8 ``[N, K]`` and ``SCB`` f32 ``[N]``, the largest magnitude of each row:

    W[n, k] = weight[n, k] * SCB[n] / 127

The scale ``SCB / 127`` is rounded to float32 once, as the library's own dequantization does. The
outlier columns of ``LLM.int8()`` are found in the activations at run time; the stored weights have
none. 4-bit checkpoints (nf4, fp4) need tables of float32 values, for which the catalog has no row.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from qigen.formats.algebra import Array
from qigen.frontends.checkpoints.grouped import Grouped, matrix, no_row
from qigen.frontends.checkpoints.raw import Module, RawTensor, modules
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import Settings


def read(
    tensors: Mapping[str, RawTensor], settings: Settings
) -> tuple[dict[str, SourceTensor], set[str]]:
    """The matrices of a bitsandbytes checkpoint, and the names of the tensors that make them."""
    for name, tensor in tensors.items():
        if ".quant_state.bitsandbytes__" in name:
            raise no_row(tensor, "bitsandbytes", f"{name.rpartition('__')[2]} codes")
    result: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for module in modules(tensors, "SCB"):
        result[f"{module.name}.weight"] = _int8(module)
        if module.has("weight_format"):
            layout = module.get("weight_format", "SCB")
            if layout.array().any():
                raise no_row(layout, "bitsandbytes", "rows in the tiles of a GPU")
        used |= module.used
    return result, used


def _int8(module: Module) -> SourceTensor:
    weight = module.get("weight", "SCB")
    if len(weight.shape) != 2:
        raise weight.bad(f"has the shape {list(weight.shape)}, expected [N, K]")
    n, k = weight.shape
    stored: Array = weight.expect((n, k), "I8").array()
    scales = module.get("SCB", "SCB").expect((n,), "F32").floats() / np.float32(127)

    def codes(first: int, last: int) -> npt.NDArray[np.uint8]:
        unsigned: npt.NDArray[np.uint8] = stored[first:last].view(np.uint8) ^ np.uint8(0x80)
        return unsigned

    grouped = Grouped((n, k), 8, k, codes, scales[:, None], 128)
    return matrix(f"{module.name}.weight", weight, grouped, "bitsandbytes")
