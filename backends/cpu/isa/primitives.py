"""What every ISA header must provide: the primitives, their C++ signatures and numpy meanings.

A new ISA is a row of the ISA table and a header with the functions named here. The differential
test calls each of them on random and edge inputs and compares with ``meaning``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LANES = 16

KINDS: dict[str, tuple[str, int]] = {
    "vf": ("float32", LANES),
    "vi": ("int32", LANES),
    "vb": ("uint8", 4 * LANES),
    "vx": ("int8", 4 * LANES),
    "vp": ("uint16", 2 * LANES),
    "float": ("float32", 1),
    "int": ("int32", 1),
    "float*": ("float32", LANES),
    "half*": ("uint16", LANES),
    "int8*": ("int8", LANES),
    "uint8*": ("uint8", LANES),
    "table32*": ("uint8", 32),
    "table64*": ("uint8", 64),
    "uint16*": ("uint16", LANES),
    "int32*": ("int32", LANES),
    "x4": ("int8", 4),
    "pairs*": ("int16", 4),
    "u4": ("uint8", 4),
    "x2": ("uint16", 2),
    "tile32*": ("int32", 256),
    "tilef*": ("float32", 256),
    "tileu8*": ("uint8", 1024),
    "tiles8*": ("int8", 1024),
    "tilebf*": ("uint16", 512),
}
"""Operand kinds: element type and count. 'vb' is a vi seen as 64 bytes, 'vx' as signed ones, 'vp'
as 16 pairs of bf16 bits; 'half*' are f16 bits; 'x4', 'u4' and 'x2' the activations of a dot product
of signed bytes, unsigned bytes or bf16, 'pairs*' those of 16 bits; 'tile..' the 16 rows of a tile
register."""


@dataclass(frozen=True)
class Operand:
    """An argument; elements lie in [low, high], or are any bit pattern if that is None."""

    kind: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Primitive:
    """A function of the ISA headers (or of epilogue.h, which is written with them).

    ``meaning`` maps arrays [cases, count] of the arguments' kinds to one of the result's kind;
    ``or_else`` is a second result that is also right. ``call`` is the C++ expression, ``{0}``,
    ``{1}``.. its arguments and ``{out}`` where it stores its result; it defaults to a plain call.
    ``ulps`` is how far a float may lie from the rounded meaning. ``narrow`` marks what only ISAs
    whose ``signed_dot`` is set need, ``limited`` what only those with a ``dot_limit`` do, ``tiles``
    what only those with tile registers do.
    """

    name: str
    arguments: tuple[Operand, ...]
    result: str
    meaning: Callable[..., Array]
    call: str = ""
    or_else: Callable[..., Array] | None = None
    ulps: float = 0
    narrow: bool = False
    limited: bool = False
    tiles: bool = False

    @property
    def label(self) -> str:
        """The name with its template argument, e.g. ``vi_srl<8>``."""
        found = re.match(rf"{self.name}<\d+>", self.call)
        return found.group() if found else self.name

    @property
    def expression(self) -> str:
        """The C++ expression that ``call`` gives or defaults to."""
        places = ", ".join(f"{{{i}}}" for i in range(len(self.arguments)))
        return self.call or f"{self.name}({places})"


_VF, _VI, _VB = Operand("vf"), Operand("vi"), Operand("vb")
_SUMMABLE = Operand("vf", -1e4, 1e4)
_FINITE = Operand("vf", -3e38, 3e38)
_COUNT = Operand("int", 0, LANES)
_CODE = Operand("vb", 0, 15)
_POSITIVE_BF16 = (0x3000, 0x4700)  # 5e-10 to 3e4: no cancellation, so that sums are accurate
_SHIFTS = (1, 4, 7, 8, 16, 23, 24, 31)


def _f32(x: Array) -> Array:
    return np.asarray(x).astype(np.float32)


def _f64(x: Array) -> Array:
    return np.asarray(x).astype(np.float64)


def _select(mask: Array, a: Array, b: Array) -> Array:
    return np.asarray(np.where(mask, a, b))


def _fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c rounded once. The product is exact in float64; what its sum with c loses is kept
    by rounding that to odd, so that rounding to float32 sees on which side of a tie it lies."""
    product, c = _f64(a) * b, _f64(c)
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    even = (total.view(np.int64) & 1) == 0
    away = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return _f32(np.where(np.isfinite(total) & (lost != 0) & even, away, total))


def _tree_sum(a: Array) -> Array:
    """Halves are added to halves, in float32: the order of every header."""
    while a.shape[1] > 1:
        half = a.shape[1] // 2
        a = a[:, :half] + a[:, half:]
    return a


def _wrap(a: Array) -> Array:
    return np.asarray(a).astype(np.int64).astype(np.uint32).view(np.int32)


def _head(a: Array, n: Array) -> Array:
    return _select(np.arange(LANES) < n, a, np.zeros_like(a))


def _dot(z: Array, codes: Array, x: Array) -> Array:
    """i32 [cases, 16]: z + the sum of 4 codes by 4 activations in each lane."""
    products = codes.reshape(len(codes), LANES, 4).astype(np.int64) * x[:, None, :]
    return _wrap(products.sum(axis=2) + z)


def _dot_each(z: Array, codes: Array, x: Array) -> Array:
    """The same with 4 activations of its own in each lane."""
    products = codes.astype(np.int64) * x
    return _wrap(products.reshape(len(codes), LANES, 4).sum(axis=2) + z)


def _bf16(x: Array) -> Array:
    """uint16: the bf16 nearest to float32 x, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return np.asarray((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _bf16_values(bits: Array) -> Array:
    return np.asarray((bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64))


def _dot_bf16(acc: Array, w: Array, x: Array) -> Array:
    products = _bf16_values(w).reshape(len(w), LANES, 2) * _bf16_values(x)[:, None, :]
    return _f32(acc + products.sum(axis=2))


def _tile_u8s8(z: Array, a: Array, b: Array) -> Array:
    """int32 [cases, 256]: z [16][16] + a [16][64] by b [16 steps][16 columns][4]."""
    left = a.reshape(-1, 16, 16, 4).astype(np.int64)
    right = b.reshape(-1, 16, 16, 4).astype(np.int64)
    return _wrap(np.einsum("bmks,bkns->bmn", left, right).reshape(len(z), -1) + z)


def _tile_bf16(z: Array, a: Array, b: Array) -> Array:
    """float32 [cases, 256]: z + a [16][32] by b [16 steps][16 columns][2], summed in float64."""
    left, right = (_bf16_values(x).reshape(-1, 16, 16, 2) for x in (a, b))
    return _f32(z + np.einsum("bmks,bkns->bmn", left, right).reshape(len(z), -1))


def _tile_call(dot: str) -> str:
    """A product of whole tile registers, with the primitives that fill and empty them."""
    return (
        "(vt_configure(16, 0), vt_load<0>({0}, 64), vt_load<2>({1}, 64), vt_load<3>({2}, 64), "
        f"{dot}<0, 2, 3>(), vt_store<0>({{out}}, 64), vt_release())"
    )


def _words_at(a: Array) -> Array:
    """int32 [cases, bytes - 3]: the little-endian words at every byte of the rows."""
    raw = np.ascontiguousarray(a).view(np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(raw, 4, axis=1)
    return np.asarray(windows.copy().view(np.int32)[..., 0])


def _zip(a: Array, b: Array) -> Array:
    return np.stack([a, b], axis=2).reshape(len(a), -1)


def _halves(a: Array, b: Array) -> Array:
    return np.concatenate([a[:, :8], b[:, :8]], axis=1)


def _picked(x: Array, places: Array, signs: Array) -> Array:
    lanes = np.arange(4 * LANES) // 4 * 4
    found = np.take_along_axis(x, lanes + places.astype(np.intp), axis=1)
    return _select(signs < 128, found, np.zeros_like(found))


def _looked_up(byte: int, t: Array, c: Array) -> Array:
    return np.take_along_axis(t, c[:, byte::4].astype(np.intp), axis=1)


def _small(exponent: int, byte: int, codes: Array) -> Array:
    c = codes[:, byte::4].astype(np.uint16)
    return _f32(((c & 0x80) << 8 | (c & 0x7F) << (3 + exponent)).view(np.float16))


def _turned(part: int, a: Array, b: Array, c: Array) -> Array:
    """int32 [cases, 16]: word ``part`` of every four lanes of a, b, c and their exclusive or."""
    words = np.stack([a, b, c, a ^ b], axis=2).reshape(len(a), 4, 4, 4)
    return words[:, :, part].reshape(len(a), LANES)


def _halves_of(part: int, low: Array, high: Array) -> Array:
    own = slice(16 * part, 16 * part + 16)
    bits = low[:, own].astype(np.uint16) | high[:, own].astype(np.uint16) << 8
    return _f32(bits.view(np.float16))


def _picked_floats(stride: int, t: Array, at: Array) -> Array:
    return np.take_along_axis(t, at[:, ::stride].astype(np.intp), axis=1)


def _shifts(name: str, meaning: Callable[[int, Array], Array]) -> Iterator[Primitive]:
    for n in _SHIFTS:
        yield Primitive(name, (_VI,), "vi", partial(meaning, n), f"{name}<{n}>({{0}})")


TILE_NAMES = ("vt_configure", "vt_release", "vt_zero", "vt_load", "vt_store", "vt_dot_u8s8",
              "vt_dot_bf16")  # fmt: skip
"""The functions of a header with tile registers."""


PRIMITIVES: tuple[Primitive, ...] = (
    # f32 lanes
    Primitive("vf_zero", (), "vf", lambda: np.zeros((1, LANES), np.float32)),
    Primitive("vf_set1", (Operand("float"),), "vf", lambda x: np.repeat(x, LANES, axis=1)),
    Primitive("vf_load", (Operand("float*"),), "vf", lambda p: p),
    Primitive("vf_store", (_VF,), "float*", lambda x: x, "vf_store({out}, {0})"),
    Primitive("vf_load_n", (Operand("float*"), _COUNT), "vf", _head),
    Primitive("vf_store_n", (_VF, _COUNT), "float*", _head, "vf_store_n({out}, {0}, {1})"),
    Primitive("vf_load_f16", (Operand("half*"),), "vf", lambda p: _f32(p.view(np.float16))),
    Primitive("vf_load_halves", (Operand("float*"), Operand("float*")), "vf", _halves),
    Primitive("vf_load_f16_halves", (Operand("half*"), Operand("half*")), "vf",
              lambda a, b: _f32(_halves(a, b).view(np.float16))),
    Primitive("vf_store_f16", (_VF,), "half*", lambda x: x.astype(np.float16).view(np.uint16),
              "vf_store_f16({out}, {0})"),
    Primitive("vf_load_i8", (Operand("int8*"),), "vf", _f32),
    Primitive("vf_add", (_VF, _VF), "vf", lambda a, b: a + b),
    Primitive("vf_sub", (_VF, _VF), "vf", lambda a, b: a - b),
    Primitive("vf_mul", (_VF, _VF), "vf", lambda a, b: a * b),
    Primitive("vf_div", (_VF, _VF), "vf", lambda a, b: a / b),
    # the second operand wins if either is a NaN
    Primitive("vf_max", (_VF, _VF), "vf", lambda a, b: _select(a > b, a, b)),
    Primitive("vf_min", (_VF, _VF), "vf", lambda a, b: _select(a < b, a, b)),
    Primitive("vf_abs", (_VF,), "vf", np.abs),
    Primitive("vf_sqrt", (_VF,), "vf", np.sqrt),
    Primitive("vf_fma", (_VF, _VF, _VF), "vf", _fused, or_else=lambda a, b, c: a * b + c),
    Primitive("vf_fnma", (_VF, _VF, _VF), "vf", lambda a, b, c: _fused(-a, b, c),
              or_else=lambda a, b, c: c - a * b),
    Primitive("vf_round", (_VF,), "vf", np.rint),
    Primitive("vf_reduce_add", (_SUMMABLE,), "float", _tree_sum),
    Primitive("vf_reduce_max", (_SUMMABLE,), "float", lambda a: a.max(axis=1, keepdims=True)),
    Primitive("vf_from_i32", (_VI,), "vf", _f32),
    Primitive("vf_from_bits", (_VI,), "vf", lambda a: a.view(np.float32)),
    Primitive("vi_bits", (_VF,), "vi", lambda a: a.view(np.int32)),
    Primitive("vf_ldexp", (Operand("vf", 0.5, 4), Operand("vf", -250, 250)), "vf",
              lambda a, n: np.ldexp(a, np.rint(n).astype(np.int32)),
              "vf_ldexp({0}, vf_round({1}))"),
    # tables: of 16 floats in a vector, and of any number in memory
    Primitive("vf_lookup", (_VF, Operand("vi", 0, 15)), "vf",
              lambda t, i: np.take_along_axis(t, i.astype(np.intp), axis=1)),
    Primitive("vf_gather", (Operand("float*"), Operand("vi", 0, 15)), "vf",
              lambda t, i: np.take_along_axis(t, i.astype(np.intp), axis=1)),
    Primitive("vi_gather", (Operand("int32*"), Operand("vi", 0, 60)), "vi",
              lambda t, i: np.take_along_axis(_words_at(t), i.astype(np.intp), axis=1)),
    # of four codes a lane at once: the table and the four vectors are of types of their own
    *(Primitive(name, (Operand("float*"), _CODE), "vf", partial(_looked_up, byte),
                f"vf_part<{byte}>(vf_lookup4(vf_table({{0}}), {{1}}))")
      for byte, name in enumerate(("vf_table", "vf_lookup4", "vf_part", "vf_part"))),
    # bytes of a sign, so many bits of an exponent, and a mantissa, as f16
    *(Primitive("vf_small4", (_VB,), "vf", partial(_small, exponent, exponent - 1),
                f"vf_part<{exponent - 1}>(vf_small4<{exponent}>({{0}}))")
      for exponent in (1, 2, 3, 4)),
    # f16 by their low and high bytes, 16 in every quarter
    *(Primitive("vf_halves4", (_VB, _VB), "vf", partial(_halves_of, part),
                f"vf_part<{part}>(vf_halves4({{0}}, {{1}}))") for part in range(4)),
    # the 4x4 words of every four lanes of four vectors, transposed
    *(Primitive(name, (_VI, _VI, _VI), "vi", partial(_turned, part),
                f"vi_part<{part}>(vi_turn({{0}}, {{1}}, {{2}}, vi_xor({{0}}, {{1}})))")
      for part, name in enumerate(("vi_turn", "vi_turn", "vi_part", "vi_part"))),
    *(Primitive("vf_pick", (Operand("float*"), Operand(kind, 0, 15)), "vf",
                partial(_picked_floats, stride), f"vf_pick<{stride}>({{0}}, {{1}})")
      for stride, kind in ((1, "uint8*"), (2, "table32*"), (4, "table64*"))),
    Primitive("vf_from_f16", (_VI,), "vf",
              lambda a: _f32((a & 0xFFFF).astype(np.uint16).view(np.float16))),
    # counts beyond 31 leave nothing
    Primitive("vi_sllv", (_VI, Operand("vi", -40, 70)), "vi",
              lambda a, n: _select((n >= 0) & (n < 32),
                                   _wrap(a.astype(np.int64) << np.clip(n, 0, 31)), a * 0)),
    Primitive("vi_srlv", (_VI, Operand("vi", 0, 70)), "vi",
              lambda a, n: _select(n < 32, (a.view(np.uint32) >> np.clip(n, 0, 31).view(
                  np.uint32)).view(np.int32), a * 0)),
    # comparisons: masks, which are false where either operand is a NaN
    Primitive("vf_lt", (_VF, _VF), "vf", lambda a, b: _select(a < b, a, b),
              "vf_select(vf_lt({0}, {1}), {0}, {1})"),
    Primitive("vf_le", (_VF, _VF), "vf", lambda a, b: _select(a <= b, a, -b),
              "vf_select(vf_le({0}, {1}), {0}, vf_mul(vf_set1(-1.0f), {1}))"),
    Primitive("vf_eq", (_VF, _VF), "vf", lambda a, b: _select(a == b, np.ones_like(a), b),
              "vf_select(vf_eq({0}, {1}), vf_set1(1.0f), {1})"),
    Primitive("vf_select", (_VF, _VF, _VF), "vf", lambda m, a, b: _select(m == 0, a, b),
              "vf_select(vf_eq({0}, vf_zero()), {1}, {2})"),
    Primitive("vf_any", (_VF, _VF), "int",
              lambda a, b: (a < b).any(axis=1, keepdims=True).astype(np.int32),
              "vf_any(vf_lt({0}, {1}))"),
    Primitive("vi_round_f32", (Operand("vf", -2147483520.0, 2147483520.0),), "vi",
              lambda a: np.rint(a).astype(np.int32)),
    # i32 lanes
    Primitive("vi_zero", (), "vi", lambda: np.zeros((1, LANES), np.int32)),
    Primitive("vi_set1", (Operand("int"),), "vi", lambda x: np.repeat(x, LANES, axis=1)),
    Primitive("vi_load", (Operand("int32*"),), "vi", lambda p: p),
    Primitive("vi_store", (_VI,), "int32*", lambda x: x, "vi_store({out}, {0})"),
    Primitive("vi_load_u16", (Operand("uint16*"),), "vi", lambda p: p.astype(np.int32)),
    # the low halves
    Primitive("vi_store_u16", (_VI,), "uint16*", lambda x: x.astype(np.uint16),
              "vi_store_u16({out}, {0})"),
    Primitive("vi_load_u8", (Operand("uint8*"),), "vi", lambda p: p.astype(np.int32)),
    Primitive("vi_load_u8_n", (Operand("uint8*"), _COUNT), "vi",
              lambda p, n: _head(p, n).astype(np.int32)),
    Primitive("vi_store_i8", (Operand("vi", -128, 127),), "int8*", lambda x: x.astype(np.int8),
              "vi_store_i8({out}, {0})"),
    # the low bytes
    Primitive("vi_store_u8", (_VI,), "uint8*", lambda x: x.astype(np.uint8),
              "vi_store_u8({out}, {0})"),
    Primitive("vi_store_u8_n", (_VI, _COUNT), "uint8*", lambda x, n: _head(x.astype(np.uint8), n),
              "vi_store_u8_n({out}, {0}, {1})"),
    Primitive("vi_and", (_VI, _VI), "vi", lambda a, b: a & b),
    Primitive("vi_or", (_VI, _VI), "vi", lambda a, b: a | b),
    Primitive("vi_xor", (_VI, _VI), "vi", lambda a, b: a ^ b),
    Primitive("vi_or_and", (_VI, _VI, _VI), "vi", lambda a, b, m: a | (b & m)),
    Primitive("vi_add", (_VI, _VI), "vi", lambda a, b: _wrap(a.astype(np.int64) + b)),
    Primitive("vi_sub", (_VI, _VI), "vi", lambda a, b: _wrap(a.astype(np.int64) - b)),
    Primitive("vi_mul", (_VI, _VI), "vi", lambda a, b: _wrap(a.astype(np.int64) * b)),
    *_shifts("vi_srl", lambda n, a: (a.view(np.uint32) >> np.uint32(n)).view(np.int32)),
    *_shifts("vi_sll", lambda n, a: (a.view(np.uint32) << np.uint32(n)).view(np.int32)),
    *_shifts("vi_sra", lambda n, a: a >> np.int32(n)),
    Primitive("vi_zip_low", (_VI, _VI), "vi", lambda a, b: _zip(a[:, :8], b[:, :8])),
    Primitive("vi_zip_high", (_VI, _VI), "vi", lambda a, b: _zip(a[:, 8:], b[:, 8:])),
    Primitive("vi_reduce_add", (Operand("vi", -(2**26), 2**26),), "int",
              lambda a: a.sum(axis=1, keepdims=True, dtype=np.int32)),
    # bytes
    Primitive("vb_table", (Operand("uint8*"),), "vb", lambda t: np.tile(t, 4)),
    Primitive("vb_lookup", (Operand("uint8*"), _CODE), "vb",
              lambda t, c: np.take_along_axis(t, c.astype(np.intp), axis=1),
              "vb_lookup(vb_table({0}), {1})"),
    # each quarter of the codes has a table of its own
    Primitive("vb_lookup", (_VB, _CODE), "vb",
              lambda t, c: np.take_along_axis(t, c + np.arange(4 * LANES) // 16 * 16, axis=1)),
    # wider tables are of a type of their own: seen through their entries
    *(Primitive(f"{name}{n}", (Operand(f"table{n}*"), Operand("vb", 0, n - 1)), "vb",
                lambda t, c: np.take_along_axis(t, c.astype(np.intp), axis=1),
                f"vb_lookup{n}(vb_table{n}({{0}}), {{1}})")
      for n in (32, 64) for name in ("vb_table", "vb_lookup")),
    # bytes of a lane by the control's: 0 to 3, or any negative one for none
    Primitive("vb_pick", (_VB, Operand("vb", 0, 3), _VB), "vb", _picked,
              "vb_pick({0}, vi_or({1}, vi_and({2}, vi_set1(INT32_MIN + 0x808080))))"),
    Primitive("vb_digit3", (_VB,), "vb", lambda r: (r.astype(np.int32) * 3 >> 8).astype(np.uint8)),
    Primitive("vb_next3", (_VB,), "vb", lambda r: r * np.uint8(3)),
    Primitive("vb_max", (_VB, _VB), "vb", np.maximum),
    # dot products: 129 * 127 * 2 is the most that a narrow lane of 16 bits takes in a step
    Primitive("vq_init", (_VI,), "vi", lambda z: z, "vq_finish(vq_init({0}))"),
    Primitive("vq_finish", (_VI,), "vi", lambda z: z, "vq_finish(vq_init({0}))"),
    Primitive("vq_flush", (_VI,), "vi", lambda z: z, "vq_finish(vq_flush(vq_init({0})))"),
    Primitive("vq_dot", (_VI, Operand("vb", 0, 129), Operand("x4", -127, 127)), "vi", _dot,
              "vq_finish(vq_flush(vq_dot(vq_init({0}), {1}, {2})))"),
    Primitive("vq_dot_each", (_VI, Operand("vb", 0, 127), Operand("vx", -127, 127)), "vi",
              _dot_each, "vq_finish(vq_flush(vq_dot_each(vq_init({0}), {1}, {2})))"),
    Primitive("vq_dot_signed_each", (_VI, _VB, Operand("vx", -127, 127)), "vi",
              lambda z, c, x: _dot_each(z, c.view(np.int8), x),
              "vq_finish(vq_flush(vq_dot_signed_each(vq_init({0}), {1}, {2})))", narrow=True),
    Primitive("vq_dot_signed", (_VI, _VB, Operand("x4", -127, 127)), "vi",
              lambda z, c, x: _dot(z, c.view(np.int8), x),
              "vq_finish(vq_flush(vq_dot_signed(vq_init({0}), {1}, {2})))", narrow=True),
    Primitive("vi_dot_s8s16", (_VI, _VB, Operand("pairs*")), "vi",
              lambda z, c, x: _dot(z, c.view(np.int8), x[:, [0, 2, 1, 3]].astype(np.int64)),
              "vi_dot_s8s16({0}, {1}, reinterpret_cast<const int32_t*>({2}))", limited=True),
    # exact: a lane holds the sum of 4 products of unsigned x by signed weights, whatever they are
    Primitive("vi_dot_u8s8", (_VI, _VB, Operand("u4")), "vi",
              lambda z, w, x: _dot(z, w.view(np.int8), x.astype(np.int64))),
    # bf16, to nearest even
    Primitive("vf_store_bf16", (_FINITE,), "uint16*", _bf16, "vf_store_bf16({out}, {0})"),
    Primitive("vf_store_bf16_n", (_FINITE, _COUNT), "uint16*", lambda x, n: _head(_bf16(x), n),
              "vf_store_bf16_n({out}, {0}, {1})"),
    # pairs of bf16, even k in the low half
    Primitive("vi_pack_bf16", (_FINITE, _FINITE), "vp",
              lambda even, odd: np.stack([_bf16(even), _bf16(odd)], axis=2).reshape(len(even), -1)),
    Primitive("vf_dot_bf16", (Operand("vf", 0, 1e4), Operand("vp", *_POSITIVE_BF16),
                              Operand("x2", *_POSITIVE_BF16)), "vf", _dot_bf16, ulps=2),
    # tile registers: whole ones (the tests of the kernels have parts of them)
    Primitive("vt_dot_u8s8", (Operand("tile32*"), Operand("tileu8*"), Operand("tiles8*")),
              "tile32*", _tile_u8s8, _tile_call("vt_dot_u8s8"), tiles=True),
    Primitive("vt_dot_bf16", (Operand("tilef*", 0, 1e4), Operand("tilebf*", *_POSITIVE_BF16),
                              Operand("tilebf*", *_POSITIVE_BF16)), "tilef*", _tile_bf16,
              _tile_call("vt_dot_bf16"), ulps=16, tiles=True),
)
"""Every function of an ISA header, and the intrinsic-free meaning of each."""


def _gelu_tanh(x: Array) -> Array:
    x = _f64(x)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return _f32(x / (1 + np.exp(-2 * inner)))  # 0.5 (1 + tanh z) = 1 / (1 + e^-2z)


ELEMENTWISE: tuple[Primitive, ...] = (
    Primitive("vf_exp", (_VF,), "vf", lambda x: _f32(np.exp(_f64(x))), ulps=1),
    Primitive("vf_exp_below", (Operand("vf", -86, 0),), "vf", lambda x: _f32(np.exp(_f64(x))),
              ulps=5),
    Primitive("vf_tanh", (_VF,), "vf", lambda x: _f32(np.tanh(_f64(x))), ulps=2),
    Primitive("vf_silu", (Operand("vf", -80.0, 3e38),), "vf",
              lambda x: _f32(_f64(x) / (1 + np.exp(-_f64(x)))), ulps=2),
    Primitive("vf_gelu_tanh", (Operand("vf", -7.0, 1e9),), "vf", _gelu_tanh, ulps=128),
)
"""The functions of epilogue.h on the ranges where their accuracy is relative."""


def names() -> frozenset[str]:
    """The functions that every complete ISA header defines: all but those that some rows need."""
    return frozenset(p.name for p in PRIMITIVES if not (p.narrow or p.limited or p.tiles))
