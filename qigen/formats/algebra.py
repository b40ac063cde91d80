"""The format algebra: a quantized weight as a grid of blocks of integer fields.

A weight ``W[N, K]`` is cut along K into blocks of ``Format.block`` weights. A block is a set of
fields, each an array of unsigned integers, and stands for

    W[n, k] = S * (V(c) - Z) + M

with ``S = f32(d) * f32(sub - sub_zero) * scale_factor`` (or ``2^(e-127) * scale_factor``) and
``M = 0``, ``+f32(m)`` or ``-(f32(dmin) * f32(submin))``, all in float32 and in this order, which
makes it equal to ggml's own dequantization to the last bit. A format is a value of this module,
never a class of its own; the named ones are the rows of :mod:`qigen.formats.catalog`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, Unsupported

if TYPE_CHECKING:
    from qigen.formats.layout import Layout

Array = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]

# Field names that hold a float (f16 or f32 by width) rather than an integer.
FLOAT_FIELDS = ("d", "dmin", "m")

# Base-3 bytes (ggml TQ1_0): (first byte, bytes, digits, first weight). Digit j of byte i of a run
# is the code of weight ``first weight + j * bytes + i``.
BASE3_RUNS = ((0, 32, 5, 0), (32, 16, 5, 160), (48, 4, 4, 240))

# Weights decoded at a time by dequantize(): the temporaries stay in a level-2 cache.
_CHUNK_WEIGHTS = 1 << 17


def unsigned_dtype(bits: int) -> np.dtype[Any]:
    """The smallest unsigned numpy type that holds ``bits`` (1 to 32) bits."""
    return np.dtype(np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32)


@dataclass(frozen=True)
class Run:
    """Where bits of a field lie in the bytes of a source block.

    Bits ``[shift, shift + bits)`` of byte ``byte + i`` (``0 <= i < nbytes``) are bits
    ``[low, low + bits)`` of element ``start + i * step``.
    """

    byte: int
    nbytes: int
    shift: int
    bits: int
    start: int
    step: int
    low: int = 0


@dataclass(frozen=True)
class Field:
    """An array of ``count`` unsigned integers of ``bits`` bits in every block."""

    name: str
    bits: int
    count: int
    runs: tuple[Run, ...] = ()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of the field's array in a :class:`QuantizedTensor`."""
        return unsigned_dtype(self.bits)


@dataclass(frozen=True)
class Format:
    """A point of the format space (see the module's text for the meaning of the attributes).

    ``codes_xor`` is applied to the codes when they are read from or written to source blocks, so
    that signed source codes become unsigned ones with a zero (q8_0: 0x80 and zero 128).
    ``group`` is the number of weights that share one final scale. ``source`` names the
    specification that the row is written from.
    """

    name: str
    block: int
    group: int
    fields: tuple[Field, ...]
    zero: int = 0
    table: tuple[int, ...] | None = None
    base3: bool = False
    sub_zero: int = 0
    sub_signed: bool = False
    min_sign: int = -1
    scale_factor: float = 1.0
    float_kind: str | None = None
    ggml_type: int | None = None
    codes_xor: int = 0
    source: str = ""

    @cached_property
    def _by_name(self) -> dict[str, Field]:
        return {field.name: field for field in self.fields}

    def has(self, name: str) -> bool:
        """Whether a block has the field ``name``."""
        return name in self._by_name

    def field(self, name: str) -> Field:
        """The field ``name``; KeyError if a block has none."""
        return self._by_name[name]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, scales and minima included."""
        return sum(field.bits * field.count for field in self.fields) / self.block

    @property
    def block_bytes(self) -> int:
        """Bytes of a source block."""
        return -(-sum(field.bits * field.count for field in self.fields) // 8)

    @property
    def code_bits(self) -> int:
        """Bits of an element of the field 'codes' (base 3: of a byte of digits)."""
        return self.field("codes").bits

    @property
    def mapped_range(self) -> tuple[int, int]:
        """Smallest and largest V(c), before the zero is taken off; Unsupported for floats."""
        if self.float_kind:
            raise Unsupported("a dense float format has no integer codes; pick an integer format",
                              self.name)
        if self.table is not None:
            return min(self.table), max(self.table)
        return 0, 2 if self.base3 else (1 << self.code_bits) - 1

    @property
    def map_kind(self) -> str:
        """The value map V in words: 'float', 'table', 'ternary' or 'affine'."""
        if self.float_kind:
            return "float"
        return "table" if self.table is not None else "ternary" if self.base3 else "affine"

    @property
    def scale_kind(self) -> str:
        """The scale S in words, e.g. 'f16', 'f16 x 6 bits', 'e8m0' or 'none'."""
        if self.has("e"):
            return "e8m0"
        if not self.has("d"):
            return "none"
        kind = f"f{self.field('d').bits}"
        return f"{kind} x {self.field('sub').bits} bits" if self.has("sub") else kind

    @property
    def zero_kind(self) -> str:
        """The zero Z or the minimum R in words: 'none', 'integer', 'f16' or 'f16 x 6 bits'."""
        if self.has("m"):
            return f"f{self.field('m').bits}"
        if self.has("dmin"):
            return f"f{self.field('dmin').bits} x {self.field('submin').bits} bits"
        return "integer" if self.zero else "none"

    @cached_property
    def code_values(self) -> Float32Array:
        """float32 [2^code_bits]: V(c) - Z of every code of a table format."""
        assert self.table is not None
        values: Float32Array = np.asarray(self.table, np.float32) - np.float32(self.zero)
        return values


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight of shape ``(N, K)`` as the field arrays of its blocks.

    ``fields[name]`` is unsigned, of the field's dtype and of shape [N, nblocks, count] with
    ``nblocks = ceil(K / block)``. Only formats without a GGUF block (and dense floats) may have a
    K that is no multiple of the block; the codes past K in the last block stand for nothing.
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
            array, want = self.fields[field.name], (n, self.nblocks, field.count)
            if array.shape != want or array.dtype != field.dtype:
                raise BadInput(f"field '{field.name}' is {array.dtype}{list(array.shape)}; it must "
                               f"be {field.dtype}{list(want)}", self.format.name)

    @property
    def nblocks(self) -> int:
        """Blocks a row."""
        return -(-self.shape[1] // self.format.block)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight when stored as source blocks."""
        return self.shape[0] * self.nblocks * self.format.block_bytes

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Rows ``[start, stop)`` as a view: nothing is copied."""
        part = {name: array[start:stop] for name, array in self.fields.items()}
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
            part = {name: array[a : a + step] for name, array in self.fields.items()}
            out[a : a + step] = _decode(self.format, part)[:, :k]
        return out


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
    for field in tensor.format.fields:
        array = tensor.fields[field.name]
        if field.name in FLOAT_FIELDS or tensor.format.float_kind:
            kind = tensor.format.float_kind or f"f{field.bits}"
            mask = array.dtype.type({"f16": 0x7C00, "bf16": 0x7F80, "f32": 0x7F800000}[kind])
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


def _as_float32(array: Array) -> Float32Array:
    """The floats whose f16 or f32 bit patterns are the elements of ``array``."""
    kind = np.float16 if array.dtype == np.uint16 else np.float32
    return np.ascontiguousarray(array).view(kind).astype(np.float32)


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
    codes = fields["codes"]
    n, nblocks = codes.shape[:2]
    if fmt.float_kind:
        if fmt.float_kind == "bf16":
            codes = codes.astype(np.uint32) << np.uint32(16)
        with np.errstate(invalid="ignore"):  # a signalling NaN stays a NaN
            return _as_float32(codes).reshape(n, nblocks * fmt.block)
    if fmt.base3:
        codes = _ternary_codes(codes)
    values: Float32Array
    if fmt.table is not None:
        values = fmt.code_values[codes]
    else:
        values = np.subtract(codes, np.float32(fmt.zero), dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        values = values.reshape(n, nblocks, fmt.block // fmt.group, fmt.group)
        values *= _scales(fmt, fields)[..., None]
        if fmt.has("m"):
            values += np.float32(fmt.min_sign) * _as_float32(fields["m"])[..., None]
        elif fmt.has("dmin"):
            minima = _as_float32(fields["dmin"]) * fields["submin"].astype(np.float32)
            values += np.float32(fmt.min_sign) * minima[..., None]
    return values.reshape(n, nblocks * fmt.block)


def _scales(fmt: Format, fields: Mapping[str, Array]) -> Float32Array:
    """float32 [N, nblocks, block / group]: the final scale of every group."""
    factor = np.float32(fmt.scale_factor)
    if fmt.has("e"):
        # The factor goes in before the exponent: 2^128 * 0.5 is a float32, 2^128 is none.
        exponent = fields["e"].astype(np.int32) - np.int32(127)
        powers: Float32Array = np.ldexp(factor, exponent)
        return powers
    scale = _as_float32(fields["d"])
    if fmt.has("sub"):
        sub = fields["sub"]
        sub = sub.view(np.int8) if fmt.sub_signed else sub
        scale = scale * np.subtract(sub, np.float32(fmt.sub_zero), dtype=np.float32)
    return scale if fmt.scale_factor == 1.0 else scale * factor
