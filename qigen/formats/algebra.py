"""The format algebra: a quantized weight as a grid of blocks of integer fields.

A weight ``W[N, K]`` is cut along K into blocks of ``Format.block`` weights. A block is a set of
fields, each an array of unsigned integers, and stands for

    W[n, k] = S * (V(c) - Z) + M

with ``S = f32(d) * f32(sub - sub_zero) * scale_factor`` (or ``2^(e-127) * scale_factor``) and
``M = 0``, ``+f32(m)`` or ``-(f32(dmin) * f32(submin))``, all in float32 and in this order, which
makes it equal to ggml's own dequantization to the last bit. A zero point of the group (field 'z',
an integer or a float) is taken off V(c) before S is applied. V(c) is the code itself, an entry of a
table of integers or floats, a small float, or an entry of a table that is data (field 'lut').
Fields of scope 'row' are stored once a row, those of scope 'tensor' once a weight. A codebook
(field 'book') has vectors of ``vector`` weights: their sum over the books, times S, are the
weights.
A dictionary (tensor field 'dict') has runs of codes of various lengths: the codes of a block are
those of its words, the elements of 'codes', one after the other (:mod:`qigen.formats.words`).
A mask N:M keeps N of every M weights, whose places are in the field 'ix' (or set bits of 'bm', one
of M bits for every M weights); the others are zero. Of a mask V:N:M, V rows share four of every M
columns (field 'vm', a bit for each of the M), and 'ix' are places among these four.
Outliers (fields 'oc' and 'ov') add ov[j] to the weight oc[j] of the block; columns apart (tensor
field 'qc', ascending, and row field 'qv') add qv[j] to the weight qc[j] of the row. A residual of
low rank adds the product of two factors, sum_j lb[n, j] la[k, j]: 'lb' is a row field, 'la' one of
scope 'column', [rank] for every weight of a block, which all rows share. A format is a
value of this module, never a class of its own; the named ones are the rows of
:mod:`qigen.formats.catalog`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qigen.errors import Unsupported

if TYPE_CHECKING:
    pass

Array = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]

# Field names that hold a float (f16 or f32 by width if the field has no kind) and not an integer.
FLOAT_FIELDS = ("d", "dmin", "m", "lut", "ov", "qv", "book", "subz", "zd", "zz", "la", "lb")

SELECTED = 4
"""Columns of every M that rows share in a mask V:N:M (VENOM: what 2:4 instructions take)."""

SHARING_ROWS = 16
"""Rows at least that share a field: a row-block of the execution layout has it once."""


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
class Minifloat:
    """A float of one sign bit, ``exponent`` and ``mantissa`` bits, with subnormals.

    Every code is a number as it stands (OCP e2m1, e2m3, e3m2), but for the largest magnitude of
    e4m3 and the largest exponent of e5m2, which weights may not have (see :func:`validate`).
    """

    exponent: int
    mantissa: int

    @property
    def bits(self) -> int:
        """Bits of a code, its sign included."""
        return 1 + self.exponent + self.mantissa

    @property
    def factor(self) -> float:
        """What the float32 with the same exponent and mantissa fields is multiplied by."""
        return 2.0 ** (127 - ((1 << (self.exponent - 1)) - 1))

    @property
    def top(self) -> float:
        """The largest finite magnitude."""
        name = f"e{self.exponent}m{self.mantissa}"
        last = (1 << (self.bits - 1)) - 1
        last = {"e4m3": 0x7E, "e5m2": 0x7B}.get(name, last)
        return float(self.values(np.array([last], np.uint8))[0])

    @property
    def step(self) -> float:
        """The least positive number, which every number is a multiple of."""
        return float(self.values(np.array([1], np.uint8))[0])

    def values(self, codes: Array) -> Float32Array:
        """float32: the numbers that ``codes`` stand for (NaN or infinity as any other)."""
        bits = codes.astype(np.uint32)
        low = np.uint32((1 << (self.bits - 1)) - 1)
        magnitude = ((bits & low) << np.uint32(23 - self.mantissa)).view(np.float32)
        sign = (bits >> np.uint32(self.bits - 1)) << np.uint32(31)
        values: Float32Array = magnitude * np.float32(self.factor)
        signed: Float32Array = (values.view(np.uint32) | sign).view(np.float32)
        return signed


MINIFLOATS = {f"e{e}m{m}": Minifloat(e, m) for e, m in
              ((2, 1), (2, 2), (3, 1), (2, 3), (3, 2), (4, 3), (5, 2))}
"""The small floats by name."""


@dataclass(frozen=True)
class Field:
    """An array of ``count`` unsigned integers of ``bits`` bits in every block (row, or weight).

    ``kind`` says that the integers are the bits of floats: 'f16', 'bf16', 'f32' or a minifloat.
    ``scope`` is 'block', 'row', 'tensor', or 'column': in every block, but the same for all rows.
    ``rows``: so many rows, a multiple of 16, have the same elements, each in its own array.
    """

    name: str
    bits: int
    count: int
    runs: tuple[Run, ...] = ()
    kind: str = ""
    scope: str = "block"
    rows: int = 1

    @property
    def number(self) -> str:
        """The kind of float that the elements are, '' for integers."""
        return self.kind or (f"f{self.bits}" if self.name in FLOAT_FIELDS else "")

    def shape(self, n: int, nblocks: int) -> tuple[int, int, int]:
        """The shape of the field's array in a weight of ``n`` rows of ``nblocks`` blocks."""
        return (n if self.per_row else 1, nblocks if self.scope in ("block", "column") else 1,
                self.count)

    @property
    def per_row(self) -> bool:
        """Whether every row of a weight has its own elements."""
        return self.scope in ("block", "row")

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of the field's array in a :class:`QuantizedTensor`."""
        return unsigned_dtype(self.bits)


@dataclass(frozen=True)
class Format:
    """A point of the format space (see the module's text for the meaning of the attributes).

    ``codes_xor`` is applied to the codes when they are read from or written to source blocks, so
    that signed source codes become unsigned ones with a zero (q8_0: 0x80 and zero 128).
    ``group`` is the number of weights that share one final scale, at most a block (a scale of
    scope 'row' is shared by all weights of the row: :attr:`channel`). ``table`` are integers,
    ``values`` floats; only the first ``used`` codes are given to weights. A ``zero`` with a
    fraction (bipolar codes) becomes a part of the minimum in integer kernels. ``source`` names the
    specification that the row is written from.
    """

    name: str
    block: int
    group: int
    fields: tuple[Field, ...]
    zero: float = 0
    table: tuple[int, ...] | None = None
    values: tuple[float, ...] | None = None
    minifloat: Minifloat | None = None
    base3: bool = False
    used: int | None = None
    vector: int = 0
    mask: tuple[int, int] | None = None
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
        """Stored bits a weight of blocks, scales and minima included; what is stored once a row or
        a weight depends on the shape and is left out."""
        return sum(field.bits * field.count / (SHARING_ROWS if field.rows > 1 else 1)
                   for field in self.block_fields) / self.block

    @property
    def sharing(self) -> int:
        """Rows that share the columns of a mask V:N:M, else 0."""
        return self.field("vm").rows if self.has("vm") else 0

    @cached_property
    def block_fields(self) -> tuple[Field, ...]:
        """The fields of every block."""
        return tuple(field for field in self.fields if field.scope == "block")

    @property
    def rank(self) -> int:
        """The rank of the low-rank residual; 0 if there is none."""
        return self.field("lb").count if self.has("lb") else 0

    @property
    def channel(self) -> bool:
        """Whether a whole row shares its scale."""
        return (self.has("d") and self.field("d").scope == "row"
                and not self.has("sub") and not self.has("e"))

    @property
    def single_codes(self) -> bool:
        """Whether every weight has a code of its own: neither vectors nor words of a dictionary."""
        return not (self.vector or self.has("dict"))

    @property
    def dot_order(self) -> bool:
        """Whether codes lie in dot order (:mod:`qigen.formats.layout`)."""
        return self.code_bits <= 8 and self.single_codes and not self.has("bm")

    @cached_property
    def dot_places(self) -> bool:
        """Whether the places of kept weights lie in dot order beside their codes: those of 4 codes
        lie within 16 weights, none of whose steps is of two groups of 32, and fill whole words."""
        if self.mask is None or not self.has("ix") or self.has("vm") or not self.dot_order:
            return False
        (keep, of), places = self.mask, self.field("ix")
        span = max(of * ((e + 3) // keep - e // keep + 1) for e in range(0, 4 * keep, 4))
        whole = all(places.count * p % 32 == 0 for p in (1, 2, 4) if places.bits & p)
        return span <= 16 and whole and 32 * keep // of % 4 == 0

    @property
    def sparsity(self) -> str:
        """Mask and residual in words: '2:4', '3 outliers of 256', or ''."""
        words = [f"{self.mask[0]}:{self.mask[1]}"] if self.mask else []
        if self.has("bm"):
            words = [f"{words[0]} by bitmap"]
        if self.sharing:
            words = [f"{self.sharing}:{words[0]}"]
        if self.has("oc"):
            words.append(f"{self.field('oc').count} outliers of {self.block}")
        if self.has("qc"):
            words.append(f"{self.field('qc').count} columns")
        if self.rank:
            words.append(f"rank {self.rank}")
        return ", ".join(words)

    @property
    def integer(self) -> bool:
        """Whether the values of the codes are integers of a byte times a constant
        (:attr:`byte_step`), so that integer kernels exist."""
        if self.minifloat is not None:
            return self.byte_table is not None
        return not (self.float_kind or self.values or self.has("lut") or self.has("book"))

    @cached_property
    def byte_table(self) -> tuple[int, ...] | None:
        """The integers of a byte that integer kernels look up for codes; None if the codes are
        such integers themselves, or stand for others. V(c) is ``byte_step`` times the entry.

        Small floats are multiples of their least one: e2m3 has up to 60 of them, e3m2 448.
        """
        small = self.minifloat
        if small is None or small.bits > 6:
            return self.table
        entries = small.values(np.arange(1 << small.bits)) / np.float32(small.step)
        return tuple(int(v) for v in entries) if np.abs(entries).max() <= 127 else None

    @property
    def byte_step(self) -> float:
        """What the integers of integer kernels are multiplied by to give V(c)."""
        return self.minifloat.step if self.minifloat is not None else 1.0

    @property
    def level_count(self) -> int:
        """How many values a code may have."""
        return self.used or (3 if self.base3 else 1 << self.code_bits)

    @property
    def words(self) -> int:
        """Words of a block of a format with a dictionary, else 0."""
        return self.field("codes").count if self.has("dict") else 0

    @cached_property
    def hole(self) -> int:
        """The code whose value is zero, which stands where a mask keeps nothing; Unsupported if
        there is none."""
        zeros = np.flatnonzero(self.levels == 0)
        if not len(zeros) or self.has("m") or self.has("z") or self.has("dmin") or self.has("lut"):
            raise Unsupported("no code of this format always stands for zero: a mask needs a "
                              "symmetric format or a table with a zero", self.name)
        return int(zeros[0])

    @cached_property
    def levels(self) -> Float32Array:
        """float32 [level_count]: V(c) - Z of every code, tables of 'lut' apart."""
        codes = np.arange(self.level_count)
        if self.minifloat is not None:
            return self.minifloat.values(codes)
        if self.table is not None or self.values is not None:
            return self.code_values
        levels: Float32Array = np.subtract(codes, np.float32(self.zero), dtype=np.float32)
        return levels

    @property
    def block_bytes(self) -> int:
        """Bytes of a source block."""
        return -(-int(self.block * self.bits_per_weight) // 8)

    @property
    def code_bits(self) -> int:
        """Bits of an element of the field 'codes' (base 3: of a byte of digits)."""
        return self.field("codes").bits

    @property
    def mapped_range(self) -> tuple[int, int]:
        """Smallest and largest V(c), before the zero is taken off; Unsupported for floats."""
        if not self.integer:
            raise Unsupported("the codes of this format stand for floats, not for integers; take "
                              "f32 or bf16 activations, or an integer format", self.name)
        if self.byte_table is not None:
            return min(self.byte_table), max(self.byte_table)
        if self.base3 or self.has("dict"):
            return 0, self.level_count - 1
        return 0, (1 << self.code_bits) - 1

    @property
    def map_kind(self) -> str:
        """The value map V in words: 'float', 'e4m3' .., 'table', 'ternary' or 'affine'."""
        if self.float_kind:
            return "float"
        if self.minifloat is not None:
            return f"e{self.minifloat.exponent}m{self.minifloat.mantissa}"
        if self.vector:
            return "codebook"
        if self.has("dict"):
            return "dictionary"
        if self.has("lut"):
            return f"table a {self.field('lut').scope}"
        if self.values is not None:
            return "float table"
        return "table" if self.table is not None else "ternary" if self.base3 else "affine"

    @property
    def scale_kind(self) -> str:
        """The scale S in words, e.g. 'f16', 'f16 x 6 bits', 'e8m0' or 'none'."""
        if self.has("e"):
            return "e8m0"
        if not self.has("d"):
            return "none"
        kind = self.field("d").number + " a row" * (self.field("d").scope == "row")
        if not self.has("sub"):
            return kind
        sub = self.field("sub")
        return f"{kind} x {sub.number or f'{sub.bits} bits'}"

    @property
    def zero_kind(self) -> str:
        """The zero Z or the minimum R in words: 'none', 'integer', 'f16' or 'f16 x 6 bits'."""
        if self.has("m"):
            return self.field("m").number
        if self.has("z"):
            return self.field("z").number or f"{self.field('z').bits} bits"
        if self.has("dmin"):
            return f"f{self.field('dmin').bits} x {self.field('submin').bits} bits"
        if self.zero != int(self.zero):
            return f"{self.zero:g}"
        return "integer" if self.zero else "none"

    @cached_property
    def code_values(self) -> Float32Array:
        """float32 [2^code_bits]: V(c) - Z of every code of a table format."""
        entries = self.table if self.table is not None else self.values
        assert entries is not None
        values: Float32Array = np.asarray(entries, np.float32) - np.float32(self.zero)
        return values
