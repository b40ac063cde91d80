"""MXFP4 checkpoints (gpt-oss): E2M1 codes in blocks of 32 with a power of two.

A parameter ``NAME`` of shape ``[N, K]`` is ``NAME_blocks`` uint8 ``[N, K / 32, 16]``, the lower
nibble of a byte first, and ``NAME_scales`` uint8 ``[N, K / 32]``, exponents e of ``2^(e - 127)``.
Experts have one dimension more, in front: expert i is the matrix ``NAME.i``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qigen.errors import BadInput
from qigen.formats.algebra import Array
from qigen.formats.catalog import by_name
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends.checkpoints.grouped import PackedMatrix
from qigen.frontends.checkpoints.raw import RawTensor
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import Settings, shown

_BLOCKS, _SCALES = "_blocks", "_scales"


def read(
    tensors: Mapping[str, RawTensor], settings: Settings
) -> tuple[dict[str, SourceTensor], set[str]]:
    """The matrices of an MXFP4 checkpoint, and the names of the tensors that they consist of."""
    result: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for name, blocks in tensors.items():
        if not name.endswith(_BLOCKS):
            continue
        parameter = name.removesuffix(_BLOCKS)
        scales = tensors.get(parameter + _SCALES)
        if scales is None:
            raise BadInput(
                f"tensor '{shown(parameter)}{_SCALES}' is missing, and '{shown(name)}' cannot be "
                "read without it",
                str(blocks.file),
            )
        if len(blocks.shape) == 4:
            experts, n, groups = blocks.shape[:3]
            scales.expect((experts, n, groups), "U8", "F8_E8M0")
            for i in range(experts):
                result[f"{parameter}.{i}"] = _matrix(
                    f"{parameter}.{i}", _expert(blocks, i), _expert(scales, i)
                )
        else:
            result[parameter] = _matrix(parameter, blocks, scales)
        used |= {name, parameter + _SCALES}
    return result, used


def _expert(tensor: RawTensor, index: int) -> RawTensor:
    """One of the matrices that lie behind one another in a tensor."""
    each = tensor.data.size // tensor.shape[0]
    return replace(
        tensor, shape=tensor.shape[1:], data=tensor.data[index * each : (index + 1) * each]
    )


def _matrix(name: str, blocks: RawTensor, scales: RawTensor) -> SourceTensor:
    if len(blocks.shape) != 3 or blocks.shape[2] != 16:
        raise blocks.bad(
            f"has the shape {list(blocks.shape)}, expected [N, K / 32, 16], or that of every expert"
        )
    n, groups = blocks.shape[:2]
    stored: Array = blocks.expect(blocks.shape, "U8").array()
    exponents: Array = scales.expect((n, groups), "U8", "F8_E8M0").array()
    row = by_name("mxfp4")

    def read(first: int, last: int) -> QuantizedTensor:
        part = stored[first:last]
        codes = np.stack((part & np.uint8(15), part >> np.uint8(4)), axis=-1)
        fields = {
            "codes": codes.reshape(last - first, groups, 32),
            "e": exponents[first:last, :, None].copy(),
        }
        return QuantizedTensor(row, (last - first, 32 * groups), fields)

    return PackedMatrix(blocks.file, name, (n, 32 * groups), row, blocks.data, read)
