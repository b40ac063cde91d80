"""Tables that are data, found for the weights that they stand for.

A table of a row or group is the optimum of one-dimensional k-means (Lloyd 1982, Max 1960), weighted
by what each column's input counts for, as SqueezeLLM has it (Kim et al. 2023, with the Fisher
information in the place of the Hessian's diagonal). A table that a whole weight shares has scales
of groups beside it: both and the codes are found in turn, each the best for the other two.
"""

from __future__ import annotations

import numpy as np

from qigen.formats.algebra import Array, Float32Array, Format
from qigen.formats.tensor import QuantizedTensor, as_float32
from qigen.formats.tensor import float_bits as bits_of
from qigen.quantize.rtn import (
    Clip,
    better_of,
    blocks_of_codes,
    grouped,
    lloyd,
    nearest_entry,
    quantize_rtn,
)

_CHUNK_WEIGHTS = 1 << 20
"""Weights handled at a time."""


def kmeans(w: Float32Array, fmt: Format, importance: Float32Array | None, *,
           steps: int) -> QuantizedTensor:
    """``w`` float32 [N, K] in a format with a table that is data (field 'lut').

    ``importance`` float32 [K] weighs the columns; ``steps`` bounds the iterations of Lloyd's
    algorithm, and those over scales, table and codes where the weight shares the table. The result
    is never worse, in weighted squared error, than that of the search of method "clip".
    """
    start = quantize_rtn(w, fmt, Clip(importance))
    if not len(w):
        return start
    if fmt.field("lut").scope == "tensor":
        return _shared(w, start, importance, steps)
    fields = {name: array.copy() for name, array in start.fields.items()}
    rows = max(1, _CHUNK_WEIGHTS // w.shape[1])
    for a in range(0, len(w), rows):
        part = _apart(w[a : a + rows], start.rows(a, a + rows), importance, steps)
        for name, array in part.items():
            fields[name][a : a + rows] = array
    return QuantizedTensor(fmt, start.shape, fields)


def _weights_of_columns(fmt: Format, shape: tuple[int, ...], k: int,
                        importance: Float32Array | None) -> Float32Array:
    """float32 [groups, size]: what every column counts for, 0 past K."""
    h = np.zeros(shape[1] * shape[2], np.float32)
    h[:k] = 1 if importance is None else importance
    return h.reshape(shape[1:])


def _apart(w: Float32Array, start: QuantizedTensor, importance: Float32Array | None,
           steps: int) -> dict[str, Array]:
    """Tables of rows or groups: the best of three starts of Lloyd's algorithm for each."""
    fmt = start.format
    n, k = w.shape
    x = grouped(w, fmt)
    h = _weights_of_columns(fmt, x.shape, k, importance)
    flat = x.reshape(-1, x.shape[2])
    weight = np.broadcast_to(h, x.shape).reshape(flat.shape)
    count = fmt.field("lut").count
    least, greatest = flat.min(axis=1, keepdims=True), flat.max(axis=1, keepdims=True)
    even = least + (greatest - least) * ((np.arange(count, dtype=np.float32) + 0.5) / count)
    quantiles = np.quantile(flat, (np.arange(count) + 0.5) / count, axis=1).T.astype(np.float32)

    def rounded(bits: Array) -> tuple[Array, ...]:
        table = as_float32("f16", bits).reshape(-1, count)
        codes = nearest_entry(flat[:, None], table[:, None])[:, 0]
        return _error(flat, table, codes, weight)[:, None], table, codes

    best = rounded(start.fields["lut"])
    for first in (even, quantiles, (even + quantiles) / 2):
        table = lloyd(flat, count, weight, steps, start=first)
        best = better_of(best, rounded(bits_of(table, "f16")))
    _, table, codes = best
    shape = start.fields["lut"].shape
    return {"lut": bits_of(table, "f16").reshape(shape),
            "codes": blocks_of_codes(codes.reshape(n, -1), k, fmt)}


def _error(x: Float32Array, table: Float32Array, codes: Array,
           weight: Float32Array) -> Float32Array:
    """float32 [groups]: the weighted squared error of groups ``x`` [groups, size]."""
    miss = np.take_along_axis(table, codes.astype(np.intp), axis=1) - x
    error: Float32Array = np.einsum("gk,gk,gk->g", miss, miss, weight)
    return error


def _shared(w: Float32Array, start: QuantizedTensor, importance: Float32Array | None,
            steps: int) -> QuantizedTensor:
    """One table and scales of groups, in turn."""
    fmt = start.format
    n, k = w.shape
    count = fmt.field("lut").count
    rows = max(1, _CHUNK_WEIGHTS // k)
    table = as_float32("f16", start.fields["lut"]).reshape(count)
    scale = as_float32("f16", start.fields["d"]).reshape(n, -1, 1)
    best: tuple[float, Float32Array, Float32Array, Array] | None = None
    for _ in range(steps + 1):
        total, codes_by_row = 0.0, []
        moments = np.zeros((2, count))
        fitted = np.empty_like(scale)
        for a in range(0, n, rows):
            x = grouped(w[a : a + rows], fmt)
            h = _weights_of_columns(fmt, x.shape, k, importance)
            d = scale[a : a + rows]
            codes = nearest_entry(np.divide(x, d, out=np.zeros_like(x), where=d != 0),
                                  table[None, None])
            value = table[codes]
            miss = value * d - x
            total += float(np.einsum("ngk,ngk,gk->", miss, miss, h, dtype=np.float64))
            codes_by_row.append(codes.reshape(len(x), -1))
            # the best scales for these codes, and what the best table for those follows from
            own = np.einsum("ngk,ngk,gk->ng", value, value, h)[..., None]
            cross = np.einsum("ngk,ngk,gk->ng", value, x, h)[..., None]
            d = np.where(own > 0, cross / np.where(own > 0, own, 1), d)
            fitted[a : a + rows] = d = as_float32("f16", bits_of(d.astype(np.float32), "f16"))
            flat = codes.reshape(-1)
            moments[0] += np.bincount(flat, (h * d * x).reshape(-1), minlength=count)
            moments[1] += np.bincount(flat, np.broadcast_to(h * d * d, x.shape).reshape(-1),
                                      minlength=count)
        if best is not None and total >= best[0] * (1 - 1e-4):
            if total < best[0]:
                best = total, table, scale, np.concatenate(codes_by_row)
            break
        best = total, table, scale, np.concatenate(codes_by_row)
        moved = np.where(moments[1] > 0, moments[0] / np.where(moments[1] > 0, moments[1], 1),
                         table)
        table = as_float32("f16", bits_of(np.sort(moved).astype(np.float32), "f16"))
        scale = fitted
    assert best is not None
    _, table, scale, codes = best
    return QuantizedTensor(fmt, (n, k), {
        **start.fields, "codes": blocks_of_codes(codes, k, fmt),
        "d": bits_of(scale, "f16").reshape(start.fields["d"].shape),
        "lut": bits_of(table, "f16").reshape(start.fields["lut"].shape)})
