"""HQQ checkpoints, as ``HQQLinear`` saves itself in safetensors.

A matrix ``[N, K]`` is cut into rows of ``group_size`` weights, ``R = N * K / group_size`` of them
(``axis`` 1: groups along K). With ``axis`` 0 it is ``group_size`` rows of R weights, and a scale
belongs to a column of these: every weight of a row of the matrix has a scale of its own, which only
rows at a distance share. No row of the catalog has such groups, so the weights are kept as the
float32 numbers that the library computes. ``W_q`` packs rows that lie far apart in one byte (3
bits: in one int32 of ten numbers), the first in the highest bits: number r is in row ``r % P`` of
the P packed rows, in slot ``r // P``. ``scale`` and ``zero`` are floats ``[R, 1]`` (axis 0: ``[1,
R]``); ``nbits``, ``group_size``, ``axis``, ``shape`` and ``packing`` (letters as bytes) describe
them.

    W = scale * (code - zero)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput
from qigen.formats.algebra import Array, Float32Array
from qigen.formats.catalog import by_name
from qigen.formats.grouped import Grouped
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends.checkpoints.grouped import PackedMatrix, matrix, no_row
from qigen.frontends.checkpoints.raw import Module, RawTensor, modules
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import Settings, shown

# packing: (bits of a code, its type, codes of an element)
_PACKINGS = {
    "8bit_u8": (8, "U8", 1),
    "4bit_u8": (4, "U8", 2),
    "3bit_32": (3, "I32", 10),
    "2bit_u8": (2, "U8", 4),
}


def read(
    tensors: Mapping[str, RawTensor], settings: Settings
) -> tuple[dict[str, SourceTensor], set[str]]:
    """The matrices of an HQQ checkpoint, and the names of the tensors that they consist of."""
    result: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for module in modules(tensors, "W_q"):
        result[f"{module.name}.weight"] = _layer(module)
        used |= {
            name for name in tensors
            if name.rpartition(".")[0] == module.name and not name.endswith(".bias")
        }
    return result, used


def _integers(module: Module, part: str) -> list[int]:
    tensor = module.get(part, "W_q")
    if tensor.dtype not in ("I64", "I32") or len(tensor.shape) > 1:
        raise tensor.bad(f"is {shown(tensor.dtype)}{list(tensor.shape)}, expected integers")
    return [int(i) for i in tensor.array().reshape(-1)]


def _integer(module: Module, part: str) -> int:
    found = _integers(module, part)
    if len(found) != 1:
        raise module.get(part, "W_q").bad(f"holds {len(found)} numbers, expected one")
    return found[0]


def _layer(module: Module) -> SourceTensor:
    w_q = module.get("W_q", "W_q")
    if module.has("view_as_float") and module.get("view_as_float", "W_q").array().any():
        raise no_row(w_q, "hqq", "codes that are stored as floats (view_as_float)")
    shape = _integers(module, "shape")
    if len(shape) != 2 or min(shape) < 1:
        raise module.get("shape", "W_q").bad(f"holds {shape}, expected N and K")
    n, k = shape
    axis = _integer(module, "axis")
    if axis not in (0, 1):
        raise module.get("axis", "W_q").bad(f"holds {axis}, expected 0 or 1")
    packing = bytes(module.get("packing", "W_q").expect(
        module.get("packing", "W_q").shape, "U8").array().reshape(-1)).decode(errors="replace")
    bits = _integer(module, "nbits")
    if _PACKINGS.get(packing, (0,))[0] != bits:
        raise BadInput(
            f"tensor '{shown(w_q.name)}' is said to have {bits} bits in the packing "
            f"'{shown(packing)}'; known are {', '.join(_PACKINGS)}",
            str(w_q.file),
        )
    _, dtype, slots = _PACKINGS[packing]
    group = _integer(module, "group_size") if module.has("group_size") else k
    if group < 1 or (k % group if axis else n * k % group):
        raise w_q.bad(f"has groups of {group}, which do not divide rows of {k} weights")
    rows, columns = (n * k // group, group) if axis else (group, n * k // group)
    packed = -(-rows // slots)
    words: Array = w_q.expect((packed, columns), dtype).array()
    if dtype == "I32":
        words = words.view(np.uint32)
    scales, zeros = module.get("scale", "W_q"), module.get("zero", "W_q")
    for tensor in (scales, zeros):
        tensor.expect((rows, 1) if axis else (1, columns), "F16", "BF16", "F32")

    def numbers(at: Array) -> npt.NDArray[np.uint8]:
        """The codes of the rows ``at`` of what is packed."""
        shift = (bits * (slots - 1 - at // packed)).astype(words.dtype)
        found: Array = words[at % packed] >> shift[:, None]
        found &= words.dtype.type((1 << bits) - 1)
        return found.astype(np.uint8)

    if axis == 0:
        return _across(module, w_q, (n, k), numbers, scales.floats()[0], zeros.floats()[0])
    each = k // group

    def codes(first: int, last: int) -> npt.NDArray[np.uint8]:
        return numbers(np.arange(first * each, last * each)).reshape(last - first, k)

    grouped = Grouped(
        (n, k), bits, group, codes, scales.floats().reshape(n, each),
        zeros.floats().reshape(n, each),
    )  # fmt: skip
    return matrix(f"{module.name}.weight", w_q, grouped, "hqq")


def _across(
    module: Module,
    w_q: RawTensor,
    shape: tuple[int, int],
    numbers: Callable[[Array], npt.NDArray[np.uint8]],
    scales: Float32Array,
    zeros: Float32Array,
) -> SourceTensor:
    """The float32 numbers of a matrix whose groups lie across its rows."""
    n, k = shape
    width = len(scales)

    def read(first: int, last: int) -> QuantizedTensor:
        # weight i of the flat matrix is in column i % width of row i // width
        low, high = first * k, last * k
        rows = np.arange(low // width, -(-high // width))
        values = (numbers(rows).astype(np.float32) - zeros) * scales
        flat = values.reshape(-1)[low - low // width * width :][: high - low]
        codes = np.ascontiguousarray(flat).view(np.uint32).reshape(last - first, k, 1)
        return QuantizedTensor(by_name("f32"), (last - first, k), {"codes": codes})

    return PackedMatrix(
        w_q.file, f"{module.name}.weight", (n, k), by_name("f32"), w_q.data, read
    )
