"""From unpacked codes, scales and zeros of groups to a row of the format catalog.

    W[n, k] = scale[n, k // group] * (code[n, k] - zero[n, k // group])

Nothing is rounded: the row is the narrowest of the catalog that holds every scale and zero exactly
(:func:`narrowest`), and a group that the catalog does not have is stored as several smaller ones of
the same scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qigen.formats.algebra import Array, Field, Float32Array, Format
from qigen.formats.catalog import GROUPS, by_name
from qigen.formats.tensor import QuantizedTensor, float_bits

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


def grouped_row(g: Grouped) -> Format | None:
    """The narrowest row that holds the matrix exactly; None if no group of the catalog fits.

    ``scales`` must have the shape that K and ``group`` ask for.
    """
    kind = "h"
    if np.all(g.zeros == 1 << (g.bits - 1)):
        kind = "s"
    elif np.all((g.zeros == np.rint(g.zeros)) & (g.zeros >= 0) & (g.zeros < 256)):
        kind = "z"
    scale = narrowest(g.scales, *([np.asarray(g.zeros, np.float32)] if kind == "h" else []))
    size = stored_group(g.group, -(-g.shape[1] // g.group))
    if size is None:
        return None
    return by_name(f"{kind}{g.bits}g{size}{'' if scale == 'f16' else f'_{scale}'}")


def grouped_rows(g: Grouped, row: Format, first: int, last: int) -> QuantizedTensor:
    """Rows ``[first, last)`` of the matrix in ``row``."""
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
    if field.number:
        return float_bits(np.asarray(numbers, np.float32), field.number)
    return np.ascontiguousarray(numbers).astype(field.dtype)


def stored_group(group: int, groups: int) -> int | str | None:
    """The group of a row for ``groups`` groups of ``group``: "channel" for one of any size.

    None if no group of the catalog divides it.
    """
    if group in GROUPS:
        return group
    if groups == 1:
        return "channel"
    return max((size for size in GROUPS if group % size == 0), default=None)


def unpack_bits(words: Array, bits: int) -> npt.NDArray[np.uint8]:
    """uint8 [..., S * W / bits]: numbers of ``bits`` bits (1 to 8) in ``words`` [..., W] of S bits.

    The words are one string of bits, the lowest first: a number of 3 bits may lie in two words.
    """
    order = words.dtype.newbyteorder("<")
    data = np.ascontiguousarray(words).astype(order, copy=False).view(np.uint8)
    if bits == 8:
        return data
    if bits in (1, 2, 4):
        out = np.empty((*data.shape, 8 // bits), np.uint8)
        for j in range(8 // bits):
            out[..., j] = data >> np.uint8(bits * j) & np.uint8((1 << bits) - 1)
        return out.reshape(*data.shape[:-1], -1)
    single = np.unpackbits(data, axis=-1, bitorder="little")
    single = single[..., : single.shape[-1] // bits * bits]
    parts = single.reshape(*data.shape[:-1], -1, bits)
    return np.packbits(parts, axis=-1, bitorder="little")[..., 0]
