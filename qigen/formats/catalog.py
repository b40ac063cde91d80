"""The named formats: one row each, most of them the blocks of a GGUF file.

The rows of the GGUF types are written from the block structures of ggml (``ggml-common.h``) as its
reference dequantization reads them (package ``gguf``, ``quants.py``). Fields are listed in the
order of the execution layout: codes first, so that they stay aligned to whole vectors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from qigen.errors import Unsupported
from qigen.formats.algebra import Field, Format, Run

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


def _group_row(bits: int, group: int, symmetric: bool) -> Format:
    """A round-to-nearest row: ``bits`` bits a code, an f16 scale (and minimum) a group."""
    names = ("d",) if symmetric else ("d", "m")
    return Format(f"{'s' if symmetric else 'u'}{bits}g{group}", group, group,
                  (Field("codes", bits, group), *(Field(name, 16, 1) for name in names)),
                  zero=1 << (bits - 1) if symmetric else 0, min_sign=1,
                  source="round to nearest in groups along K, f16 scale and "
                         + ("zero in the middle" if symmetric else "f16 minimum"))


CATALOG: dict[str, Format] = {row.name: row for row in (
    *_GGUF_ROWS,
    *(_group_row(bits, group, symmetric)
      for symmetric in (False, True) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
)}
_BY_GGML_TYPE = {row.ggml_type: row for row in _GGUF_ROWS}


def by_name(name: str) -> Format:
    """The format called ``name`` (any case); Unsupported, naming the nearest ones, if none is."""
    found = CATALOG.get(name.lower())
    if found is None:
        raise Unsupported(f"format '{name}' is not known; the nearest are {_nearest(name)}.")
    return found


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
