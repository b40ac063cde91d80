"""From unpacked codes, scales and zeros of groups to a row of the format catalog.

    W[n, k] = scale[n, k // group] * (code[n, k] - zero[n, k // group])

Nothing is rounded: the row is the narrowest of the catalog that holds every scale and zero exactly
(:func:`narrowest`), and a group that the catalog does not have is stored as several smaller ones of
the same scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import Array, Field, Float32Array, Format, QuantizedTensor
from qigen.formats.catalog import GROUPS, by_name
from qigen.frontends.checkpoints.raw import RawTensor
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import shown

Codes = Callable[[int, int], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Grouped:
    """A matrix ``[N, K]`` as codes in groups along K.

    ``codes(a, b)`` is uint8 ``[b - a, K]``; ``scales`` float32 ``[N, ceil(K / group)]``; ``zeros``
    a number, or integers or float32 of the scales' shape. ``columns``, if there is one, says that
    column j is column ``columns[j]`` of the model's matrix.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    codes: Codes
    scales: Float32Array
    zeros: int | Array
    columns: Array | None = None


@dataclass(frozen=True, eq=False)
class PackedMatrix(SourceTensor):
    """A matrix of a quantized checkpoint: ``read(a, b)`` makes rows ``[a, b)`` of its tensors."""

    read: Callable[[int, int], QuantizedTensor] | None = None
    order: Array | None = None

    def load(self, first: int, last: int) -> QuantizedTensor:
        """Rows ``[first, last)`` in the codes of the checkpoint."""
        assert self.read is not None
        return self.read(first, last)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix in its row of the catalog."""
        n, blocks = self.shape[0], -(-self.shape[1] // self.format.block)
        bits = (math.prod(f.shape(n, blocks)) * f.bits for f in self.format.fields)
        return -(-sum(bits) // 8)

    @property
    def columns(self) -> Array | None:
        """The column of the model's matrix that each stored column is; None: they are the same."""
        return self.order


def matrix(name: str, codes: RawTensor, grouped: Grouped, method: str) -> PackedMatrix:
    """The matrix ``name`` that the tensor ``codes`` and its companions hold.

    Raises Unsupported, naming tensor and method, if the catalog has no row for it.
    """
    row = _row(codes, grouped, method)

    def read(first: int, last: int) -> QuantizedTensor:
        return _rows(grouped, row, first, last)

    return PackedMatrix(
        codes.file, name, grouped.shape, row, codes.data, read, grouped.columns
    )


def _rows(g: Grouped, row: Format, first: int, last: int) -> QuantizedTensor:
    blocks = padded(g.codes(first, last), row)
    fields: dict[str, Array] = {"codes": blocks}
    for field in row.fields[1:]:
        source = g.scales if field.name == "d" else np.broadcast_to(g.zeros, g.scales.shape)
        part = source[first:last]
        if field.scope == "block":
            # a block of several groups has as many scales
            of = np.arange(blocks.shape[1] * field.count) * row.group // g.group
            part = part[:, np.minimum(of, part.shape[1] - 1)]
            part = part.reshape(last - first, -1, field.count)
        else:
            part = part[:, :, None]
        fields[field.name] = bits_of(part, field)
    return QuantizedTensor(row, (last - first, g.shape[1]), fields)


def padded(codes: npt.NDArray[np.uint8], row: Format) -> npt.NDArray[np.uint8]:
    """uint8 [n, nblocks, block]: codes [n, K] cut into blocks, with codes 0 past K."""
    n, k = codes.shape
    blocks = np.zeros((n, -(-k // row.block) * row.block), np.uint8)
    blocks[:, :k] = codes
    return blocks.reshape(n, -1, row.block)


def narrowest(*values: Float32Array) -> str:
    """The kind of float that holds all of these numbers exactly: f16, else bf16, else f32."""
    with np.errstate(over="ignore"):
        if all(np.array_equal(x.astype(np.float16).astype(np.float32), x) for x in values):
            return "f16"
    low = np.uint32(0xFFFF)
    exact = all(not (np.ascontiguousarray(x).view(np.uint32) & low).any() for x in values)
    return "bf16" if exact else "f32"


def bits_of(numbers: Array, field: Field) -> Array:
    """The elements of a field: of a float field the bits of numbers that it holds exactly."""
    if field.number == "bf16":
        wide = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
        return np.asarray(wide >> np.uint32(16)).astype(np.uint16)
    if field.number:
        kind = {"f16": "<f2", "f32": "<f4"}[field.number]
        return np.ascontiguousarray(numbers).astype(kind).view(field.dtype)
    return np.ascontiguousarray(numbers).astype(field.dtype)


def small_floats(
    name: str, codes: RawTensor, group: int, scales: Float32Array, method: str
) -> PackedMatrix:
    """The matrix ``name.weight`` of E4M3 numbers [N, K] with float32 ``scales`` [N, G] of groups.

    Raises Unsupported, naming tensor and method, if the catalog has no row for it.
    """
    n, k = codes.shape
    stored: Array = codes.array()
    size = stored_group(group, scales.shape[1])
    if size is None or size == 16:
        raise no_row(codes, method, f"fp8 codes in groups of {group}")
    kind = narrowest(scales)
    row = by_name(f"fp8_e4m3{'' if size == 'channel' else f'g{size}'}"
                  f"{'' if kind == 'f16' else f'_{kind}'}")

    def read(first: int, last: int) -> QuantizedTensor:
        part = scales[first:last]
        blocks = padded(stored[first:last], row)
        if size != "channel":
            part = part[:, np.arange(blocks.shape[1]) * row.block // group]
        fields = {"codes": blocks, "d": bits_of(part[:, :, None], row.field("d"))}
        return QuantizedTensor(row, (last - first, k), fields)

    return PackedMatrix(codes.file, f"{name}.weight", (n, k), row, codes.data, read)


def no_row(tensor: RawTensor, method: str, what: str) -> Unsupported:
    """The error of a tensor whose kind the catalog has no row for."""
    return Unsupported(
        f"tensor '{shown(tensor.name)}' ({method}) has {what}; the format catalog has no row for "
        "that, see `qigen formats`",
        str(tensor.file),
    )


def _row(codes: RawTensor, g: Grouped, method: str) -> Format:
    groups = -(-g.shape[1] // g.group)
    if g.scales.shape != (g.shape[0], groups):
        raise codes.bad(
            f"is a matrix {list(g.shape)} in groups of {g.group}, but its scales are "
            f"{list(g.scales.shape)}, expected {[g.shape[0], groups]}"
        )
    kind, scale = "h", "f16"
    if np.all(g.zeros == 1 << (g.bits - 1)):
        kind = "s"
    elif np.all((g.zeros == np.rint(g.zeros)) & (g.zeros >= 0) & (g.zeros < 256)):
        kind = "z"
    scale = narrowest(g.scales, *([np.asarray(g.zeros, np.float32)] if kind == "h" else []))
    size = stored_group(g.group, groups)
    if size is None:
        raise no_row(codes, method, f"{g.bits} bits in groups of {g.group}")
    return by_name(f"{kind}{g.bits}g{size}{'' if scale == 'f16' else f'_{scale}'}")


def stored_group(group: int, groups: int) -> int | str | None:
    """The group of a row for ``groups`` groups of ``group``: "channel" for one of any size.

    None if no group of the catalog divides it.
    """
    if group in GROUPS:
        return group
    if groups == 1:
        return "channel"
    return max((size for size in GROUPS if group % size == 0), default=None)


def group_of(setting: int, k: int, where: str) -> int:
    """The weights of a group: ``setting``, where -1 means a whole row of ``k``."""
    if setting == -1:
        return k
    if setting < 1:
        raise BadInput(f"groups of {setting} weights cannot be; expected -1 or more than 0", where)
    return setting


def ordered(codes: RawTensor, g_idx: RawTensor, k: int, group: int) -> Array | None:
    """The order of columns that makes the groups of ``g_idx`` contiguous; None if they are.

    ``g_idx[k]`` is the group of column k. Raises BadInput for indices out of range, and for groups
    that have other than ``group`` columns (the last may have fewer).
    """
    index = g_idx.expect((k,), "I32", "I64").array()
    groups = -(-k // group)
    if index.min() < 0 or index.max() >= groups:
        at = int(np.argmax((index < 0) | (index >= groups)))
        raise g_idx.bad(
            f"puts column {at} in group {int(index[at])}, but there are {groups} groups of {group}"
        )
    order = np.argsort(index, kind="stable")
    if not np.array_equal(index[order], np.arange(k) // group):
        sizes = np.bincount(index, minlength=groups)
        wrong = int(np.argmax(sizes != np.minimum(group, k - group * np.arange(groups))))
        raise g_idx.bad(
            f"gives group {wrong} {int(sizes[wrong])} columns; groups of "
            f"'{shown(codes.name)}' have {group}"
        )
    return None if np.array_equal(order, np.arange(k)) else order
