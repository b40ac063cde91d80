"""The named formats: one row each, first the blocks of GGUF files, then the families.

The rows of the GGUF types are written from the block structures of ggml (``ggml-common.h``) as its
reference dequantization reads them (package ``gguf``, ``quants.py``). Fields are listed in the
order of the execution layout: codes first, so that they stay aligned to whole vectors.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from dataclasses import replace
from statistics import NormalDist

from qigen.errors import Unsupported
from qigen.formats.algebra import MINIFLOATS, SELECTED, SHARING_ROWS, Field, Format, Run
from qigen.formats.words import ENTRY

_GGML = "ggml block "


def _little_endian(name: str, byte: int, nbytes: int, count: int = 1) -> Field:
    """``count`` little-endian integers of ``nbytes`` bytes, one after the other from ``byte``."""
    runs = (Run(byte + nbytes * e + i, 1, 0, 8, e, 1, 8 * i)
            for e in range(count) for i in range(nbytes))
    return Field(name, 8 * nbytes, count, tuple(runs))


def _split(byte: int, nbytes: int, bits: int, low: int = 0, *, span: int) -> tuple[Run, ...]:
    """Runs of ``nbytes`` bytes whose j-th group of ``bits`` bits belongs ``span`` weights on.

    The bytes come in rows of ``span``: byte i of row r has at bit ``bits * j`` the bits of weight
    ``span * (8 / bits * r + j) + i``.
    """
    per_byte = 8 // bits
    return tuple(Run(byte + span * r, span, bits * j, bits, span * (per_byte * r + j), 1, low)
                 for r in range(nbytes // span) for j in range(per_byte))


def _bits_in_order(byte: int, nbytes: int, low: int) -> tuple[Run, ...]:
    """One bit an element, element e at bit e % 8 of byte e / 8."""
    return tuple(Run(byte, nbytes, j, 1, j, 8, low) for j in range(8))


def _codes(bits: int, count: int, *runs: Iterable[Run]) -> Field:
    return Field("codes", bits, count, tuple(run for part in runs for run in part))


def _k_scales(byte: int) -> tuple[Field, Field]:
    """The 12 bytes of Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima.

    Bytes 0-3 and 4-7 have the first four scales and minima in their low 6 bits and the high 2 bits
    of the last four above them; bytes 8-11 have the low 4 bits of the last four, minima above.
    """
    def field(name: str, first: int, nibble: int) -> Field:
        return Field(name, 6, 8, (Run(first, 4, 0, 6, 0, 1), Run(first, 4, 6, 2, 4, 1, 4),
                                  Run(byte + 8, 4, nibble, 4, 4, 1)))

    return field("sub", byte, 0), field("submin", byte + 4, 4)


_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

_GGUF_ROWS = (
    Format("f32", 1, 1, (_little_endian("codes", 0, 4),), float_kind="f32", ggml_type=0,
           source="IEEE 754 binary32"),
    Format("f16", 1, 1, (_little_endian("codes", 0, 2),), float_kind="f16", ggml_type=1,
           source="IEEE 754 binary16"),
    # Pairs, so that a pair of weights is one 32-bit word of the execution layout (vdpbf16ps).
    Format("bf16", 2, 2, (_little_endian("codes", 0, 2, 2),), float_kind="bf16", ggml_type=30,
           source="bfloat16: the upper half of IEEE 754 binary32"),
    Format("q8_0", 32, 32, (_codes(8, 32, [Run(2, 32, 0, 8, 0, 1)]), _little_endian("d", 0, 2)),
           zero=128, codes_xor=0x80, ggml_type=8, source=_GGML + "block_q8_0"),
    Format("q4_0", 32, 32, (_codes(4, 32, _split(2, 16, 4, span=16)), _little_endian("d", 0, 2)),
           zero=8, ggml_type=2, source=_GGML + "block_q4_0"),
    Format("q4_1", 32, 32, (_codes(4, 32, _split(4, 16, 4, span=16)), _little_endian("d", 0, 2),
                            _little_endian("m", 2, 2)),
           min_sign=1, ggml_type=3, source=_GGML + "block_q4_1"),
    Format("q5_0", 32, 32, (_codes(5, 32, _split(6, 16, 4, span=16), _bits_in_order(2, 4, 4)),
                            _little_endian("d", 0, 2)),
           zero=16, ggml_type=6, source=_GGML + "block_q5_0"),
    Format("q5_1", 32, 32, (_codes(5, 32, _split(8, 16, 4, span=16), _bits_in_order(4, 4, 4)),
                            _little_endian("d", 0, 2), _little_endian("m", 2, 2)),
           min_sign=1, ggml_type=7, source=_GGML + "block_q5_1"),
    Format("q2_k", 256, 16, (_codes(2, 256, _split(16, 64, 2, span=32)),
                             Field("sub", 4, 16, (Run(0, 16, 0, 4, 0, 1),)),
                             Field("submin", 4, 16, (Run(0, 16, 4, 4, 0, 1),)),
                             _little_endian("d", 80, 2), _little_endian("dmin", 82, 2)),
           ggml_type=10, source=_GGML + "block_q2_K"),
    Format("q3_k", 256, 16, (_codes(3, 256, _split(32, 64, 2, span=32),
                                    _split(0, 32, 1, 2, span=32)),
                             Field("sub", 6, 16, (*_split(96, 8, 4, span=8),
                                                  *_split(104, 4, 2, 4, span=4))),
                             _little_endian("d", 108, 2)),
           zero=4, sub_zero=32, ggml_type=11, source=_GGML + "block_q3_K"),
    Format("q4_k", 256, 32, (_codes(4, 256, _split(16, 128, 4, span=32)), *_k_scales(4),
                             _little_endian("d", 0, 2), _little_endian("dmin", 2, 2)),
           ggml_type=12, source=_GGML + "block_q4_K"),
    Format("q5_k", 256, 32, (_codes(5, 256, _split(48, 128, 4, span=32),
                                    _split(16, 32, 1, 4, span=32)), *_k_scales(4),
                             _little_endian("d", 0, 2), _little_endian("dmin", 2, 2)),
           ggml_type=13, source=_GGML + "block_q5_K"),
    Format("q6_k", 256, 16, (_codes(6, 256, _split(0, 128, 4, span=64),
                                    _split(128, 64, 2, 4, span=32)),
                             Field("sub", 8, 16, (Run(192, 16, 0, 8, 0, 1),)),
                             _little_endian("d", 208, 2)),
           zero=32, sub_signed=True, ggml_type=14, source=_GGML + "block_q6_K"),
    Format("iq4_nl", 32, 32, (_codes(4, 32, _split(2, 16, 4, span=16)), _little_endian("d", 0, 2)),
           table=_IQ4_VALUES, ggml_type=20, source=_GGML + "block_iq4_nl"),
    Format("iq4_xs", 256, 32, (_codes(4, 256, _split(8, 128, 4, span=16)),
                               Field("sub", 6, 8, (
                                   Run(4, 4, 0, 4, 0, 2), Run(4, 4, 4, 4, 1, 2),
                                   *(Run(2, 2, 2 * j, 2, j, 4, 4) for j in range(4)))),
                               _little_endian("d", 0, 2)),
           table=_IQ4_VALUES, sub_zero=32, ggml_type=23, source=_GGML + "block_iq4_xs"),
    Format("tq1_0", 256, 256, (_codes(8, 52, [Run(0, 52, 0, 8, 0, 1)]),
                               _little_endian("d", 52, 2)),
           zero=1, base3=True, ggml_type=34, source=_GGML + "block_tq1_0"),
    Format("tq2_0", 256, 256, (_codes(2, 256, _split(0, 64, 2, span=32)),
                               _little_endian("d", 64, 2)),
           zero=1, ggml_type=35, source=_GGML + "block_tq2_0"),
    Format("mxfp4", 32, 32, (_codes(4, 32, _split(1, 16, 4, span=16)),
                             Field("e", 8, 1, (Run(0, 1, 0, 8, 0, 1),))),
           table=_E2M1_DOUBLED, scale_factor=0.5, ggml_type=39,
           source=_GGML + "block_mxfp4; OCP Microscaling Formats 1.0"),
)


GROUPS = (16, 32, 64, 128, 256)
"""Weights that may share a scale in the rows of the next families."""

_BITS = {"f32": 32, "f16": 16, "bf16": 16}
_KINDS = {
    "s": "the zero is in the middle",
    "u": "a minimum of the group",
    "z": "an integer zero point of the group (MatMulNBits, GPTQ, AWQ)",
    "h": "a float zero point of the group (HQQ)",
}


def _float(name: str, kind: str, count: int = 1, scope: str = "block") -> Field:
    """``count`` floats of a kind; the kind is said only where the width does not say it."""
    said = "" if kind in ("f16", "f32") and name in ("d", "m", "lut", "ov", "qv", "book") else kind
    return Field(name, _BITS.get(kind, 8), count, kind=said, scope=scope)


def _grouped(bits: int, group: int) -> tuple[int, int]:
    """(weights of a block, groups of a block): codes fill whole 32-bit words."""
    return (32, 2) if group == 16 else (group, 1)


def int_row(kind: str, bits: int, group: int | None, scale: str = "f16") -> Format:
    """A row of affine codes in groups along K; a group of None is the whole row ("channel").

    ``kind``: 's' symmetric, 'u' with a minimum, 'z' with an integer zero point, 'h' with a float
    one.
    ``scale`` is the kind of the scales, minima and float zero points.
    """
    scope = "row" if group is None else "block"
    block, count = (32, 1) if group is None else _grouped(bits, group)
    side = [_float("d", scale, count, scope)]
    if kind in "uh":
        side.append(_float("m" if kind == "u" else "z", scale, count, scope))
    elif kind == "z":
        side.append(Field("z", 8, count, scope=scope))
    return Format(
        f"{kind}{bits}g{group or 'channel'}{'' if scale == 'f16' else '_' + scale}",
        block, group or block, (Field("codes", bits, block), *side),
        zero=1 << (bits - 1) if kind == "s" else 0, min_sign=1,
        source=f"groups along K, {scale} scales; {_KINDS[kind]}")


# QLoRA (Dettmers et al. 2023), appendix E.
_NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
# The fp4 type of bitsandbytes: 0.0625, 8, 12, 4, 6, 2, 3 twelfths and their negatives.
_FP4 = (0.0, 0.0052083333333, 0.6666666666667, 1.0, 0.3333333333333, 0.5, 0.1666666666667, 0.25,
        0.0, -0.0052083333333, -0.6666666666667, -1.0, -0.3333333333333, -0.5, -0.1666666666667,
        -0.25)


def _normal_float(bits: int) -> tuple[float, ...]:
    """Quantiles of a normal distribution with an exact zero, by the rule behind nf4."""
    half, offset = 1 << (bits - 1), 0.9677083
    inverse = NormalDist().inv_cdf

    def side(n: int) -> list[float]:
        return [inverse(offset + (0.5 - offset) * i / n) for i in range(n)]

    positive, negative = side(half), side(half - 1)
    values = sorted([*positive, 0.0, *(-v for v in negative)])
    return tuple(v / max(values) for v in values)


_VALUES = {"nf4": _NF4, "fp4": _FP4, "nf3": _normal_float(3), "nf2": _normal_float(2)}


def table_row(name: str, group: int, scale: str = "f16") -> Format:
    """A row with a table of floats that is the same for all weights: nf4, nf3, nf2, fp4."""
    values = _VALUES[name]
    bits = (len(values) - 1).bit_length()
    block, count = _grouped(bits, group)
    return Format(f"{name}g{group}{'' if scale == 'f16' else '_' + scale}", block, group,
                  (Field("codes", bits, block), _float("d", scale, count)), values=values,
                  source={"fp4": "bitsandbytes fp4", "nf4": "QLoRA nf4"}.get(
                      name, "quantiles as for nf4; FLUTE"))


def with_byte_table(row: Format) -> Format:
    """``row``, which has a table of floats, with its entries rounded to integers of a byte.

    Codes and scales keep their places, so that a weight changes its row without being packed anew,
    and integer kernels take it. The greatest entry becomes the integer of 64 to 127 that makes the
    largest error of an entry least; no error is above 1/128 of the greatest entry.
    """
    if row.values is None:
        raise Unsupported("only a table of floats can be rounded to bytes", row.name)
    top = max(abs(v) for v in row.values)

    def rounded(most: int) -> tuple[float, int, tuple[int, ...]]:
        table = tuple(round(v * most / top) for v in row.values or ())
        worst = max(abs(v - t * top / most)
                    for v, t in zip(row.values or (), table, strict=True))
        return worst, -most, table

    _, most, table = min(rounded(most) for most in range(64, 128))
    return replace(row, name=f"{row.name}_t8", values=None, table=table, scale_factor=top / -most,
                   source=f"{row.source}; its table rounded to bytes")


def lut_row(bits: int, scope: str, group: int | None = None) -> Format:
    """A row whose table of 2^bits f16 values is data: one a tensor, a row ("channel") or a block.

    With a table of the tensor, every group (of 32 to 256) has an f16 scale; the other tables are
    their own scales.
    """
    where = {"tensor": "tensor", "channel": "row", "group": "block"}[scope]
    block = group or 32
    side = [_float("lut", "f16", 1 << bits, where)]
    if scope == "tensor":
        side.insert(0, _float("d", "f16"))
    name = f"lut{bits}_{scope}" + (f"_g{group}" if group else "")
    return Format(name, block, block, (Field("codes", bits, block), *side),
                  source="k-means tables: SqueezeLLM, FLUTE, OpenVINO codebooks")


def float_row(kind: str, scale: str, group: int | None = None) -> Format:
    """Small floats with scales of a row (``group`` None) or of groups; ``scale`` may be 'e8m0'."""
    small = MINIFLOATS[kind]
    block = group or 32
    d = (Field("e", 8, 1) if scale == "e8m0"
         else _float("d", scale, scope="row" if group is None else "block"))
    if scale == "e8m0":
        name = f"mxfp{small.bits}_{kind}"
        source = "OCP Microscaling Formats 1.0"
    else:
        name = f"fp{small.bits}_{kind}" + (f"g{group}" if group else "")
        name += "" if scale == "f16" else f"_{scale}"
        source = {8: "FP8 Formats for Deep Learning", 6: "FP6-LLM", 5: "ZeroQuant(4+2)"}.get(
            small.bits, "OCP e2m1")
    return Format(name, block, block, (Field("codes", small.bits, block), d), minifloat=small,
                  source=source)


def _bipolar(bits: int) -> Format:
    """Bit planes of -1 and 1: the value is the sum of 2^i b_i, that is 2c - (2^bits - 1)."""
    return Format(f"bipolar{bits}", 32, 32, (Field("codes", bits, 32),
                                             _float("d", "f16", scope="row")),
                  zero=((1 << bits) - 1) / 2, scale_factor=2.0,
                  source="bit planes of -1 and 1: arbitrary precision by binary products")


OUTLIER_BLOCK = 256
"""Weights of a block that keeps some outliers."""


def _widened(row: Format, block: int) -> Format:
    """The same row in blocks of ``block`` weights, a multiple of its own."""
    times, rest = divmod(block, row.block)
    if rest or row.ggml_type is not None or not row.single_codes or row.has("lut"):
        raise Unsupported("this format cannot be combined with masks or outliers; take a group "
                          "row such as s4g128", row.name)
    return replace(row, block=block, fields=tuple(
        replace(f, count=f.count * times) if f.scope in ("block", "column") else f
        for f in row.fields))


def with_outliers(row: Format, count: int) -> Format:
    """``row`` with the ``count`` greatest weights of every 256 of a row corrected by an f16."""
    wide = _widened(row, OUTLIER_BLOCK)
    return replace(wide, name=f"{row.name}_o{count}", fields=(
        *wide.fields, Field("oc", 8, count), _float("ov", "f16", count)),
        source=f"{row.source}; {count} outliers of 256 apart (SpQR, SqueezeLLM)")


def with_columns(row: Format, count: int) -> Format:
    """``row`` with ``count`` columns, the same of all rows, corrected by f16 (QUIK)."""
    wide = _widened(row, row.block)
    return replace(wide, name=f"{row.name}_c{count}", fields=(
        *wide.fields, Field("qc", 16, count, scope="tensor"),
        _float("qv", "f16", count, "row")),
        source=f"{row.source}; {count} columns apart (QUIK, COMET)")


MOST_RANK = 256
"""The greatest rank of a low-rank residual: beyond, its factors cost more than they save."""


def with_low_rank(row: Format, rank: int) -> Format:
    """``row`` and the product of two factors [N, ``rank``] and [rank, K] in f16, any base row.

    Raises Unsupported for ranks that do not fill vectors of 16, and for rows of floats, which have
    no error to make up for.
    """
    if rank % 16 or not 0 < rank <= MOST_RANK:
        raise Unsupported(f"a residual of rank {rank} has no kernel; take a multiple of 16 up to "
                          f"{MOST_RANK}", row.name)
    if row.float_kind or row.rank:
        raise Unsupported("this format cannot have a low-rank residual; take quantized codes, and "
                          "one residual", row.name)
    return replace(row, name=f"{row.name}_lr{rank}", ggml_type=None, fields=(
        *row.fields, Field("la", 16, rank * row.block, scope="column"),
        _float("lb", "f16", rank, "row")),
        source=f"{row.source}; a residual of rank {rank} (ZeroQuant-V2, LQ-LoRA, LQER)")


def masked(row: Format, keep: int, of: int, bitmap: bool = False) -> Format:
    """``row`` with ``keep`` of every ``of`` (4, 8, 16 or 32) weights stored and the others zero.

    Which they are is said by their places, of log2(of) bits each, or by a ``bitmap`` of a bit for
    every weight: that takes less where more than one of log2(of) weights is kept. Codes behind a
    bitmap have 1, 2, 4 or 8 bits, and those of ``of`` weights fill whole 32-bit words.
    """
    if of not in (4, 8, 16, 32) or not 0 < keep < of:
        raise Unsupported(f"a mask of {keep} of {of} weights has no kernel; take N of 4, 8, 16 or "
                          "32", row.name)
    row = _widened(row, max(row.block, 32))
    if bitmap:
        if of == 4 or row.code_bits not in (1, 2, 4, 8) or keep * row.code_bits % 32:
            raise Unsupported(f"a bitmap of {keep} of {of} codes of {row.code_bits} bits has no "
                              "kernel: the codes must have 1, 2, 4 or 8 bits and fill whole words "
                              "of 32 bits, as 16 of 32 codes of 4 bits do", row.name)
        fields = [replace(f, count=row.block * keep // of) if f.name == "codes" else f
                  for f in row.fields]
        fields.insert(1, Field("bm", of, row.block // of))
        result = replace(row, name=f"{row.name}_{keep}of{of}b", fields=tuple(fields),
                         mask=(keep, of),
                         source=f"{row.source}; a bitmap of the kept weights (Endor)")
        assert result.hole >= 0
        return result
    kept = row.block * keep // of
    if any(kept * p % 32 for p in (1, 2, 4, 8) if row.code_bits & p):
        row = _widened(row, 4 * row.block)
        kept = row.block * keep // of
    fields = [replace(f, count=kept) if f.name == "codes" else f for f in row.fields]
    fields.insert(1, Field("ix", of.bit_length() - 1, kept))
    result = replace(row, name=f"{row.name}_{keep}of{of}", fields=tuple(fields), mask=(keep, of),
                     source=f"{row.source}; {keep}:{of} sparse (Sparse-MARLIN, VENOM, STen)")
    assert result.hole >= 0
    return result


def shared_mask(row: Format, keep: int, of: int, rows: int) -> Format:
    """``row`` with ``keep`` of every ``of`` (8, 16 or 32) weights stored, which lie in four columns
    that ``rows`` (16, 32, 64 or 128) rows share (VENOM: V:N:M)."""
    if of not in (8, 16, 32) or not 0 < keep < SELECTED or rows not in (
            SHARING_ROWS, 2 * SHARING_ROWS, 4 * SHARING_ROWS, 8 * SHARING_ROWS):
        raise Unsupported(f"a mask of {rows}:{keep}:{of} has no kernel; take 16, 32, 64 or 128 "
                          "rows that keep 1 to 3 of 8, 16 or 32 weights", row.name)
    row = _widened(row, max(row.block, 128))
    while any(row.block * keep // of * p % 32 for p in (1, 2, 4, 8) if row.code_bits & p):
        row = _widened(row, 2 * row.block)
    kept = row.block * keep // of
    fields = [replace(f, count=kept) if f.name == "codes" else f for f in row.fields]
    fields[1:1] = [Field("ix", 2, kept), Field("vm", of, row.block // of, rows=rows)]
    result = replace(row, name=f"{row.name}_{keep}of{of}v{rows}", fields=tuple(fields),
                     mask=(keep, of),
                     source=f"{row.source}; {keep}:{of} sparse in columns of {rows} rows (VENOM)")
    assert result.hole >= 0
    return result


def codebook_row(books: int, bits: int, vector: int = 8) -> Format:
    """Vectors of ``vector`` weights as sums of entries of ``books`` codebooks of 2^bits entries."""
    if not 1 <= books <= 4 or not 4 <= bits <= 16 or vector not in (4, 8, 16):
        raise Unsupported("codebooks have 1 to 4 books of 4 to 16 bits and vectors of 4, 8 or 16 "
                          "weights", f"aqlm_{books}x{bits}")
    suffix = "" if vector == 8 else f"v{vector}"
    return Format(f"aqlm_{books}x{bits}{suffix}", 32, 32, (
        Field("codes", bits, 32 // vector * books), _float("d", "f16", scope="row"),
        _float("book", "f16", books * vector << bits, "tensor")), vector=vector,
        source="AQLM, PV-Tuning: additive codebooks")


def dictionary_row(bits: int, block: int, words: int) -> Format:
    """Ternary weights as ``words`` words of a dictionary of 2^bits sequences for every ``block``
    weights."""
    if not 8 <= bits <= 16 or block not in (256, 512, 1024) or not 0 < words <= block:
        raise Unsupported("dictionaries have words of 8 to 16 bits, for 256, 512 or 1024 weights",
                          f"qmoe{bits}_{block}x{words}")
    return Format(f"qmoe{bits}_{block}x{words}", block, block, (
        Field("codes", bits, words), _float("d", "f16", scope="row"),
        Field("dict", 8, ENTRY << bits, scope="tensor")), zero=1, used=3,
        source="QMoE: ternary sequences of various lengths in a dictionary")


_SPQR3 = Format(
    "spqr3", 256, 16, (
        Field("codes", 3, 256), Field("sub", 3, 16), Field("z", 3, 16),
        *(_float(name, "f16") for name in ("d", "subz", "zd", "zz")),
        Field("oc", 8, 3), _float("ov", "f16", 3)),
    source="SpQR: 3-bit codes in groups of 16, scales and zeros of 3 bits, outliers apart")

_ROWS = (
    codebook_row(1, 16),
    codebook_row(2, 8),
    _SPQR3,
    dictionary_row(12, 512, 36),
    *(with_outliers(int_row(kind, bits, 128), 3) for kind in "sz" for bits in (2, 3, 4)),
    with_outliers(table_row("nf4", 64), 3),
    *(masked(int_row("s", bits, 128), 2, 4) for bits in (2, 4, 8)),
    masked(int_row("s", 4, 128), 2, 8),
    masked(int_row("s", 4, 128), 1, 4),
    masked(table_row("nf4", 64), 2, 4),
    masked(int_row("s", 4, 128), 16, 32, bitmap=True),
    masked(int_row("s", 8, 128), 4, 8, bitmap=True),
    masked(int_row("s", 2, 128), 16, 32, bitmap=True),
    with_outliers(masked(int_row("s", 4, 128), 2, 4), 3),
    shared_mask(int_row("s", 4, 128), 2, 8, 64),
    shared_mask(int_row("s", 8, 128), 2, 16, 16),
    shared_mask(table_row("nf4", 64), 2, 8, 32),
    with_columns(int_row("s", 4, None), 32),
    with_low_rank(int_row("s", 4, 128), 16),
    with_low_rank(with_outliers(int_row("z", 3, 128), 3), 32),
    with_low_rank(table_row("nf4", 64), 16),
    Format("nvfp4", 32, 16, (Field("codes", 4, 32), Field("sub", 8, 2, kind="e4m3"),
                             _float("d", "f32", scope="row")),
           table=_E2M1_DOUBLED, scale_factor=0.5,
           source="NVFP4: e2m1 in groups of 16 with e4m3 scales and an f32 factor"),
    Format("mxint8", 32, 32, (Field("codes", 8, 32), Field("e", 8, 1)), zero=128,
           scale_factor=2.0**-6, source="OCP Microscaling Formats 1.0"),
    *(float_row(kind, "e8m0", 32) for kind in ("e4m3", "e5m2", "e2m3", "e3m2")),
    *(float_row(kind, "f32") for kind in ("e4m3", "e5m2")),
    float_row("e4m3", "f32", 128),
    *(float_row(kind, "f16") for kind in ("e2m3", "e3m2", "e2m2", "e3m1")),
    Format("ternary2", 32, 32, (Field("codes", 2, 32), _float("d", "f32", scope="row")), zero=1,
           used=3, source="BitNet b1.58, two bits a weight"),
    Format("ternary5", 256, 256, (Field("codes", 8, 52), _float("d", "f32", scope="row")), zero=1,
           base3=True, source="BitNet b1.58, five weights a byte"),
    Format("w4a8", 128, 128, (Field("codes", 4, 128), Field("sub", 8, 1), Field("z", 8, 1),
                              _float("d", "f16", scope="row")),
           source="QServe: 4-bit codes scaled to 8 bits in groups, f16 scales of rows"),
    *(_bipolar(bits) for bits in range(1, 9)),
    *(table_row(name, 64) for name in _VALUES),
    *(table_row(name, 64, "f32") for name in ("nf4", "fp4")),
    *(with_byte_table(table_row(name, 64)) for name in _VALUES),
    *(lut_row(bits, scope, 64 if scope != "channel" else None)
      for scope in ("tensor", "channel", "group") for bits in (2, 3, 4)),
)

CATALOG: dict[str, Format] = {row.name: row for row in (
    *_GGUF_ROWS,
    *(int_row(kind, bits, group)
      for kind in "su" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    *(int_row(kind, bits, group) for kind in "su" for bits in range(2, 9)
      for group in (16, 256, None)),
    *(int_row(kind, 7, group) for kind in "su" for group in (32, 64, 128)),
    *(int_row("z", bits, group) for bits in range(2, 9) for group in (32, 64, 128)),
    *(int_row("h", bits, 64) for bits in range(2, 9)),
    *(int_row(kind, bits, 128, scale) for kind in "sz" for bits in (4, 8)
      for scale in ("f32", "bf16")),
    *_ROWS,
)}
# Rows whose kernels differ by more than numbers of the same path: every test takes them; others of
# the families are covered by the slow tests.
REPRESENTATIVE: tuple[str, ...] = (
    *(row.name for row in _GGUF_ROWS),
    "s2g32", "s3g64", "s5g64", "s8g64", "u2g64", "u3g32", "u4g128", "u6g32", "u8g32",
    "s4g16", "u3g16", "s7g32", "s4gchannel", "u5gchannel", "s4g256",
    "z2g32", "z4g64", "z8g128", "h4g64", "h3g64", "s4g128_f32", "z4g128_f32", "z4g128_bf16",
    *(row.name for row in _ROWS if not row.name.startswith(("bipolar", "lut2", "lut4"))
      and not row.name.endswith("_t8")),
    "nf4g64_t8", "bipolar1", "bipolar3", "bipolar8", "lut4_channel",
)

_BY_GGML_TYPE = {row.ggml_type: row for row in _GGUF_ROWS}


def by_name(name: str) -> Format:
    """The format called ``name`` (any case); Unsupported, naming the nearest ones, if none is."""
    found = CATALOG.get(name.lower()) or _of_family(name.lower())
    if found is None:
        raise Unsupported(f"format '{name}' is not known; the nearest are {_nearest(name)}.")
    return found


_FAMILY = re.compile(r"(?P<base>[suzh][2-8]|nf[234]|fp4|fp\d_e\dm\d)"
                     r"(g(?P<group>16|32|64|128|256|channel))?(_(?P<scale>f16|f32|bf16))?")


@functools.cache
def _of_family(name: str) -> Format | None:
    """A row that is not listed but named by the rule of its family: ``z3g64_f32``, ``nf4g128``."""
    combined = re.fullmatch(r"(?P<row>.+)_((?P<kind>o|c|lr)(?P<count>\d+)"
                            r"|(?P<keep>\d+)of(?P<of>\d+)(?P<bitmap>b?)(v(?P<rows>\d+))?)", name)
    if combined is not None:
        row = CATALOG.get(combined["row"]) or _of_family(combined["row"])
        if row is None:
            return None
        if combined["count"]:
            more = {"o": with_outliers, "c": with_columns, "lr": with_low_rank}[combined["kind"]]
            return more(row, int(combined["count"]))
        keep, of = int(combined["keep"]), int(combined["of"])
        if combined["rows"]:
            if combined["bitmap"]:
                return None
            return shared_mask(row, keep, of, int(combined["rows"]))
        return masked(row, keep, of, bool(combined["bitmap"]))
    if name.endswith("_t8"):
        row = CATALOG.get(name[:-3]) or _of_family(name[:-3])
        return with_byte_table(row) if row is not None else None
    books = re.fullmatch(r"aqlm_(\d)x(\d+)(v\d+)?", name)
    if books is not None:
        vector = int((books[3] or "v8")[1:])
        return codebook_row(int(books[1]), int(books[2]), vector)
    words = re.fullmatch(r"qmoe(\d+)_(\d+)x(\d+)", name)
    if words is not None:
        return dictionary_row(int(words[1]), int(words[2]), int(words[3]))
    found = _FAMILY.fullmatch(name)
    if found is None:
        return None
    base, scale = found["base"], found["scale"] or "f16"
    group = int(found["group"]) if (found["group"] or "").isdigit() else None
    if base[0] in "suzh" and found["group"]:
        return int_row(base[0], int(base[1]), group, scale)
    if base in _VALUES and group is not None:
        return table_row(base, group, scale)
    kind = base.partition("_")[2]
    if kind in MINIFLOATS and base == f"fp{MINIFLOATS[kind].bits}_{kind}" and group != 16:
        return float_row(kind, scale, group)
    return None


def by_ggml_type(ggml_type: int) -> Format:
    """The format of a GGUF tensor type (its number, or the ``gguf`` package's enumerator).

    Raises Unsupported, naming the nearest formats, if there is none.
    """
    found = _BY_GGML_TYPE.get(int(ggml_type))
    if found is None:
        name = str(getattr(ggml_type, "name", ""))
        called = f"{int(ggml_type)} ({name})" if name else f"{int(ggml_type)}"
        raise Unsupported(f"tensors of ggml type {called} are not supported; quantize the model to "
                          f"one of {_nearest(name)}.")
    return found


def _nearest(name: str) -> str:
    """The names most like ``name``, or those of the GGUF types if none is like it."""
    near = difflib.get_close_matches(name.lower(), CATALOG, n=4, cutoff=0.4)
    return ", ".join(near or [row.name for row in _GGUF_ROWS])
