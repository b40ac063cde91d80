"""GPTQ checkpoints in the layout of the Marlin kernel (``checkpoint_format`` "marlin").

Symmetric codes of 4 bits. ``B`` int32 ``[K / 16, 2 N]`` has the 16 x 16 tiles of W^T in the order
in which the lanes of a tensor core read them: 64 columns are 128 words, word ``4 i + j`` is what
lane i takes of tile j, that is of columns i / 4 and i / 4 + 8 the rows 2 (i % 4) + {0, 1, 8, 9}. Of
the eight codes in this order, those of even number lie in the lower half of the word. ``s`` f16
``[K / group, N]`` are the scales, 64 (or, if there is one group, 32) columns in another order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from qigen.errors import Unsupported
from qigen.formats.algebra import Array
from qigen.formats.grouped import Grouped
from qigen.frontends.checkpoints.grouped import group_of, matrix
from qigen.frontends.checkpoints.raw import Module, RawTensor, modules
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import Settings

_COLUMNS = 64
"""Columns (rows of W) whose codes lie together."""


def read(
    tensors: Mapping[str, RawTensor], settings: Settings
) -> tuple[dict[str, SourceTensor], set[str]]:
    """The matrices of a Marlin checkpoint, and the names of the tensors that they consist of."""
    bits = settings.integer("bits", 4)
    if bits != 4 or not settings.flag("sym", True):
        raise Unsupported(f"Marlin has symmetric codes of 4 bits, not {bits} bits"
                          f"{'' if settings.flag('sym', True) else ' with zeros'}", settings.where)
    setting = settings.integer("group_size", 128, low=-1)
    result: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for module in modules(tensors, "B"):
        result[f"{module.name}.weight"] = _layer(module, setting, settings)
        if module.has("workspace"):
            module.get("workspace", "B")
        used |= module.used
    return result, used


def _layer(module: Module, setting: int, settings: Settings) -> SourceTensor:
    packed = module.get("B", "s")
    if len(packed.shape) != 2 or packed.shape[1] % (2 * _COLUMNS):
        raise packed.bad(f"has the shape {list(packed.shape)}, expected [K / 16, 2 N] with N a "
                         f"multiple of {_COLUMNS}")
    tiles, n = packed.shape[0], packed.shape[1] // 2
    words: Array = packed.expect(packed.shape, "I32").array().view(np.uint32)
    k = 16 * tiles
    group = group_of(setting, k, settings.where)
    groups = -(-k // group)
    scales = module.get("s", "B").expect((groups, n), "F16").floats()
    column = np.arange(n)
    if groups > 1:
        place = column // 64 * 64 + 8 * (column % 8) + column % 64 // 8
    else:
        place = column // 32 * 32 + 8 * (column % 8 // 2) + 2 * (column % 32 // 8) + column % 2
    # the words and shifts of the 16 rows of a tile, for every column
    row = np.arange(16)[:, None]
    lane = 4 * (column % 8) + row % 8 // 2
    word = 128 * (column // _COLUMNS) + 4 * lane + column // 16 % 4
    number = 4 * (column % 16 // 8) + 2 * (row // 8) + row % 2
    shift = (4 * (number // 2 + 4 * (number % 2))).astype(np.uint32)

    def codes(first: int, last: int) -> npt.NDArray[np.uint8]:
        found = words[:, word[:, first:last]] >> shift[:, first:last] & np.uint32(15)
        return np.ascontiguousarray(found.reshape(k, last - first).T).astype(np.uint8)

    grouped = Grouped((n, k), 4, group, codes, scales[:, place].T, 8)
    return matrix(f"{module.name}.weight", packed, grouped, "gptq")
