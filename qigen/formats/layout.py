"""The execution layout: packed weights in the order in which the kernels read them.

Rows are cut into row-blocks of ``Layout.rows`` lanes (N is padded with zero rows) and each row
into K-blocks of ``Layout.blocks`` source blocks (padded with zero blocks). The packed bytes are:
for each row-block, each K-block, each field (in the order of ``Format.fields``), each source block
of the K-block, each plane of the field: its words. A word is stored for all lanes side by side,
``[word][lane]``, so that a vector load reads one word of every row.

* A field of b bits is cut in *planes*, descending powers of two from the low bits: 5 = 4 + 1.
* *dot order* ('codes' of up to 8 bits, if they are of single weights and no bitmap picks them, and
  the places 'ix' of kept weights, if :attr:`~qigen.formats.algebra.Format.dot_places`): a
  plane of width p takes 32-bit words; element e is in word e // (32/p), byte e % 4, at bit
  p * (e % (32/p) // 4): step t of a dot product (elements 4t to 4t + 3) is the four bytes of one
  word, shifted by p * t.
* A field that rows share (``Field.rows``) is stored once for all lanes, in lane order.
* *lane order* (every other field): the elements of a row form a little-endian string of p-bit
  numbers, cut in 32-bit words, or in a single word of 8 or 16 bits if that holds them all. A float
  is a word of its own.

A format with fields of scope 'tensor' begins with them (each from a multiple of 64 bytes, its words
in order, for all rows together), then come those of scope 'column', block by block for all
K-blocks, padded with zeros; the fields of scope 'row' stand before the first K-block of every
row-block, in lane order, padded to a multiple of 64 bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import Array, Field, Format, unsigned_dtype
from qigen.formats.tensor import QuantizedTensor, slice_rows

# Packed bytes handled at a time: few enough for the caches, enough to hide what a numpy call costs.
_CHUNK_BYTES = 1 << 19

if sys.byteorder != "little":
    raise ImportError("qigen packs through little-endian views; this machine is big-endian")


@dataclass(frozen=True)
class Layout:
    """``rows`` lanes (a multiple of 4) a row-block and ``blocks`` source blocks a K-block."""

    rows: int = 16
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.rows < 4 or self.rows % 4 or self.blocks < 1:
            raise Unsupported(f"a layout of {self.rows} rows and {self.blocks} blocks cannot be "
                              "packed; take a multiple of 4 rows and at least 1 block")


@dataclass(frozen=True)
class Plane:
    """Bits ``[low, low + bits)`` of every element of a field, as ``words`` words a row."""

    field: Field
    index: int
    bits: int
    low: int
    words: int
    word_bits: int
    dot_order: bool

    @property
    def is_memory(self) -> bool:
        """Whether the words of a row are the field's array as it lies in little-endian memory."""
        return (self.bits == 8 * self.field.dtype.itemsize
                and self.bits * self.field.count == self.words * self.word_bits)

    def nbytes(self, layout: Layout) -> int:
        """Bytes of the plane for one source block and all lanes."""
        return self.words * self.word_bits // 8 * self.lanes(layout)

    def lanes(self, layout: Layout) -> int:
        """How often a word is stored: once a row, or once for rows that share it."""
        return 1 if self.field.rows > 1 else layout.rows


def planes(bits: int) -> tuple[int, ...]:
    """The widths of the planes of ``bits``: descending powers of two, low bits first."""
    return tuple(1 << i for i in reversed(range(bits.bit_length())) if bits >> i & 1)


def field_planes(fmt: Format, field: Field) -> tuple[Plane, ...]:
    """The planes of a field of ``fmt``; Unsupported if codes do not fill whole words."""
    dot = (field.name == "codes" and fmt.dot_order) or (field.name == "ix" and fmt.dot_places)
    out, low = [], 0
    for index, p in enumerate(planes(field.bits)):
        total = p * field.count
        if dot and total % 32:
            raise Unsupported(f"{field.count} codes of {p} bits do not fill 32-bit words",
                              fmt.name)
        word_bits = 32 if dot or total > 16 else 16 if total > 8 else 8
        if field.number and field.name != "codes":
            word_bits = p
        out.append(Plane(field, index, p, low, -(-total // word_bits), word_bits, dot))
        low += p
    return tuple(out)


def _places(fmt: Format, layout: Layout) -> Iterator[tuple[Plane, int, int]]:
    """(plane, its byte offset for source block 0, bytes from one source block to the next)."""
    offset = 0
    for field in fmt.block_fields:
        parts = field_planes(fmt, field)
        stride = sum(plane.nbytes(layout) for plane in parts)
        inside = offset
        for plane in parts:
            yield plane, inside, stride
            inside += plane.nbytes(layout)
        offset += stride * layout.blocks


def _row_places(fmt: Format, layout: Layout) -> Iterator[tuple[Plane, int]]:
    """(plane of a row field, its byte offset in a row-block)."""
    offset = 0
    for field in fmt.fields:
        for plane in field_planes(fmt, field) if field.scope == "row" else ():
            yield plane, offset
            offset += plane.nbytes(layout)


def _column_places(fmt: Format, kblocks: int, layout: Layout) -> Iterator[tuple[str, int, int]]:
    """(column field, its byte offset in the shared part, its bytes)."""
    at = shared_offsets(fmt)[1]
    for field in fmt.fields:
        if field.scope == "column":
            size = kblocks * layout.blocks * field.count * field.dtype.itemsize
            yield field.name, at, size
            at += size


def _line(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def kblock_bytes(fmt: Format, layout: Layout) -> int:
    """Bytes of one K-block of one row-block."""
    return layout.blocks * sum(plane.nbytes(layout) for field in fmt.block_fields
                               for plane in field_planes(fmt, field))


def head_bytes(fmt: Format, layout: Layout) -> int:
    """Bytes of the row fields at the start of a row-block."""
    return _line(sum(plane.nbytes(layout) for plane, _ in _row_places(fmt, layout)))


def shared_offsets(fmt: Format) -> tuple[dict[str, int], int]:
    """(byte offset of every tensor field, bytes of all) at the start of a packed weight."""
    offsets, at = {}, 0
    for field in fmt.fields:
        if field.scope == "tensor":
            offsets[field.name] = at
            at += _line(field.count * field.dtype.itemsize)
    return offsets, at


def factor_bytes(fmt: Format, layout: Layout) -> int:
    """Bytes of the column fields for each K-block, at the start of a packed weight."""
    return layout.blocks * sum(field.count * field.dtype.itemsize for field in fmt.fields
                               if field.scope == "column")


def shared_bytes(fmt: Format, k: int, layout: Layout) -> int:
    """Bytes of the tensor and column fields at the start of a packed weight of ``k`` columns."""
    kblocks = packed_shape(fmt, (1, k), layout)[1]
    return shared_offsets(fmt)[1] + kblocks * factor_bytes(fmt, layout)


def row_offsets(fmt: Format, layout: Layout) -> dict[tuple[str, int], int]:
    """Byte offset in a row-block of (row field name, plane index)."""
    return {(plane.field.name, plane.index): at for plane, at in _row_places(fmt, layout)}


def field_offsets(fmt: Format, layout: Layout) -> dict[tuple[str, int, int], int]:
    """Byte offset inside a K-block of (field name, source block in the K-block, plane index)."""
    return {(plane.field.name, block, plane.index): offset + block * stride
            for plane, offset, stride in _places(fmt, layout)
            for block in range(layout.blocks)}


def packed_shape(fmt: Format, shape: tuple[int, int], layout: Layout) -> tuple[int, int, int]:
    """(row-blocks, K-blocks, bytes a K-block) of a packed weight of ``shape`` = (N, K)."""
    nblocks = -(-shape[1] // fmt.block)
    return (-(-shape[0] // layout.rows), -(-nblocks // layout.blocks),
            kblock_bytes(fmt, layout))


def row_block_bytes(fmt: Format, k: int, layout: Layout) -> int:
    """Bytes of a row-block of ``k`` columns, row fields included."""
    _, kblocks, size = packed_shape(fmt, (1, k), layout)
    return head_bytes(fmt, layout) + kblocks * size


def packed_bytes(fmt: Format, shape: tuple[int, int], layout: Layout) -> int:
    """Bytes of a packed weight of ``shape`` = (N, K)."""
    rows = packed_shape(fmt, shape, layout)[0]
    return shared_bytes(fmt, shape[1], layout) + rows * row_block_bytes(fmt, shape[1], layout)


def _views(fmt: Format, shape: tuple[int, int], layout: Layout,
           packed: Array) -> tuple[Array, Array, Array]:
    """Views of the tensor and column fields [bytes], the row fields [row-block, bytes] and the
    K-blocks [row-block, K-block, bytes]."""
    dims = packed_shape(fmt, shape, layout)
    head, start = head_bytes(fmt, layout), shared_bytes(fmt, shape[1], layout)
    rows = packed[start:].reshape(dims[0], head + dims[1] * dims[2])
    size = rows.strides[0]
    kblocks: Array = np.ndarray(dims, np.uint8, packed, start + head, (size, dims[2], 1))
    return packed[:start], rows[:, :head], kblocks


def pack(tensor: QuantizedTensor, layout: Layout) -> npt.NDArray[np.uint8]:
    """uint8 [packed_bytes]: the weight in the execution layout."""
    fmt = tensor.format
    dims = packed_shape(fmt, tensor.shape, layout)
    packed = np.zeros(packed_bytes(fmt, tensor.shape, layout), np.uint8)
    shared, heads, out = _views(fmt, tensor.shape, layout, packed)
    for name, at in shared_offsets(fmt)[0].items():
        raw = np.ascontiguousarray(tensor.fields[name]).reshape(-1).view(np.uint8)
        shared[at : at + raw.size] = raw
    for name, at, size in _column_places(fmt, dims[1], layout):
        padded = _pad(tensor.fields[name], 1, dims[1] * layout.blocks)
        shared[at : at + size] = padded.reshape(-1).view(np.uint8)
    for plane, at in _row_places(fmt, layout):
        array = _pad(tensor.fields[plane.field.name], dims[0] * layout.rows, 1)
        _row_lanes(plane, heads, layout, at)[...] = _row_words(_to_words(plane, array), layout)
    rows = layout.rows * max(1, _CHUNK_BYTES // max(1, dims[1] * dims[2]))
    for a in range(0, tensor.shape[0], rows):
        part = slice_rows(fmt, tensor.fields, a, a + rows)
        target = out[a // layout.rows : (a + rows) // layout.rows]
        for field in fmt.block_fields:
            part[field.name] = _pad(part[field.name], len(target) * layout.rows,
                                    dims[1] * layout.blocks)
            if field.rows > 1:
                _check_sharing(fmt, field, part[field.name], min(rows, tensor.shape[0] - a), layout)
        for plane, offset, stride in _places(fmt, layout):
            words = _by_row(_to_words(plane, part[plane.field.name]), layout)
            lanes = _lanes(plane, target, layout, offset, stride)
            lanes[...] = words[..., : plane.lanes(layout)]
    return packed


def unpack(fmt: Format, shape: tuple[int, int], layout: Layout,
           packed: npt.NDArray[np.uint8]) -> QuantizedTensor:
    """The exact inverse of :func:`pack`; BadInput if the size does not fit the shape."""
    dims = packed_shape(fmt, shape, layout)
    size = packed_bytes(fmt, shape, layout)
    if packed.dtype != np.uint8 or packed.size != size:
        raise BadInput(f"a packed {shape[0]}x{shape[1]} weight takes {size} "
                       f"bytes but {packed.size} of type {packed.dtype} are here; pack it again",
                       fmt.name)
    n, nblocks = shape[0], -(-shape[1] // fmt.block)
    shared, heads, source = _views(fmt, shape, layout, np.ascontiguousarray(packed).reshape(-1))
    fields = {field.name: np.zeros(field.shape(n, nblocks), field.dtype)
              for field in fmt.fields}
    for name, at in shared_offsets(fmt)[0].items():
        raw = shared[at : at + fields[name].nbytes]
        fields[name][...] = raw.copy().view(fields[name].dtype).reshape(fields[name].shape)
    for name, at, _ in _column_places(fmt, dims[1], layout):
        raw = shared[at : at + fields[name].nbytes]
        fields[name][...] = raw.copy().view(fields[name].dtype).reshape(fields[name].shape)
    for plane, at in _row_places(fmt, layout):
        lanes = _row_lanes(plane, heads, layout, at)
        words = np.empty((dims[0] * layout.rows, 1, plane.words), lanes.dtype)
        _row_words(words, layout)[...] = lanes
        full_rows = np.zeros((dims[0] * layout.rows, 1, plane.field.count), plane.field.dtype)
        _from_words(plane, words, full_rows)
        fields[plane.field.name] |= full_rows[:n]
    rows = layout.rows * max(1, _CHUNK_BYTES // max(1, dims[1] * dims[2]))
    for a in range(0, n, rows):
        part = source[a // layout.rows : (a + rows) // layout.rows]
        full = {field.name: np.zeros((len(part) * layout.rows, dims[1] * layout.blocks,
                                      field.count), field.dtype) for field in fmt.block_fields}
        for plane, offset, stride in _places(fmt, layout):
            lanes = _lanes(plane, part, layout, offset, stride)
            shape_rows = (len(part) * layout.rows, dims[1] * layout.blocks, plane.words)
            words = np.empty(shape_rows, lanes.dtype)
            _by_row(words, layout)[...] = lanes
            _from_words(plane, words, full[plane.field.name])
        for name, array in full.items():
            fields[name][a : a + rows] = array[: n - a, :nblocks]
    return QuantizedTensor(fmt, shape, fields)


def _check_sharing(fmt: Format, field: Field, array: Array, n: int, layout: Layout) -> None:
    """BadInput if the ``n`` rows of ``array`` differ within row-blocks that store them once."""
    first = np.arange(n) // layout.rows * layout.rows
    if field.rows % layout.rows or not np.array_equal(array[:n], array[first]):
        raise BadInput(f"rows of a block of {layout.rows} differ in '{field.name}', which "
                       f"{field.rows} rows share; pack whole blocks of them", fmt.name)


def _row_lanes(plane: Plane, heads: Array, layout: Layout, offset: int) -> Array:
    """View the words of a row field in ``heads`` [row-block, bytes] as [row-block, word, lane]."""
    part = heads[:, offset : offset + plane.nbytes(layout)]
    lanes: Array = part.view(unsigned_dtype(plane.word_bits)).reshape(
        len(heads), plane.words, layout.rows)
    assert np.shares_memory(lanes, heads) or not heads.size, "a view"
    return lanes


def _row_words(words: Array, layout: Layout) -> Array:
    """View [rows, 1, words] as [row-block, word, lane]."""
    view: Array = words.reshape(-1, layout.rows, words.shape[2]).transpose(0, 2, 1)
    return view


def _pad(array: Array, rows: int, blocks: int) -> Array:
    """``array`` [n, nblocks, count], contiguous and with zeros up to ``rows`` and ``blocks``."""
    if array.shape[:2] == (rows, blocks):
        return np.ascontiguousarray(array)
    out = np.zeros((rows, blocks, array.shape[2]), array.dtype)
    out[: array.shape[0], : array.shape[1]] = array
    return out


def _by_row(words: Array, layout: Layout) -> Array:
    """View [rows, blocks, words] as [row-block, K-block, source block, word, lane]."""
    n, blocks, count = words.shape
    view: Array = words.reshape(n // layout.rows, layout.rows, blocks // layout.blocks,
                                layout.blocks, count)
    lanes_last: Array = view.transpose(0, 2, 3, 4, 1)
    return lanes_last


def _lanes(plane: Plane, packed: Array, layout: Layout, offset: int, stride: int) -> Array:
    """View the plane's words in ``packed`` [row-block, K-block, byte] in the order of _by_row."""
    dtype = unsigned_dtype(plane.word_bits)
    n, kblocks = packed.shape[:2]
    count = plane.lanes(layout)
    strides = (*packed.strides[:2], stride, count * dtype.itemsize, dtype.itemsize)
    first = packed[:, :, offset : offset + dtype.itemsize].view(dtype)
    lanes: Array = np.lib.stride_tricks.as_strided(
        first, (n, kblocks, layout.blocks, plane.words, count), strides)
    return lanes


def _repeated(bits: int) -> np.uint32:
    """A mask of the ``bits`` low bits of every byte of a word."""
    mask: np.uint32 = np.uint32(((1 << bits) - 1) * 0x01010101)
    return mask


def _to_words(plane: Plane, array: Array) -> Array:
    """The words [rows, blocks, words] of a plane of ``array`` [rows, blocks, count]."""
    dtype = unsigned_dtype(plane.word_bits)
    whole = plane.field.bits == plane.bits
    if plane.is_memory:
        return array.view(dtype)
    if plane.dot_order:
        steps = array.view(np.uint32).reshape(*array.shape[:2], plane.words, 8 // plane.bits)
        out: Array | None = None
        for t in range(steps.shape[3]):
            part: Array = steps[..., t]
            if not whole:
                part = part >> np.uint32(plane.low) if plane.low else part
                part = part & _repeated(plane.bits)
            if t:
                part = part << np.uint32(plane.bits * t)
            out = part if out is None else np.bitwise_or(out, part, out=part)
        assert out is not None
        return out
    words = np.zeros((*array.shape[:2], plane.words), dtype)
    per_word = plane.word_bits // plane.bits
    mask = array.dtype.type((1 << plane.bits) - 1)
    for e in range(plane.field.count):
        element = (array[..., e] >> array.dtype.type(plane.low)) & mask
        words[..., e // per_word] |= element.astype(dtype) << dtype.type(plane.bits
                                                                         * (e % per_word))
    return words


def _from_words(plane: Plane, words: Array, array: Array) -> None:
    """Or the plane's ``words`` [rows, blocks, words] into ``array`` [rows, blocks, count]."""
    if plane.is_memory:
        array[...] = words.view(array.dtype)
        return
    if plane.dot_order:
        steps = array.view(np.uint32).reshape(*array.shape[:2], plane.words, 8 // plane.bits)
        mask = _repeated(plane.bits)
        for t in range(steps.shape[3]):
            part = (words >> np.uint32(plane.bits * t)) & mask
            steps[..., t] |= part << np.uint32(plane.low)
        return
    per_word = plane.word_bits // plane.bits
    kind: Any = words.dtype.type
    mask = kind((1 << plane.bits) - 1)
    for e in range(plane.field.count):
        part = (words[..., e // per_word] >> kind(plane.bits * (e % per_word))) & mask
        array[..., e] |= part.astype(array.dtype) << array.dtype.type(plane.low)
