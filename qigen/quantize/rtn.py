"""Round to nearest: every code is the one whose value lies nearest to the weight.

Scales and minima are rounded to their stored type before the codes are chosen, so that the codes
are the nearest ones to what the stored scale really says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import MINIFLOATS, Array, Float32Array, Format
from qigen.formats.tensor import (
    BASE3_RUNS,
    QuantizedTensor,
    as_float32,
    check_columns,
    float_bits,
    kept_weights,
    mask_field,
)
from qigen.formats.words import ZEROS, fitted, most_probable
from qigen.quantize.low_rank import with_residual

# Weights handled at a time, so that the temporaries stay in a level-2 cache.
_CHUNK_WEIGHTS = 1 << 16


CLIP_FACTORS = tuple(1 - 0.04 * i for i in range(16))
"""The parts of a group's range that a clipping search tries."""


@dataclass(frozen=True)
class Clip:
    """A search for the scales: of a group's range the part that leaves the least squared error.

    ``importance`` (float32 [K], not negative) is the weight of every column in that error; None:
    all alike.
    """

    importance: Float32Array | None = None
    factors: tuple[float, ...] = CLIP_FACTORS

    def columns(self, start: int, stop: int) -> Clip:
        """The same search for columns ``[start, stop)`` alone."""
        h = self.importance
        return self if h is None else replace(self, importance=h[start:stop])


def quantize_rtn(w: Float32Array, fmt: Format, clip: Clip | None = None) -> QuantizedTensor:
    """Quantize ``w`` (float32 [N, K]) to any format but those with two levels of integer scales.

    Rows with a minimum 'm' or a zero point 'z' spread 2^b codes from the least to the greatest
    weight of a group (for an integer zero point, zero included). Symmetric rows and tables take,
    group by group, the best of a few scales in squared error: the weight of greatest magnitude on
    the outermost level (the scale may be negative), its magnitude on the greatest, and the mean
    magnitude on the levels' own; power-of-two scales the exponent that OCP names and the next one.
    Tables that are data are found by Lloyd's iteration. With ``clip`` a group's range may be cut
    where that lessens its squared error (symmetric rows always take the best scale). If K is no
    multiple of a block, the codes past K stand for nothing: they are the zero (symmetric) or 0.

    Raises BadInput if a weight is NaN, infinite or too large for the format's scale, Unsupported if
    there is no rule for the format.
    """
    if w.ndim != 2 or w.dtype != np.float32:
        raise BadInput(f"the weight is {w.dtype}{list(w.shape)}; give a float32 matrix [N, K]")
    n, k = w.shape
    check_rounding(fmt, k)
    if fmt.rank:
        return with_residual(w, fmt, lambda x, base: quantize_rtn(x, base, clip),
                             clip.importance if clip is not None else None)
    nblocks = -(-k // fmt.block)
    fields = {field.name: np.zeros(field.shape(n, nblocks), field.dtype)
              for field in fmt.fields}
    rows = fmt.sharing or 1  # that are looked at together
    step = max(1, _CHUNK_WEIGHTS // max(1, k) // rows) * rows
    for a in range(0, n, step):
        chunk = w[a : a + step]
        if not np.isfinite(chunk).all():
            row = a + int(np.argmin(np.isfinite(chunk).all(axis=1)))
            raise BadInput(f"row {row} of the weight has a NaN or an infinity; repair the model "
                           "first", fmt.name)
    table = tensor_table(w, fmt, clip) if fmt.has("lut") and n else None
    if fmt.vector:
        return QuantizedTensor(fmt, (n, k), _by_codebook(w, fmt) if n else fields)
    if fmt.has("dict"):
        return QuantizedTensor(fmt, (n, k), _by_words(w, fmt))
    if fmt.has("qc"):
        return _with_columns(w, fmt, clip)
    for a in range(0, n, step):
        chunk = np.ascontiguousarray(w[a : a + step])
        part = _dense(chunk, fmt) if fmt.float_kind else coded(chunk, fmt, table, clip)
        for name, array in part.items():
            target = fields[name] if array.shape[0] == 1 == fields[name].shape[0] else (
                fields[name][a : a + step])
            target[...] = array.reshape(target.shape)
    return QuantizedTensor(fmt, (n, k), fields)


def check_rounding(fmt: Format, k: int) -> None:
    """Raise Unsupported if :func:`quantize_rtn` does not take the format, BadInput if rows of ``k``
    weights cannot be cut into its blocks.
    """
    two_levels = fmt.has("sub") and not (fmt.field("sub").number or fmt.has("z"))
    if two_levels or fmt.has("dmin"):
        raise Unsupported("there is no rounding to nearest for scales that are quantized "
                          "themselves; take a group row such as s4g32, or q8_0, q4_0, q4_1, q5_0, "
                          "q5_1", fmt.name)
    check_columns(fmt, k)
    if fmt.has("qc") and k > 1 << 16:
        raise Unsupported(f"columns apart are numbered up to 65535, and the weight has {k}; take a "
                          "format with outliers, such as s4g128_o3", fmt.name)


def grouped(chunk: Float32Array, fmt: Format) -> Float32Array:
    """[n, K] as [n, groups, group]; a short last group is filled so that it changes nothing.

    The fill is the last weight where the range counts and zero where the magnitude does.
    """
    n, k = chunk.shape
    if fmt.channel or (fmt.has("lut") and fmt.field("lut").scope == "row"):
        return chunk.reshape(n, 1, k)
    short = -k % fmt.block
    if short:
        spread = fmt.has("m") or fmt.has("z") or fmt.has("lut")
        chunk = np.pad(chunk, ((0, 0), (0, short)), "edge" if spread else "constant")
    return chunk.reshape(n, -1, fmt.group)


def _stored(scale: Float32Array, fmt: Format, name: str = "d") -> tuple[Array, Float32Array]:
    """The bits of ``scale`` in the type of the field ``name`` and the float32 they stand for."""
    number = fmt.field(name).number
    if number in MINIFLOATS:
        small = MINIFLOATS[number]
        bits = _nearest_level(np.abs(scale), small.values(np.arange(1 << (small.bits - 1))),
                              small.top).astype(np.uint8)
        return bits, small.values(bits)
    bits = float_bits(scale, number)
    values = as_float32(number, bits)
    if not np.isfinite(values).all():
        raise BadInput(f"a weight is too large for a scale of {fmt.field(name).bits} bits; keep "
                       "this tensor in f32", fmt.name)
    return bits, values


def _divided(x: Float32Array, scale: Float32Array) -> Float32Array:
    """x / scale, and 0 where the scale is 0."""
    quotient: Float32Array = np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)
    return quotient


def _nearest_level(x: Float32Array, levels: Float32Array, top: float = np.inf) -> Array:
    """The index of the level nearest to each ``x``; levels beyond ``top`` are not taken."""
    found: Array
    order = np.argsort(levels, kind="stable")
    order = order[np.abs(levels[order]) <= top]
    ordered = levels[order]
    middles = (ordered[1:] + ordered[:-1]) / np.float32(2)
    found = order[np.searchsorted(middles, x)]
    return found


def coded(chunk: Float32Array, fmt: Format, table: Float32Array | None = None,
          clip: Clip | None = None) -> dict[str, Array]:
    """The field arrays of rows ``chunk`` [n, K]; ``table`` is the table of the whole weight."""
    n, k = chunk.shape
    if fmt.has("oc"):
        return _with_outliers(chunk, fmt, clip)
    if fmt.mask is not None:
        return _masked(chunk, fmt, clip)
    x = grouped(chunk, fmt)
    search = _Search(x, fmt, clip)
    if fmt.has("lut"):
        part = _by_table(x, fmt, table, search)
    elif fmt.has("subz"):
        part = _quantized_scales(x, fmt, search)
    elif fmt.has("z") and fmt.has("sub"):
        part = _two_levels(x, fmt)
    elif fmt.has("m") or fmt.has("z"):
        part = _spread(x, fmt, search)
    elif fmt.has("e"):
        part = _powers_of_two(x, fmt, search)
    elif fmt.has("sub"):
        part = _small_float_scales(x, fmt, search)
    else:
        part = _scaled(x, fmt, search)
    return {**part, "codes": blocks_of_codes(part["codes"].reshape(n, -1), k, fmt)}


class _Search:
    """A :class:`Clip` laid out as the groups of ``x`` [n, groups, size] are."""

    def __init__(self, x: Float32Array, fmt: Format, clip: Clip | None) -> None:
        self.factors = clip.factors if clip is not None else (1.0,)
        self.importance: Float32Array | None = None
        if clip is not None and clip.importance is not None:
            h = np.zeros(x.shape[1] * x.shape[2], np.float32)
            h[: len(clip.importance)] = clip.importance
            self.importance = h.reshape(x.shape[1:])

    def error(self, miss: Float32Array) -> Float32Array:
        """float32 [n, groups, 1]: the squared error of every group."""
        if self.importance is None:
            error: Float32Array = np.einsum("nbk,nbk->nb", miss, miss)[..., None]
        else:
            error = np.einsum("nbk,nbk,bk->nb", miss, miss, self.importance)[..., None]
        return error

    def range(self, x: Float32Array, least: Float32Array, greatest: Float32Array, top: float,
              whole: bool) -> tuple[Float32Array, Float32Array]:
        """The part of [least, greatest] (each [n, groups, 1]) that ``top`` + 1 evenly spaced codes
        cover with the least error; ``whole``: the zero is one of them."""
        if len(self.factors) == 1:
            return least, greatest
        ends = [least, greatest]
        best: Float32Array | None = None
        # both ends together, and then each of them alone
        for moved in ((0, 1), (0,), (1,)):
            start = list(ends)
            for factor in self.factors:
                if best is not None and factor == 1:
                    continue
                tried = [end * np.float32(factor) if i in moved else end
                         for i, end in enumerate(start)]
                step = (tried[1] - tried[0]) / np.float32(top)
                low = np.rint(_divided(tried[0], step)) * step if whole else tried[0]
                codes = np.rint(_divided(x - low, step)).clip(0, top)
                codes *= step
                codes += low
                codes -= x
                error = self.error(codes)
                if best is None:
                    best = error
                    continue
                better = error < best
                best = np.where(better, error, best)
                ends = [np.where(better, t, end) for t, end in zip(tried, ends, strict=True)]
        return ends[0], ends[1]


def _padded(chunk: Float32Array, fmt: Format) -> Float32Array:
    """[n, K] as [n, nblocks, block], with zeros past K."""
    n, k = chunk.shape
    padded: Float32Array = np.pad(chunk, ((0, 0), (0, -k % fmt.block)))
    blocks: Float32Array = padded.reshape(n, -1, fmt.block)
    return blocks


def _with_outliers(chunk: Float32Array, fmt: Format, clip: Clip | None) -> dict[str, Array]:
    """The greatest weights of every block apart: the base format rounds zeros in their place, and
    what it makes of them is made up for."""
    n, k = chunk.shape
    count = fmt.field("oc").count
    fields = tuple(f for f in fmt.fields if f.name not in ("oc", "ov"))
    base = replace(fmt, fields=fields)
    x = _padded(chunk, fmt)
    order = np.argpartition(-np.abs(x), count - 1, axis=2)[..., :count]
    places = np.sort(order, axis=2)
    rest = x.copy()
    np.put_along_axis(rest, places, np.float32(0), axis=2)
    rest_rows = np.ascontiguousarray(rest.reshape(n, -1)[:, :k])
    part = coded(rest_rows, base, None, clip)
    shaped = {f.name: part[f.name].reshape(f.shape(n, x.shape[1])) for f in fields}
    rounded = _padded(QuantizedTensor(base, (n, k), shaped).dequantize(), fmt)
    missing = np.take_along_axis(x - rounded, places, axis=2)
    bits, _ = _stored(np.ascontiguousarray(missing), fmt, "ov")
    return {**shaped, "oc": places.astype(np.uint8), "ov": bits}


def _with_columns(w: Float32Array, fmt: Format, clip: Clip | None) -> QuantizedTensor:
    """The columns of greatest norm apart, zeros in the base format; if the weight has fewer columns
    than the format keeps, its last one comes again with zeros."""
    n, k = w.shape
    count = fmt.field("qc").count
    base = replace(fmt, fields=tuple(f for f in fmt.fields if f.name not in ("qc", "qv")))
    taken = min(count, k)
    columns = np.sort(np.argsort(-np.square(w).sum(axis=0), kind="stable")[:taken])
    rest = w.copy()
    rest[:, columns] = 0
    rounded = quantize_rtn(rest, base, clip)
    missing = np.zeros((n, 1, count), np.float32)
    missing[:, 0, :taken] = w[:, columns]
    if n:
        missing[:, 0, :taken] -= rounded.dequantize()[:, columns]
    bits, _ = _stored(missing, fmt, "qv")
    places = np.full((1, 1, count), columns.max(initial=0), np.uint16)
    places[0, 0, :taken] = columns
    return QuantizedTensor(fmt, (n, k), {**rounded.fields, "qc": places, "qv": bits})


def _masked(chunk: Float32Array, fmt: Format, clip: Clip | None) -> dict[str, Array]:
    """The N greatest of every M weights, or of those in the columns that rows share."""
    assert fmt.mask is not None
    keep, of = fmt.mask
    n, k = chunk.shape
    fields = tuple(replace(f, count=fmt.block) if f.name == "codes" else f
                   for f in fmt.fields if f.name not in ("ix", "bm", "vm"))
    base = replace(fmt, fields=fields, mask=None)
    x = _padded(chunk, fmt).reshape(n, -1, of)
    if fmt.sharing:
        places = np.nonzero(kept_weights(fmt, np.abs(x)))[2].reshape(n, -1, keep)
    else:
        places = np.sort(np.argpartition(-np.abs(x), keep - 1, axis=2)[..., :keep], axis=2)
    rest = np.zeros_like(x)
    np.put_along_axis(rest, places, np.take_along_axis(x, places, axis=2), axis=2)
    part = coded(np.ascontiguousarray(rest.reshape(n, -1)[:, :k]), base, None, clip)
    codes = np.take_along_axis(part["codes"].reshape(n, -1, of), places, axis=2)
    count = fmt.field("codes").count
    return {**part, "codes": codes.reshape(n, -1, count),
            **mask_field(fmt, places.reshape(n, -1, count))}


def _quantized_scales(x: Float32Array, fmt: Format, search: _Search) -> dict[str, Array]:
    """SpQR: groups with scales and zero points that are themselves quantized, one step a block."""
    n, _, size = x.shape
    groups = fmt.block // fmt.group
    blocks = x.reshape(n, -1, groups, size)
    top = np.float32((1 << fmt.code_bits) - 1)
    low, high = search.range(x, np.minimum(x.min(axis=2, keepdims=True), 0),
                             np.maximum(x.max(axis=2, keepdims=True), 0), float(top), False)
    least, greatest = low.reshape(n, -1, groups), high.reshape(n, -1, groups)

    def fit(values: Float32Array, bits: int) -> tuple[Array, Float32Array, Float32Array]:
        """(codes, step, zero) of values [n, nblocks, groups]: values = step (code - zero)."""
        last = np.float32((1 << bits) - 1)
        low, high = values.min(axis=2, keepdims=True), values.max(axis=2, keepdims=True)
        low = np.where(low == high, np.minimum(low, 0), low)
        step = as_float32("f16", float_bits((high - low) / last, "f16"))
        zero = as_float32("f16", float_bits(_divided(-low, step), "f16"))
        codes = np.rint(_divided(values, np.broadcast_to(step, values.shape)) + zero).clip(0, last)
        return codes.astype(np.uint8), step, zero

    sub, d, subz = fit((greatest - least) / top, fmt.field("sub").bits)
    scale = d * (sub.astype(np.float32) - subz)
    z, zd, zz = fit(_divided(-least, scale), fmt.field("z").bits)
    zero = zd * (z.astype(np.float32) - zz)
    wanted = _divided(blocks, np.broadcast_to(scale[..., None], blocks.shape)) + zero[..., None]
    codes = np.rint(wanted).clip(0, top)
    part = {"codes": codes, "sub": sub, "z": z}
    for name, value in (("d", d), ("subz", subz), ("zd", zd), ("zz", zz)):
        part[name], _ = _stored(np.ascontiguousarray(value), fmt, name)
    return part


_BOOK_SAMPLE = 1 << 16
_BOOK_STEPS = 6


def _nearest_rows(x: Float32Array, centres: Float32Array) -> Array:
    """The index of the nearest centre [count, d] to every vector [n, d]."""
    half = (centres * centres).sum(axis=1) / np.float32(2)
    found = np.empty(len(x), np.int64)
    for a in range(0, len(x), 4096):
        found[a : a + 4096] = np.argmin(half - x[a : a + 4096] @ centres.T, axis=1)
    return found


def _cluster(x: Float32Array, count: int, rng: np.random.Generator) -> Float32Array:
    """float32 [count, d]: centres of the vectors [n, d] by Lloyd's iteration."""
    centres: Float32Array = x[rng.integers(0, len(x), count)].copy()
    for _ in range(_BOOK_STEPS):
        nearest = _nearest_rows(x, centres)
        number = np.bincount(nearest, minlength=count)
        for j in range(x.shape[1]):
            total = np.bincount(nearest, x[:, j], minlength=count)
            centres[:, j] = np.where(number > 0, total / np.maximum(number, 1), centres[:, j])
    return centres


def _book_of(x: Float32Array, bits: int, rng: np.random.Generator) -> tuple[Float32Array, Array]:
    """(entries [2^bits, d], code of every vector): clusters, and clusters of clusters past 8 bits,
    whose codes have the coarse cluster in the upper bits."""
    coarse = min(bits, 8)
    fine = bits - coarse
    sample = x[rng.permutation(len(x))[:_BOOK_SAMPLE]]
    centres = _cluster(sample, 1 << coarse, rng)
    codes = _nearest_rows(x, centres)
    if not fine:
        return centres, codes
    entries = np.zeros((1 << bits, x.shape[1]), np.float32)
    for c in range(1 << coarse):
        mine = np.flatnonzero(codes == c)
        part = entries[c << fine : (c + 1) << fine]
        if len(mine) == 0:
            part[...] = centres[c]
            continue
        part[...] = _cluster(x[mine], 1 << fine, rng)
        codes[mine] = (c << fine) + _nearest_rows(x[mine], part)
    return entries, codes


def _by_codebook(w: Float32Array, fmt: Format) -> dict[str, Array]:
    """Additive codebooks of the whole weight: each of what the ones before leave over."""
    n = len(w)
    rng = np.random.default_rng(0)
    codes_field = fmt.field("codes")
    books = codes_field.count * fmt.vector // fmt.block
    d_bits, d = _stored(np.sqrt(np.mean(w * w, axis=1, keepdims=True))[..., None], fmt)
    rest = _divided(_padded(w, fmt), np.broadcast_to(d, (n, 1, 1))).reshape(-1, fmt.vector)
    entries, codes = [], []
    for _ in range(books):
        book, chosen = _book_of(rest, codes_field.bits, rng)
        bits, book = _stored(np.ascontiguousarray(book), fmt, "book")
        rest = rest - book[chosen]
        entries.append(bits)
        codes.append(chosen)
    chosen = np.stack(codes, axis=1).reshape(n, -1, codes_field.count)
    return {"codes": chosen.astype(codes_field.dtype), "d": d_bits,
            "book": np.concatenate(entries).reshape(1, 1, -1)}


def _by_words(w: Float32Array, fmt: Format) -> dict[str, Array]:
    """Ternary: of every row the greatest weights, as many as the dictionary is made for, become
    plus or minus their mean magnitude; where the words of a block do not suffice, fewer."""
    n, k = w.shape
    table = most_probable(fmt.code_bits, int(fmt.zero), fmt.level_count)
    keep = max(1, round((1 - ZEROS) * k))
    magnitude = np.abs(w)
    least = np.partition(magnitude, k - keep, axis=1)[:, k - keep, None]
    kept = (magnitude >= least) & (magnitude > 0)
    mean = np.where(kept, magnitude, 0).sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
    d_bits, _ = _stored(mean.astype(np.float32)[:, None, None], fmt)
    codes = np.where(kept, np.where(w > 0, 2, 0), 1).astype(np.uint8)
    blocks = blocks_of_codes(codes, k, fmt).astype(np.uint8)
    sizes = _padded(np.ascontiguousarray(magnitude), fmt).reshape(-1, fmt.block)
    words = fitted(blocks.reshape(sizes.shape), sizes, table, fmt.words, int(fmt.zero))
    field = fmt.field("codes")
    return {"codes": words.reshape(n, -1, fmt.words).astype(field.dtype), "d": d_bits,
            "dict": table.reshape(1, 1, -1)}


def blocks_of_codes(codes: Array, k: int, fmt: Format) -> Array:
    """The codes [n, at least k] as blocks, the places past ``k`` filled."""
    n = len(codes)
    fill = int(fmt.zero) if fmt.zero == int(fmt.zero) else 0
    out = np.full((n, -(-k // fmt.block) * fmt.block), fill, np.uint8)
    out[:, :k] = codes[:, :k]
    blocks = out.reshape(n, -1, fmt.block)
    return _base3(blocks) if fmt.base3 else blocks.astype(fmt.field("codes").dtype)


def _base3(codes: Array) -> Array:
    """uint8 [n, nblocks, 52]: codes 0 to 2 as base-3 bytes, the inverse of their decoding."""
    out = np.empty((*codes.shape[:2], 52), np.uint8)
    for byte, nbytes, ndigits, first in BASE3_RUNS:
        number = np.zeros((*codes.shape[:2], nbytes), np.uint32)
        for j in range(5):
            digit = codes[..., first + j * nbytes : first + (j + 1) * nbytes] if j < ndigits else 0
            number = number * np.uint32(3) + digit
        scaled = number * np.uint32(256) + np.uint32(242)
        out[..., byte : byte + nbytes] = scaled // np.uint32(243)
    return out


def _spread(x: Float32Array, fmt: Format, search: _Search) -> dict[str, Array]:
    """Codes from the least to the greatest weight: W = d c + m or d (c - z)."""
    top = np.float32((1 << fmt.code_bits) - 1)
    least, greatest = x.min(axis=2, keepdims=True), x.max(axis=2, keepdims=True)
    if fmt.has("m"):
        least, greatest = search.range(x, least, greatest, float(top), False)
        m_bits, m = _stored(least, fmt, "m")
        # Each end is divided by itself: the difference of two finite floats may be infinite.
        d_bits, d = _stored(greatest / top - least / top, fmt)
        codes = np.rint(_divided(x - m, d)).clip(0, top)
        return {"codes": codes, "d": d_bits, "m": m_bits}
    whole = not fmt.field("z").number
    if whole:
        least, greatest = np.minimum(least, 0), np.maximum(greatest, 0)
    else:  # a group of equal weights has a range, too: from zero
        same = least == greatest
        least = np.where(same, np.minimum(least, 0), least)
        greatest = np.where(same, np.maximum(greatest, 0), greatest)
    least, greatest = search.range(x, least, greatest, float(top), whole)
    d_bits, d = _stored(greatest / top - least / top, fmt)
    exact = _divided(-least, d)
    if whole:
        z = np.rint(exact).clip(0, top)
        z_bits = z.astype(np.uint8)
    else:
        z_bits, z = _stored(exact, fmt, "z")
    return {"codes": np.rint(_divided(x, d) + z).clip(0, top), "d": d_bits, "z": z_bits}


def _two_levels(x: Float32Array, fmt: Format) -> dict[str, Array]:
    """Rows scaled to 8 bits first, of which groups take 4: W = d sub (c - z). The magnitude 119
    leaves room for the rounding of the second step (QServe)."""
    d_bits, d = _stored(np.abs(x).max(axis=(1, 2), keepdims=True) / np.float32(119), fmt)
    bytes_ = np.rint(_divided(x, d)).clip(-127, 127)
    top = np.float32((1 << fmt.code_bits) - 1)
    least = np.minimum(bytes_.min(axis=2, keepdims=True), 0)
    greatest = np.maximum(bytes_.max(axis=2, keepdims=True), 0)
    sub = np.maximum(np.ceil((greatest - least) / top), 1)
    z = np.rint(-least / sub).clip(0, top)
    codes = np.rint(bytes_ / sub + z).clip(0, top)
    return {"codes": codes, "d": d_bits, "sub": sub.astype(np.uint8), "z": z.astype(np.uint8)}


def _codes(x: Float32Array, scale: Float32Array, fmt: Format,
           search: _Search) -> tuple[Array, Array]:
    """(the codes nearest to x / scale, the squared error of every group)."""
    levels = fmt.levels
    target = _divided(x, scale)
    if fmt.table is None and fmt.values is None and fmt.minifloat is None:
        top = fmt.level_count - 1
        codes = np.rint(target + np.float32(fmt.zero)).clip(0, top).astype(np.uint8)
    else:
        limit = fmt.minifloat.top if fmt.minifloat is not None else np.inf
        codes = _nearest_level(target, levels, limit).astype(np.uint8)
    miss = levels[codes] * scale
    miss -= x
    return codes, search.error(miss)


def better_of(best: tuple[Array, ...] | None, tried: tuple[Array, ...]) -> tuple[Array, ...]:
    """Group by group what has the less error of two ways to round: each is (error, what else there
    is of it), arrays whose last dimension is the group or of size 1. The first of equals stays."""
    if best is None:
        return tried
    better = tried[0] < best[0]
    return tuple(np.where(better, new, old) for new, old in zip(tried, best, strict=True))


def _best(x: Float32Array, fmt: Format, name: str, search: _Search,
          scales: Iterable[tuple[Array, Float32Array]]) -> dict[str, Array]:
    """Codes and the field ``name`` of the scale (bits, value) that has the least error."""
    best: tuple[Array, ...] | None = None
    for bits, value in scales:
        codes, error = _codes(x, value, fmt, search)
        best = better_of(best, (error, codes, bits))
    assert best is not None
    return {"codes": best[1], name: best[2]}


def _outermost(fmt: Format) -> tuple[float, float]:
    """(the level of greatest magnitude, the greatest level)."""
    levels = fmt.levels
    if fmt.minifloat is not None:
        return -fmt.minifloat.top, fmt.minifloat.top
    return float(levels[np.argmax(np.abs(levels))]), float(levels.max())


def _scaled(x: Float32Array, fmt: Format, search: _Search) -> dict[str, Array]:
    """Codes of groups with a scale of their own: W = d V(c)."""
    factor = np.float32(fmt.scale_factor)
    far, top = _outermost(fmt)
    least, greatest = x.min(axis=2, keepdims=True), x.max(axis=2, keepdims=True)
    extreme = np.where(-least > greatest, least, greatest)
    scales = [extreme / np.float32(far), np.abs(extreme) / np.float32(top)]
    if fmt.level_count <= 3 or fmt.name.startswith("bipolar"):
        mean = np.abs(x).mean(axis=2, keepdims=True)
        scales.append(mean / np.abs(fmt.levels).mean() if fmt.level_count < 3 else mean)
    scales += [scale * np.float32(f) for f in search.factors[1:] for scale in scales[:2]]
    stored = (_stored(scale / factor, fmt) for scale in scales)
    return _best(x, fmt, "d", search, ((bits, d * factor) for bits, d in stored))


def _powers_of_two(x: Float32Array, fmt: Format, search: _Search) -> dict[str, Array]:
    """Codes of groups with an e8m0 scale."""
    factor = np.float32(fmt.scale_factor)
    _, top = _outermost(fmt)
    top_exponent = int(np.floor(np.log2(top * fmt.scale_factor)))
    magnitude = np.abs(x).max(axis=2, keepdims=True)
    _, exponent = np.frexp(magnitude)  # magnitude = f 2^e with 1/2 <= f < 1
    first = exponent - 1 - top_exponent + 127

    def scale(add: int) -> tuple[Array, Float32Array]:
        e = np.clip(first + add, 0, 254)
        return e.astype(np.uint8), np.ldexp(factor, e - 127).astype(np.float32)

    adds = (0, 1) if len(search.factors) == 1 else (0, 1, -1)
    return _best(x, fmt, "e", search, (scale(add) for add in adds))


def _small_float_scales(x: Float32Array, fmt: Format, search: _Search) -> dict[str, Array]:
    """Codes of groups whose scales are small floats times an f32 scale of the row (nvfp4)."""
    small = MINIFLOATS[fmt.field("sub").number]
    factor = np.float32(fmt.scale_factor)
    _, top = _outermost(fmt)
    wanted = np.abs(x).max(axis=2, keepdims=True) / np.float32(top * factor)
    d_bits, d = _stored(wanted.max(axis=1, keepdims=True) / np.float32(small.top), fmt)
    exact = _divided(wanted, np.broadcast_to(d, wanted.shape))
    stored = (_stored(exact * np.float32(f), fmt, "sub") for f in search.factors)
    best = _best(x, fmt, "sub", search, ((bits, sub * d * factor) for bits, sub in stored))
    return {**best, "d": d_bits}


_LLOYD_STEPS = 8
_SEARCH_STEPS = 40
_SAMPLE = 1 << 16


def lloyd(x: Float32Array, count: int, importance: Float32Array | None = None,
          steps: int = _LLOYD_STEPS, start: Float32Array | None = None) -> Float32Array:
    """float32 [groups, count]: the centres of the values [groups, size], sorted.

    ``importance`` [groups, size], if given, weighs every value (Lloyd 1982, Max 1960; weighted as
    SqueezeLLM does). The first centres are ``start`` [groups, count], ascending, or the quantiles.
    """
    groups, size = x.shape
    order = np.argsort(x, axis=1, kind="stable")
    ordered = np.take_along_axis(x, order, axis=1)
    h = np.ones_like(ordered, np.float64)
    if importance is not None:
        h = np.take_along_axis(importance, order, axis=1).astype(np.float64)
        h += 1e-6 * h.mean(axis=1, keepdims=True) + 1e-30
    rows = np.arange(groups)[:, None]
    zeros = np.zeros((groups, 1))
    mass = np.concatenate([zeros, np.cumsum(h, axis=1)], 1)
    sums = np.concatenate([zeros, np.cumsum(h * ordered, axis=1)], 1)
    quantiles = ((np.arange(count) + 0.5) * size / count).astype(np.int64)
    centres = ordered[:, quantiles.clip(0, size - 1)] if start is None else start
    for _ in range(steps):
        middles = (centres[:, 1:] + centres[:, :-1]) / np.float32(2)
        if size <= 256:
            ends = (ordered[:, None, :] < middles[:, :, None]).sum(axis=2)
        else:
            ends = np.stack([np.searchsorted(o, m) for o, m in zip(ordered, middles, strict=True)])
        edges = np.concatenate([np.zeros_like(rows), ends, np.full_like(rows, size)], 1)
        number = np.diff(edges, axis=1)
        part = mass[rows, edges[:, 1:]] - mass[rows, edges[:, :-1]]
        total = sums[rows, edges[:, 1:]] - sums[rows, edges[:, :-1]]
        mean = total / np.where(part > 0, part, 1)
        moved = np.where((number > 0) & (part > 0), mean, centres).astype(np.float32)
        moved.sort(axis=1)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return np.sort(centres, axis=1)


def tensor_table(w: Float32Array, fmt: Format, clip: Clip | None = None) -> Float32Array | None:
    """float32 [2^bits]: the table that a whole weight shares, of weights divided by their group's
    magnitude; None if the table is not the weight's."""
    if not fmt.has("lut") or fmt.field("lut").scope != "tensor":
        return None
    step = max(1, w.size // _SAMPLE)
    x = grouped(np.ascontiguousarray(w[:: max(1, min(step, len(w)))][:1024]), fmt)
    magnitude = np.abs(x).max(axis=2, keepdims=True)
    scaled = _divided(x, np.broadcast_to(magnitude, x.shape)).reshape(1, -1)
    search = _Search(x, fmt, clip)
    importance = None
    if clip is not None:
        h = np.ones(x.shape[1:], np.float32) if search.importance is None else search.importance
        # an error of the table counts as much as the scale that it is multiplied by
        importance = (h * np.square(magnitude)).reshape(1, -1)
    steps = _LLOYD_STEPS if clip is None else _SEARCH_STEPS
    table: Float32Array = lloyd(scaled, fmt.field("lut").count, importance, steps)[0]
    return table


def _by_table(x: Float32Array, fmt: Format, table: Float32Array | None,
              search: _Search) -> dict[str, Array]:
    """Codes with tables that are data: of the weight (``table``), of rows or of groups."""
    if table is None:
        n, groups, size = x.shape
        h = search.importance
        if h is not None:
            h = np.broadcast_to(h, x.shape).reshape(n * groups, size)
        steps = _LLOYD_STEPS if len(search.factors) == 1 else _SEARCH_STEPS
        tables = lloyd(x.reshape(n * groups, size), fmt.field("lut").count, h, steps)
        bits, values = _stored(tables.reshape(n, groups, -1), fmt, "lut")
        return {"lut": bits, "codes": nearest_entry(x, values)}
    bits, values = _stored(np.ascontiguousarray(table.reshape(1, 1, -1)), fmt, "lut")
    magnitude = np.abs(x).max(axis=2, keepdims=True)
    best: tuple[Array, ...] | None = None
    for factor in search.factors:
        d_bits, d = _stored(magnitude * np.float32(factor), fmt)
        codes = nearest_entry(_divided(x, np.broadcast_to(d, x.shape)), values)
        best = better_of(best, (search.error(values[0, 0][codes] * d - x), codes, d_bits))
    assert best is not None
    return {"lut": bits, "d": best[2], "codes": best[1]}


def nearest_entry(x: Float32Array, values: Float32Array) -> Array:
    """The nearest of ascending ``values`` [.., .., count] to every number of its group."""
    middles = (values[..., 1:] + values[..., :-1]) / np.float32(2)
    codes = np.zeros(x.shape, np.uint8)
    for i in range(middles.shape[2]):
        codes += x > middles[..., i : i + 1]
    return codes


def _dense(chunk: Float32Array, fmt: Format) -> dict[str, Array]:
    """The bit patterns of ``chunk`` [n, K] rounded to nearest even in a dense float format."""
    bits = float_bits(chunk, fmt.float_kind or "")
    codes = np.zeros((len(chunk), -(-chunk.shape[1] // fmt.block) * fmt.block), bits.dtype)
    codes[:, : chunk.shape[1]] = bits
    infinity = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[fmt.float_kind or ""]
    if ((codes & codes.dtype.type(infinity)) == infinity).any():
        raise BadInput("a weight is too large for the format; keep this tensor in f32", fmt.name)
    return {"codes": codes.reshape(len(chunk), -1, fmt.block)}
