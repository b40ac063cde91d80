"""Matrices of checkpoints as codes, scales and zeros of groups, in rows of the format catalog."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import Array, Float32Array, Format
from qigen.formats.catalog import by_name
from qigen.formats.grouped import (
    Grouped,
    bits_of,
    grouped_row,
    grouped_rows,
    narrowest,
    padded,
    stored_group,
)
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends.checkpoints.raw import RawTensor
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import shown


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
        return grouped_rows(grouped, row, first, last)

    return PackedMatrix(
        codes.file, name, grouped.shape, row, codes.data, read, grouped.columns
    )


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
    row = grouped_row(g)
    if row is None:
        raise no_row(codes, method, f"{g.bits} bits in groups of {g.group}")
    return row


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
