"""The weights of a format: what a tensor holds, what it stands for, and what is wrong with it.

:class:`QuantizedTensor` has the integers of every field; its :meth:`~QuantizedTensor.dequantize`
computes the formula of :mod:`qigen.formats.algebra`, and :func:`validate` finds what no kernel may
see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput
from qigen.formats.algebra import (
    MINIFLOATS,
    SELECTED,
    Array,
    Float32Array,
    Format,
    unsigned_dtype,
)
from qigen.formats.words import ENTRY, expanded_words

if TYPE_CHECKING:
    from qigen.formats.layout import Layout

# Exponents that say NaN or infinity, by kind of float. e4m3 has one NaN and no infinity.
_NOT_FINITE = {"f16": 0x7C00, "bf16": 0x7F80, "f32": 0x7F800000, "e4m3": 0x7F, "e5m2": 0x7C}

# Base-3 bytes (ggml TQ1_0): (first byte, bytes, digits, first weight). Digit j of byte i of a run
# is the code of weight ``first weight + j * bytes + i``.
BASE3_RUNS = ((0, 32, 5, 0), (32, 16, 5, 160), (48, 4, 4, 240))

# Weights decoded at a time by dequantize(): the temporaries stay in a level-2 cache.
_CHUNK_WEIGHTS = 1 << 17


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight of shape ``(N, K)`` as the field arrays of its blocks.

    ``fields[name]`` is unsigned, of the field's dtype and of shape [N, nblocks, count] with
    ``nblocks = ceil(K / block)``; [N, 1, count] of a row field, [1, 1, count] of a tensor field.
    Only formats without a GGUF block (and dense floats) may have a K that is no multiple of the
    block; the codes past K in the last block stand for nothing.
    Raises BadInput when the arrays do not fit the format and the shape.
    """

    format: Format
    shape: tuple[int, int]
    fields: Mapping[str, Array]

    def __post_init__(self) -> None:
        n, k = self.shape
        check_columns(self.format, k)
        if set(self.fields) != {field.name for field in self.format.fields}:
            raise BadInput(f"the fields {sorted(self.fields)} are not those of the format; give "
                           f"{[field.name for field in self.format.fields]}", self.format.name)
        for field in self.format.fields:
            array, want = self.fields[field.name], field.shape(n, self.nblocks)
            if array.shape != want or array.dtype != field.dtype:
                raise BadInput(f"field '{field.name}' is {array.dtype}{list(array.shape)}; it must "
                               f"be {field.dtype}{list(want)}", self.format.name)

    @property
    def nblocks(self) -> int:
        """Blocks a row."""
        return -(-self.shape[1] // self.format.block)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight when stored as source blocks, with its row and tensor fields."""
        once = sum(math.prod(field.shape(self.shape[0], self.nblocks)) * field.bits
                   for field in self.format.fields if field.scope != "block")
        return self.shape[0] * self.nblocks * self.format.block_bytes + -(-once // 8)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Rows ``[start, stop)`` as a view: nothing is copied."""
        part = slice_rows(self.format, self.fields, start, stop)
        return QuantizedTensor(self.format, (len(part["codes"]), self.shape[1]), part)

    def pack(self, layout: Layout | None = None) -> npt.NDArray[np.uint8]:
        """uint8: the weight in an execution layout (:func:`qigen.formats.layout.pack`)."""
        from qigen.formats.layout import Layout, pack  # it stands on this module

        return pack(self, layout or Layout())

    def dequantize(self) -> Float32Array:
        """float32 [N, K]: the values that the weight stands for."""
        n, k = self.shape
        out = np.empty((n, k), np.float32)
        step = max(1, _CHUNK_WEIGHTS // max(1, self.nblocks * self.format.block))
        for a in range(0, n, step):
            part = slice_rows(self.format, self.fields, a, a + step)
            out[a : a + step] = _decode(self.format, part)[:, :k]
        return out


def slice_rows(fmt: Format, fields: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
    """The arrays of rows ``[start, stop)``; those that rows share as they are."""
    return {field.name: fields[field.name][start:stop] if field.per_row
            else fields[field.name] for field in fmt.fields}


def select_rows(fmt: Format, fields: Mapping[str, Array], rows: Array) -> dict[str, Array]:
    """The arrays of the ``rows`` of these numbers, in this order."""
    return {field.name: fields[field.name][rows] if field.per_row
            else fields[field.name] for field in fmt.fields}


def check_columns(fmt: Format, k: int) -> None:
    """Raise BadInput if a row of ``k`` weights cannot be cut into the format's blocks."""
    if k < 1:
        raise BadInput(f"a weight of K = {k} columns holds nothing; the file is damaged",
                       fmt.name)
    if fmt.ggml_type is not None and fmt.float_kind is None and k % fmt.block:
        raise BadInput(f"K = {k} is no multiple of the block of {fmt.block} weights; pad the "
                       "columns or use a group format such as u4g32", fmt.name)


def validate(tensor: QuantizedTensor, where: str) -> None:
    """Raise BadInput naming ``where`` if a scale or minimum (or a dense float) is NaN or infinite.

    An e8m0 scale of 255 is a NaN by the OCP microscaling specification.
    """
    if tensor.format.mask is not None:
        _validate_mask(tensor, where)
    if tensor.format.has("dict"):
        _validate_words(tensor, where)
    if tensor.format.has("qc"):
        columns = tensor.fields["qc"].reshape(-1).astype(np.int64)
        if (np.diff(columns) < 0).any() or columns.max(initial=0) >= tensor.shape[1]:
            raise BadInput(f"the columns apart do not ascend, or lie beyond {tensor.shape[1] - 1}; "
                           "sort them", where)
    for field in tensor.format.fields:
        array = tensor.fields[field.name]
        few = None
        if field.name == "codes" and tensor.format.single_codes:
            few = tensor.format.used
        limit = few or 1 << field.bits
        if limit < 1 << 8 * array.dtype.itemsize and array.size and int(array.max()) >= limit:
            row = int(np.argmax((array >= limit).reshape(len(array), -1).any(axis=1)))
            raise BadInput(f"row {row} has a number of {limit} or more in '{field.name}', where "
                           f"there are 0 to {limit - 1}; the file is damaged", where)
        if field.name == "oc" and array.size and int(array.max()) >= tensor.format.block:
            raise BadInput(f"an outlier's place is {int(array.max())} in a block of "
                           f"{tensor.format.block} weights; the file is damaged", where)
        small = tensor.format.minifloat if field.name == "codes" else None
        kind = tensor.format.float_kind or field.number
        if small is not None:
            kind = f"e{small.exponent}m{small.mantissa}"
        if kind in _NOT_FINITE:
            mask = array.dtype.type(_NOT_FINITE[kind])
        elif field.name == "e":
            mask = array.dtype.type(0xFF)
        else:
            continue
        step = max(1, _CHUNK_WEIGHTS // max(1, array[:1].size))
        for a in range(0, len(array), step):
            bad = (array[a : a + step] & mask) == mask
            if bad.any():
                row = a + int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
                raise BadInput(f"row {row} has a NaN or infinite "
                               f"{'weight' if field.name == 'codes' else 'scale'} ('{field.name}')"
                               "; the file is damaged, convert the model again", where)


def _validate_mask(tensor: QuantizedTensor, where: str) -> None:
    """BadInput if the places of the kept weights do not ascend within every M weights."""
    assert tensor.format.mask is not None
    keep, of = tensor.format.mask
    if tensor.format.has("bm"):
        maps = tensor.fields["bm"]
        wrong = _bits(maps, of).sum(axis=3) != keep
        if wrong.any():
            row = int(np.argmax(wrong.reshape(len(wrong), -1).any(axis=1)))
            raise BadInput(f"row {row} has bitmaps that keep other than {keep} of {of} weights; "
                           "the file is damaged", where)
        return
    if tensor.format.sharing:
        maps, rows = tensor.fields["vm"], tensor.format.sharing
        of = SELECTED
        wrong = _bits(maps, tensor.format.mask[1]).sum(axis=3) != SELECTED
        if wrong.any():
            row = int(np.argmax(wrong.reshape(len(wrong), -1).any(axis=1)))
            raise BadInput(f"row {row} selects other than {SELECTED} of {tensor.format.mask[1]} "
                           "columns; the file is damaged", where)
        differs = maps != maps[np.arange(len(maps)) // rows * rows]
        if differs.any():
            row = int(np.argmax(differs.reshape(len(differs), -1).any(axis=1)))
            raise BadInput(f"row {row} selects other columns than the first of its {rows} rows, "
                           "which share them", where)
    places = tensor.fields["ix"].reshape(len(tensor.fields["ix"]), -1, keep).astype(np.int64)
    bad: npt.NDArray[np.bool_] = np.diff(places, axis=2, append=of) <= 0
    if bad.any():
        row = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
        raise BadInput(f"row {row} has places of kept weights that do not ascend, or lie beyond "
                       f"{of - 1}; sort them", where)


def dictionary(fmt: Format, fields: Mapping[str, Array]) -> npt.NDArray[np.uint8]:
    """uint8 [words, ENTRY]: the entries of a format with a dictionary."""
    return fields["dict"].reshape(-1, ENTRY)


def _validate_words(tensor: QuantizedTensor, where: str) -> None:
    """BadInput if the dictionary has codes that the format has not, or the words of a block are not
    the codes of its weights."""
    fmt = tensor.format
    table = dictionary(fmt, tensor.fields)
    if table[0, 0]:
        raise BadInput("entry 0 of the dictionary is not the empty sequence", where)
    if table[:, 1:].max(initial=0) >= fmt.level_count:
        entry = int(np.argmax((table[:, 1:] >= fmt.level_count).any(axis=1)))
        raise BadInput(f"entry {entry} of the dictionary has a code of {fmt.level_count} or more; "
                       "the file is damaged", where)
    words = tensor.fields["codes"]
    if not words.size or int(words.max()) >= len(table):
        return  # said with the numbers of the other fields
    lengths = table[:, 0].astype(np.int64)[words].sum(axis=2)
    if (lengths != fmt.block).any():
        row = int(np.argmax((lengths != fmt.block).any(axis=1)))
        raise BadInput(f"row {row} has words for other than {fmt.block} weights in a block; the "
                       "file is damaged", where)


def as_float32(number: str, array: Array) -> Float32Array:
    """The floats of kind ``number`` whose bits are the elements of ``array``."""
    if number in MINIFLOATS:
        return MINIFLOATS[number].values(array)
    if number == "bf16":
        return np.ascontiguousarray(array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    kind = np.float16 if number == "f16" else np.float32
    return np.ascontiguousarray(array).view(kind).astype(np.float32)


def float_bits(x: Float32Array, number: str) -> Array:
    """The bits of ``x`` rounded to nearest even in f16, bf16 or f32; the inverse of
    :func:`as_float32`. A NaN stays one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if number == "f16":
        with np.errstate(over="ignore"):
            return np.asarray(bits.view(np.float32).astype(np.float16).view(np.uint16))
    if number == "bf16":
        # The low half is rounded away: add just under half, and one more where the result is odd.
        high = bits >> np.uint32(16)
        rounded = (bits + np.uint32(0x7FFF) + (high & np.uint32(1))) >> np.uint32(16)
        quiet = high | np.uint32(0x40)
        return np.asarray(np.where(np.isnan(x), quiet, rounded)).astype(np.uint16)
    return np.asarray(bits)


def _field_float32(fmt: Format, fields: Mapping[str, Array], name: str) -> Float32Array:
    """float32: the elements of a field, integers or floats."""
    number = fmt.field(name).number
    if number:
        return as_float32(number, fields[name])
    return fields[name].astype(np.float32)


def _ternary_codes(digits: Array) -> Array:
    """uint8 [..., 256]: codes 0 to 2 of the base-3 bytes [..., 52] of ggml's TQ1_0.

    A byte is the ceiling of 256/243 of its number, so that the leading digit is the integer part
    of 3/256 of the byte, and multiplying by 3 modulo 256 moves to the next digit.
    """
    out = np.empty((*digits.shape[:-1], 256), np.uint8)
    for byte, nbytes, ndigits, first in BASE3_RUNS:
        rest = digits[..., byte : byte + nbytes]
        for j in range(ndigits):
            at = first + j * nbytes
            out[..., at : at + nbytes] = (rest.astype(np.uint16) * np.uint16(3)) >> np.uint16(8)
            rest = rest * np.uint8(3)
    return out


def _decode(fmt: Format, fields: Mapping[str, Array]) -> Float32Array:
    """float32 [N, nblocks * block] of the field arrays."""
    values = _decode_base(fmt, fields)
    if fmt.rank:
        a = _field_float32(fmt, fields, "la").reshape(-1, fmt.rank)
        b = _field_float32(fmt, fields, "lb")[:, 0]
        for j in range(fmt.rank):
            values += b[:, j, None] * a[:, j]
    return values


def _decode_base(fmt: Format, fields: Mapping[str, Array]) -> Float32Array:
    """float32 [N, nblocks * block] of the field arrays, without a low-rank residual."""
    codes = fields["codes"]
    n, nblocks = codes.shape[:2]
    if fmt.float_kind:
        if fmt.float_kind == "bf16":
            codes = codes.astype(np.uint32) << np.uint32(16)
        with np.errstate(invalid="ignore"):  # a signalling NaN stays a NaN
            kind = "f16" if codes.dtype == np.uint16 else "f32"
            return as_float32(kind, codes).reshape(n, nblocks * fmt.block)
    if fmt.has("book"):
        return _decode_vectors(fmt, fields)
    if fmt.base3:
        codes = _ternary_codes(codes)
    if fmt.has("dict"):
        codes = expanded_words(codes, dictionary(fmt, fields), fmt.block, int(fmt.zero))
    if fmt.mask is not None:
        codes = expanded(fmt, codes, kept_places(fmt, fields))
    values: Float32Array
    if fmt.has("lut"):
        lut = np.broadcast_to(_field_float32(fmt, fields, "lut"),
                              (n, nblocks, fmt.field("lut").count))
        values = np.take_along_axis(lut, codes.astype(np.intp), axis=2)
    elif fmt.table is not None or fmt.values is not None:
        values = fmt.code_values[codes]
    elif fmt.minifloat is not None:
        values = fmt.minifloat.values(codes)
    else:
        values = np.subtract(codes, np.float32(fmt.zero), dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        values = values.reshape(n, nblocks, fmt.block // fmt.group, fmt.group)
        if fmt.has("z"):
            values -= _zeros(fmt, fields)[..., None]
        values *= _scales(fmt, fields)[..., None]
        if fmt.has("m"):
            values += np.float32(fmt.min_sign) * _field_float32(fmt, fields, "m")[..., None]
        elif fmt.has("dmin"):
            minima = _field_float32(fmt, fields, "dmin") * fields["submin"].astype(np.float32)
            values += np.float32(fmt.min_sign) * minima[..., None]
    values = values.reshape(n, nblocks, fmt.block)
    if fmt.has("oc"):
        rows, blocks = np.ogrid[:n, :nblocks]
        outliers = _field_float32(fmt, fields, "ov")
        for j in range(outliers.shape[2]):
            values[rows, blocks, fields["oc"][..., j]] += outliers[..., j]
    values = values.reshape(n, nblocks * fmt.block)
    if fmt.has("qc"):
        columns = _field_float32(fmt, fields, "qv")
        for j, column in enumerate(fields["qc"][0, 0].tolist()):
            values[:, column] += columns[:, 0, j]
    return values


def _decode_vectors(fmt: Format, fields: Mapping[str, Array]) -> Float32Array:
    """float32 [N, nblocks * block] of codes of vectors: the books' entries, summed in order."""
    codes = fields["codes"]
    n, nblocks = codes.shape[:2]
    books = fmt.field("codes").count * fmt.vector // fmt.block
    book = _field_float32(fmt, fields, "book").reshape(books, -1, fmt.vector)
    chosen = codes.reshape(n, nblocks, -1, books)
    values = book[0][chosen[..., 0]]
    for i in range(1, books):
        values = values + book[i][chosen[..., i]]
    values = values.reshape(n, nblocks, fmt.block)
    out: Float32Array = (values * _scales(fmt, fields)).reshape(n, nblocks * fmt.block)
    return out


def _bits(maps: Array, of: int) -> Array:
    """uint8 [..., of]: the single bits of bitmaps, the lowest first."""
    raw = np.ascontiguousarray(maps).astype(unsigned_dtype(of))[..., None].view(np.uint8)
    return np.unpackbits(raw, axis=-1, bitorder="little")


def kept_places(fmt: Format, fields: Mapping[str, Array]) -> Array:
    """uint8 [N, nblocks, kept codes]: the place of every kept weight in its M, from 'ix' or 'bm',
    or from 'ix' and 'vm'.

    A bitmap with too few bits set (of a padded block) gives places that hold no weight: M - 1.
    """
    assert fmt.mask is not None
    keep, of = fmt.mask
    if fmt.sharing:
        selected = np.argsort(_bits(fields["vm"], of) == 0, axis=3, kind="stable")[..., :SELECTED]
        among = fields["ix"].reshape(*fields["vm"].shape, keep).astype(np.int64)
        chosen = np.take_along_axis(selected, among, axis=3)
        return chosen.astype(np.uint8).reshape(fields["ix"].shape)
    if not fmt.has("bm"):
        return fields["ix"]
    bits = _bits(fields["bm"], of)
    ranks = np.where(bits, np.arange(of, dtype=np.uint8), np.uint8(of - 1))
    places = np.sort(ranks, axis=3)[..., :keep]
    return places.reshape(*fields["bm"].shape[:2], -1)


def mask_field(fmt: Format, places: Array) -> dict[str, Array]:
    """The field 'ix' or 'bm' (or 'ix' and 'vm') of the kept ``places`` [N, nblocks, kept codes] in
    their M's. BadInput if rows that share columns have more than :data:`SELECTED` among them."""
    if not (fmt.has("bm") or fmt.sharing):
        return {"ix": places.astype(np.uint8)}
    assert fmt.mask is not None
    keep, of = fmt.mask
    single = np.left_shift(np.uint64(1), places.astype(np.uint64))
    single = single.reshape(*places.shape[:2], -1, keep)
    maps = np.bitwise_or.reduce(single, axis=3)
    if fmt.has("bm"):
        return {"bm": maps.astype(fmt.field("bm").dtype)}
    n = len(maps)
    shared = np.bitwise_or.reduceat(maps, np.arange(0, n, fmt.sharing), axis=0)
    bits = _bits(shared.astype(fmt.field("vm").dtype), of)
    missing = SELECTED - bits.sum(axis=3, dtype=np.int64, keepdims=True)
    if (missing < 0).any():
        raise BadInput(f"{fmt.sharing} rows keep weights of more than {SELECTED} of {of} columns, "
                       "which they must share", fmt.name)
    # columns that no row needs fill the four up
    bits |= (bits == 0) & (np.cumsum(bits == 0, axis=3) <= missing)
    weights = np.left_shift(np.uint64(1), np.arange(of, dtype=np.uint64))
    vm = (bits * weights).sum(axis=3, dtype=np.uint64).astype(fmt.field("vm").dtype)
    rank = (np.cumsum(bits, axis=3) - 1).astype(np.uint8)
    rank, vm = (np.repeat(a, fmt.sharing, axis=0)[:n] for a in (rank, vm))
    among = np.take_along_axis(rank, places.reshape(single.shape).astype(np.int64), axis=3)
    return {"vm": vm, "ix": among.reshape(places.shape)}


def kept_weights(fmt: Format, worth: Array) -> npt.NDArray[np.bool_]:
    """bool [N, groups, M]: the weights that a mask keeps, those of the greatest ``worth`` [N,
    groups, M], not negative. Rows that share columns take those worth most to all of them."""
    assert fmt.mask is not None

    def first(a: Array, count: int) -> npt.NDArray[np.bool_]:
        order = np.argsort(-a, axis=2, kind="stable")
        return np.asarray(np.argsort(order, axis=2, kind="stable") < count)

    if fmt.sharing:
        total = np.add.reduceat(worth, np.arange(0, len(worth), fmt.sharing), axis=0)
        selected = np.repeat(first(total, SELECTED), fmt.sharing, axis=0)[: len(worth)]
        worth = np.where(selected, worth, worth.dtype.type(-1))
    return first(worth, fmt.mask[0])


def expanded(fmt: Format, codes: Array, places: Array) -> Array:
    """The codes of all weights of the blocks: the kept ones at their places, else the hole."""
    assert fmt.mask is not None
    keep, of = fmt.mask
    out = np.full((*codes.shape[:2], fmt.block), fmt.hole, codes.dtype)
    at = np.arange(codes.shape[2]) // keep * of + places.astype(np.int64)
    np.put_along_axis(out, at, codes, axis=2)
    return out


def group_values(fmt: Format, fields: Mapping[str, Array]
                 ) -> tuple[Float32Array, Float32Array, Float32Array]:
    """(scale, zero, least), each float32 [N or 1, nblocks or 1, groups of a block or 1].

    A code c stands for ``scale * (V(c) - Z - zero) + least``, with V(c) - Z of ``fmt.levels`` (or
    of the table in the field 'lut'); ``fields`` may leave the codes out.
    """
    none = np.zeros((1, 1, 1), np.float32)
    zero, least = none, none
    if fmt.has("z"):
        zero = _zeros(fmt, fields)
    if fmt.has("m"):
        least = np.float32(fmt.min_sign) * _field_float32(fmt, fields, "m")
    elif fmt.has("dmin"):
        minima = _field_float32(fmt, fields, "dmin") * fields["submin"].astype(np.float32)
        least = np.float32(fmt.min_sign) * minima
    return _scales(fmt, fields), zero, least


def _zeros(fmt: Format, fields: Mapping[str, Array]) -> Float32Array:
    """float32 [N, nblocks, groups]: the zero points that are data."""
    zero = _field_float32(fmt, fields, "z")
    if fmt.has("zd"):
        zero = (zero - _field_float32(fmt, fields, "zz")) * _field_float32(fmt, fields, "zd")
    return zero


def _scales(fmt: Format, fields: Mapping[str, Array]) -> Float32Array:
    """float32 [N, nblocks, block / group]: the final scale of every group."""
    factor = np.float32(fmt.scale_factor)
    if fmt.has("e"):
        # The factor goes in before the exponent: 2^128 * 0.5 is a float32, 2^128 is none.
        exponent = fields["e"].astype(np.int32) - np.int32(127)
        powers: Float32Array = np.ldexp(factor, exponent)
        return powers
    if not fmt.has("d"):
        return np.ones((1, 1, 1), np.float32)
    scale = _field_float32(fmt, fields, "d")
    if fmt.has("sub") and fmt.field("sub").number:
        scale = scale * _field_float32(fmt, fields, "sub")
    elif fmt.has("sub"):
        sub = fields["sub"]
        sub = sub.view(np.int8) if fmt.sub_signed else sub
        if fmt.has("subz"):
            return scale * (sub.astype(np.float32) - _field_float32(fmt, fields, "subz"))
        scale = scale * np.subtract(sub, np.float32(fmt.sub_zero), dtype=np.float32)
    return scale if fmt.scale_factor == 1.0 else scale * factor
