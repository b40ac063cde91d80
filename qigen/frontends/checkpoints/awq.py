"""AWQ checkpoints (AutoAWQ): 4-bit codes in the ``gemm`` or the ``gemv`` packing.

* ``gemm``: ``qweight`` int32 ``[K, N / 8]``, ``qzeros`` int32 ``[G, N / 8]``, ``scales`` f16
  ``[G, N]``; nibble i of a word belongs to row ``8 * word + (0, 2, 4, 6, 1, 3, 5, 7)[i]``.
* ``gemv``: ``qweight`` int32 ``[N, K / 8]``, ``qzeros`` int32 ``[N, Z]``, ``scales`` f16
  ``[N, 8 * Z]``; nibbles lie in order. Z is the number of words of the G zeros of a row, rounded up
  to whole words and, for groups of 64 (32), to a multiple of 2 (4).

    W[n, k] = scale[n, k // g] * (code[n, k] - zero[n, k // g])
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from qigen.errors import Unsupported
from qigen.formats.algebra import Array
from qigen.formats.grouped import Grouped, unpack_bits
from qigen.frontends.checkpoints.grouped import group_of, matrix
from qigen.frontends.checkpoints.raw import Module, RawTensor, modules
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import Settings, shown

_BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOATS = ("F16", "BF16", "F32")


def read(
    tensors: Mapping[str, RawTensor], settings: Settings
) -> tuple[dict[str, SourceTensor], set[str]]:
    """The matrices of an AWQ checkpoint, and the names of the tensors that they consist of."""
    bits = settings.integer("bits", _BITS, high=8)
    version = settings.text("version", "gemm").lower()
    if bits != _BITS or version not in ("gemm", "gemv"):
        raise Unsupported(
            f"AWQ with {bits} bits in the packing '{shown(version)}' is not read; known are gemm "
            "and gemv with 4 bits",
            settings.where,
        )
    setting = settings.integer("group_size", 128, low=-1)
    result: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for module in modules(tensors, "qweight"):
        layer = _gemm if version == "gemm" else _gemv
        grouped = layer(module, setting, settings.where)
        qweight = module.get("qweight", "qweight")
        result[f"{module.name}.weight"] = matrix(f"{module.name}.weight", qweight, grouped, "awq")
        used |= module.used
    return result, used


def _in_order(words: Array) -> npt.NDArray[np.uint8]:
    """uint8 [..., 8 * W]: the nibbles of ``words`` [..., W] in the order of the rows."""
    nibbles = unpack_bits(words, _BITS)
    out = np.empty_like(nibbles)
    for i, row in enumerate(_ORDER):
        out[..., row::8] = nibbles[..., i::8]
    return out


def _gemm(module: Module, setting: int, where: str) -> Grouped:
    qweight = module.get("qweight", "qweight")
    if len(qweight.shape) != 2:
        raise qweight.bad(f"has the shape {list(qweight.shape)}, expected [K, N / 8]")
    k, n = qweight.shape[0], 8 * qweight.shape[1]
    words: Array = qweight.expect(qweight.shape, "I32").array()
    group = group_of(setting, k, where)
    groups = -(-k // group)
    scales = module.get("scales", "qweight").expect((groups, n), *_FLOATS)
    qzeros = module.get("qzeros", "qweight").expect((groups, n // 8), "I32")

    def codes(first: int, last: int) -> npt.NDArray[np.uint8]:
        found = _in_order(words[:, first // 8 : -(-last // 8)])
        rows: npt.NDArray[np.uint8] = found.T[first % 8 :][: last - first]
        return rows

    zeros = _in_order(qzeros.array()).T
    return Grouped((n, k), _BITS, group, codes, scales.floats().T, zeros)


def _gemv(module: Module, setting: int, where: str) -> Grouped:
    qweight = module.get("qweight", "qweight")
    if len(qweight.shape) != 2:
        raise qweight.bad(f"has the shape {list(qweight.shape)}, expected [N, K / 8]")
    n, k = qweight.shape[0], 8 * qweight.shape[1]
    words: Array = qweight.expect(qweight.shape, "I32").array()
    group = group_of(setting, k, where)
    groups = -(-k // group)
    multiple = {64: 2, 32: 4}.get(group, 1)
    width = -(-groups // (8 * multiple)) * multiple
    scales = module.get("scales", "qweight").expect((n, 8 * width), *_FLOATS)
    qzeros = module.get("qzeros", "qweight").expect((n, width), "I32")

    def codes(first: int, last: int) -> npt.NDArray[np.uint8]:
        return unpack_bits(words[first:last], _BITS)

    zeros = unpack_bits(qzeros.array(), _BITS)[:, :groups]
    return Grouped((n, k), _BITS, group, codes, scales.floats()[:, :groups], zeros)
