"""From unpacked codes, scales and zeros of groups to a row of the format catalog.

    W[n, k] = scale[n, k // group] * (code[n, k] - zero[n, k // group])

Nothing is rounded: the row is the narrowest of the catalog that holds every scale and zero exactly,
and a group that the catalog does not have is stored as several smaller ones of the same scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import Array, Float32Array, Format, QuantizedTensor, is_float_field
from qigen.formats.catalog import CATALOG
from qigen.frontends.checkpoints.raw import RawTensor
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import shown

Codes = Callable[[int, int], npt.NDArray[np.uint8]]

_GROUPS = (128, 64, 32)


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
    k, block = g.shape[1], row.block
    nblocks = -(-k // block)
    codes = np.zeros((last - first, nblocks * block), np.uint8)
    codes[:, :k] = g.codes(first, last)
    of = np.arange(nblocks) * block // g.group  # the group that a stored block belongs to
    fields: dict[str, Array] = {"codes": codes.reshape(last - first, nblocks, block)}
    for field in row.fields[1:]:
        source = g.scales if field.name == "d" else np.broadcast_to(g.zeros, g.scales.shape)
        part = source[first:last][:, of, None]
        if is_float_field(field):
            part = part.astype(f"<f{field.bits // 8}").view(field.dtype)
        fields[field.name] = np.ascontiguousarray(part.astype(field.dtype, copy=False))
    return QuantizedTensor(row, (last - first, k), fields)


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
    middle, wide = 1 << (g.bits - 1), not _fits_f16(g.scales)
    if np.all(g.zeros == middle):
        kind = "s"
    elif np.all((g.zeros == np.rint(g.zeros)) & (g.zeros >= 0) & (g.zeros < 256)):
        kind = "z"
    else:
        kind = "zf"
        wide = wide or not _fits_f16(np.asarray(g.zeros, np.float32))
    for size in sorted(_GROUPS, key=lambda size: (size != g.group, -size)):
        row = CATALOG.get(f"{kind}{g.bits}g{size}{'_f32' if wide else ''}")
        if row is not None and (groups == 1 or g.group % size == 0):
            return row
    raise no_row(codes, method, f"{g.bits} bits in groups of {g.group}")


def _fits_f16(values: Float32Array) -> bool:
    """Whether every number is a float16."""
    with np.errstate(over="ignore"):
        return bool(np.all(values.astype(np.float16).astype(np.float32) == values))


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
