"""bitsandbytes checkpoints: int8 (``LLM.int8()``) with a scale a row, nf4 and fp4 in blocks.

int8: ``weight`` int8 ``[N, K]`` and ``SCB`` f32 ``[N]``, the largest magnitude of each row:

    W[n, k] = weight[n, k] * SCB[n] / 127

The scale ``SCB / 127`` is rounded to float32 once, as the library's own dequantization does. The
outlier columns of ``LLM.int8()`` are found in the activations at run time; the stored weights have
none.

4 bits: ``weight`` uint8 ``[N * K / 2, 1]``, the higher nibble first, and
``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``), JSON as bytes, with ``blocksize`` and
``shape``; ``weight.quant_map`` f32 ``[16]``, the table; ``weight.absmax``, a scale for every
``blocksize`` weights of the flattened matrix, f32 or (double quantization) uint8 with

    absmax = nested_quant_map[absmax] * nested_absmax[block // nested_blocksize] + nested_offset

which is computed in float32, as the library does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from qigen.formats.algebra import Array, Float32Array
from qigen.formats.catalog import by_name
from qigen.formats.grouped import Grouped, bits_of, narrowest, padded, stored_group
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends.checkpoints.grouped import PackedMatrix, matrix, no_row
from qigen.frontends.checkpoints.raw import Module, RawTensor, modules
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import Settings, shown


def read(
    tensors: Mapping[str, RawTensor], settings: Settings
) -> tuple[dict[str, SourceTensor], set[str]]:
    """The matrices of a bitsandbytes checkpoint, and the names of the tensors that make them."""
    result: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for kind in ("nf4", "fp4"):
        for module in modules(tensors, f"weight.quant_state.bitsandbytes__{kind}"):
            result[f"{module.name}.weight"] = _4bit(module, kind)
            used |= module.used
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


def _4bit(module: Module, kind: str) -> SourceTensor:
    state = module.get(f"weight.quant_state.bitsandbytes__{kind}", "weight")
    try:
        values = json.loads(state.expect(state.shape, "U8").array().tobytes())
        if not isinstance(values, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise state.bad(f"holds no JSON object ({error})") from None
    settings = Settings(values, f"{state.file}: {shown(state.name)}")
    shape = values.get("shape")
    if not isinstance(shape, list) or [type(side) for side in shape] != [int, int]:
        raise settings.bad("shape", "N and K")
    if min(shape) < 1:
        raise settings.bad("shape", "N and K")
    n, k = shape
    group = settings.integer("blocksize")
    weight = module.get("weight", "weight.absmax")
    if n * k % 2 or weight.shape not in ((n * k // 2, 1), (1, n * k // 2), (n * k // 2,)):
        raise weight.bad(f"has the shape {list(weight.shape)}, expected {[n * k // 2, 1]}")
    stored: Array = weight.expect(weight.shape, "U8").array().reshape(-1)
    size = stored_group(group, k // group)
    if k % group or not isinstance(size, int):
        raise no_row(weight, "bitsandbytes", f"{kind} codes in groups of {group} in rows of {k}")
    scales = _absmax(module, n * k // group, settings).reshape(n, k // group)
    scale = narrowest(scales)
    row = by_name(f"{kind}g{size}{'' if scale == 'f16' else f'_{scale}'}")
    table = module.get("weight.quant_map", "weight").expect((16,), "F32")
    if not np.array_equal(table.floats(), row.code_values):
        raise no_row(table, "bitsandbytes", f"a table that is not that of {kind}")

    def read(first: int, last: int) -> QuantizedTensor:
        # a row of an odd K begins in the middle of a byte; blocks of even size rule that out
        part = stored[first * k // 2 : last * k // 2]
        codes = np.stack((part >> np.uint8(4), part & np.uint8(15)), axis=-1)
        blocks = padded(codes.reshape(last - first, k), row)
        d = row.field("d")
        of = np.arange(blocks.shape[1] * d.count) * row.group // group
        numbers = scales[first:last][:, of].reshape(last - first, -1, d.count)
        return QuantizedTensor(
            row, (last - first, k), {"codes": blocks, "d": bits_of(numbers, d)}
        )

    return PackedMatrix(weight.file, f"{module.name}.weight", (n, k), row, weight.data, read)


def _absmax(module: Module, blocks: int, settings: Settings) -> Float32Array:
    """float32 [blocks]: the scales, with double quantization undone."""
    absmax = module.get("weight.absmax", "weight").expect((blocks,), "F32", "U8")
    if absmax.dtype == "F32":
        return absmax.floats()
    size = settings.integer("nested_blocksize")
    offset = np.float32(settings.number("nested_offset", low=-1e30))
    table = module.get("weight.nested_quant_map", "weight.absmax").expect((256,), "F32").floats()
    nested = module.get("weight.nested_absmax", "weight.absmax")
    scales = nested.expect((-(-blocks // size),), "F32").floats()
    values: Float32Array = table[absmax.array()] * scales[np.arange(blocks) // size] + offset
    return values
