"""Rounding with feedback: the error of every weight is made up for by those that come after it.

GPTQ (Frantar et al. 2023), which is Optimal Brain Compression with one order for all rows: column
by column a weight is rounded, and what that does to the output is taken off the columns left, by
the Cholesky factor of the inverse Hessian. The same loop prunes N of M weights (SparseGPT, Frantar
and Alistarh 2023), keeps outliers apart (SpQR, Dettmers et al. 2023) and columns (QUIK, Ashkboos et
al. 2023): such weights are as good as exact, so that they leave no error.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from qigen.errors import Unsupported, UsageError
from qigen.formats.algebra import Array, Float32Array, Format
from qigen.formats.tensor import QuantizedTensor, as_float32, float_bits, kept_weights
from qigen.quantize.grid import Grid, plain, with_parts
from qigen.quantize.hessian import DAMPING, Factor, factor, importance
from qigen.quantize.rtn import Clip, quantize_rtn

ORDERS = ("group", "act", "none")

_CHUNK = 32
"""Columns whose errors are spread at once; inside a chunk one by one. A multiple of every M."""

Indices = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]


def gptq(w: Float32Array, fmt: Format, hessian: Float32Array, *, damping: float = DAMPING,
         order: str = "group", clip: bool = True) -> tuple[QuantizedTensor, Factor]:
    """Quantize ``w`` [N, K] so that ``x w^T`` changes least, ``hessian`` [K, K] being E[x x^T].

    ``order`` of the columns: "act" by falling diagonal of the Hessian, with scales from the weights
    as they were at first; "group": whole blocks of the format by their greatest diagonal, and so
    within them (group-aware reordering), so that scales follow the weights as they are when a
    block's turn comes; "none". What is stored is in the order of the model in any case. ``clip``:
    search the scales, columns weighted by the diagonal.

    Returns the weight and the factor, which says how much damping it took. Raises UsageError for
    options that make no sense, Unsupported for formats without codes of single weights, BadInput
    for a Hessian that no damping makes positive definite.
    """
    if order not in ORDERS:
        raise UsageError(f"order {order}: choose one of {', '.join(ORDERS)}")
    if not damping > 0:
        raise UsageError("the damping must be greater than 0")
    if fmt.mask is not None and fmt.has("qc"):
        raise Unsupported("a mask and columns apart cannot be had at once with feedback; take "
                          "method rtn, or one of the two", fmt.name)
    diagonal = np.diagonal(hessian).copy()
    search = Clip(importance(hessian)) if clip else None
    apart = _columns_apart(fmt, diagonal)
    if fmt.mask is not None and order == "act":
        order = "group"  # the M columns of a mask stay together
    columns, starts = ordered(diagonal, fmt, order, apart)
    found = factor(hessian, columns, damping)
    rest = w
    if len(apart):
        rest = w.copy()
        rest[:, apart] = 0
    outliers: Mask | None = None
    if fmt.has("oc"):
        inverse = np.empty(len(columns), np.float32)
        inverse[columns] = np.square(found.upper).sum(axis=0)
        outliers = _outliers(rest, fmt, inverse, search)
        rest = np.where(outliers, np.float32(0), rest)
    grid = Grid(np.ascontiguousarray(rest), plain(fmt), search)
    loop = _Feedback(w, grid, found.upper, columns, starts)
    loop.apart[apart] = True
    loop.outliers = outliers
    loop.masked = fmt if fmt.mask is not None else None
    loop.run()
    parts: dict[str, Array] = {}
    if outliers is not None:
        parts.update(_outlier_fields(fmt, outliers, loop.extra))
    if len(apart):
        parts.update(_column_fields(fmt, apart, loop.extra))
    return with_parts(grid.tensor(), fmt, parts, loop.kept), found


def _columns_apart(fmt: Format, diagonal: Float32Array) -> Indices:
    """The columns that a format with columns apart keeps: those whose inputs weigh most (QUIK)."""
    if not fmt.has("qc"):
        return np.zeros(0, np.intp)
    count = min(fmt.field("qc").count, len(diagonal))
    return np.sort(np.argsort(-diagonal, kind="stable")[:count])


def ordered(diagonal: Float32Array, fmt: Format, order: str,
            apart: Indices) -> tuple[Indices, dict[int, int]]:
    """(the columns in their order, {place where a block's columns begin: block}).

    Columns apart come last: they take up the errors of all others. "act" has no blocks.
    """
    k = len(diagonal)
    keys = diagonal.astype(np.float64)
    inner = np.setdiff1d(np.arange(k), apart)
    if order == "act":
        return np.concatenate([inner[np.argsort(-keys[inner], kind="stable")], apart]), {}
    of = fmt.mask[1] if fmt.mask is not None else 1
    blocks = [inner[(inner >= a) & (inner < a + fmt.block)] for a in range(0, k, fmt.block)]
    sequence = [i for i, members in enumerate(blocks) if len(members)]
    if order == "group":
        sequence.sort(key=lambda i: -float(keys[blocks[i]].max()))
    columns: list[Indices] = []
    starts: dict[int, int] = {}
    at = 0
    for i in sequence:
        members = blocks[i]
        if order == "group":
            runs = [members[j : j + of] for j in range(0, len(members), of)]
            # one that K cuts short comes last: masks count from the start of a block
            runs.sort(key=lambda run: (len(run) < of, -float(keys[run].max())))
            members = np.concatenate(runs)
        starts[at] = i
        columns.append(members)
        at += len(members)
    return np.concatenate([*columns, apart]).astype(np.intp), starts


class _Feedback:
    """The loop over columns. ``extra`` [K, N] gets what is kept apart: f16 numbers that are added
    to the codes' values at outliers and in columns apart."""

    def __init__(self, w: Float32Array, grid: Grid, upper: Float32Array, columns: Indices,
                 starts: dict[int, int]) -> None:
        self.grid, self.upper, self.columns, self.starts = grid, upper, columns, starts
        self.rest = np.ascontiguousarray(w[:, columns].T)  # by place, as the weights are by now
        self.place = np.argsort(columns)
        self.apart = np.zeros(len(columns), bool)
        self.outliers: Mask | None = None
        self.masked: Format | None = None
        self.kept: Mask | None = None
        self.extra = np.zeros((0, 0), np.float32)

    def run(self) -> None:
        k, n = self.rest.shape
        if self.outliers is not None or self.apart.any():
            self.extra = np.zeros((k, n), np.float32)
        if self.masked is not None:
            self.kept = np.zeros((n, k), bool)
        edges = sorted({0, k, *self.starts})
        for first, last in itertools.pairwise(edges):
            if self.grid.refits and first in self.starts:
                self._fit(self.starts[first])
            for a in range(first, last, _CHUNK):
                self._chunk(a, min(a + _CHUNK, last))

    @property
    def _of(self) -> int:
        """Weights of which a mask keeps some."""
        return self.masked.mask[1] if self.masked is not None and self.masked.mask else 1

    def _fit(self, block: int) -> None:
        """New scales of a block from its weights as they are by now."""
        size = self.grid.fmt.block
        members = np.arange(block * size, min((block + 1) * size, len(self.columns)))
        places = self.place[members]
        x = self.rest[places]
        x[self.apart[members]] = 0
        if self.outliers is not None:
            x[self.outliers[:, members].T] = 0
        if self.masked is not None:
            for a in range(0, len(members), self._of):
                part = slice(a, a + self._of)
                x[part][~self._choice(x[part], places[part])] = 0
        self.grid.fit(np.ascontiguousarray(x.T), block)

    def _choice(self, x: Float32Array, places: Indices) -> Mask:
        """Which of x [M, N] a mask keeps: those whose loss, made up for, would cost the most."""
        assert self.masked is not None
        cost = np.abs(x) / self.upper[places, places][:, None]
        return np.asarray(kept_weights(self.masked, cost.T[:, None])[:, 0].T)

    def _chunk(self, a: int, b: int) -> None:
        """Round the columns at places [a, b) and spread their errors."""
        errors = np.empty((b - a, self.rest.shape[1]), np.float32)
        for i in range(a, b):
            if self.masked is not None and (i - a) % self._of == 0:
                places = np.arange(i, min(i + self._of, b))
                x = self.rest[places]
                if self.outliers is not None:
                    x[self.outliers[:, self.columns[places]].T] = 0
                assert self.kept is not None
                self.kept[:, self.columns[places]] = self._choice(x, places).T
            w = self.rest[i]
            error = (w - self._rounded(w, int(self.columns[i]))) / self.upper[i, i]
            self.rest[i + 1 : b] -= np.multiply.outer(self.upper[i, i + 1 : b], error)
            errors[i - a] = error
        self.rest[b:] -= self.upper[a:b, b:].T @ errors

    def _rounded(self, w: Float32Array, column: int) -> Float32Array:
        if self.apart[column]:
            q = self.grid.nearest(np.zeros_like(w), column)
            self.extra[column] = _f16(w - q)
            q += self.extra[column]
            return q
        out = None if self.outliers is None else self.outliers[:, column]
        rest = w if out is None else np.where(out, np.float32(0), w)
        q = self.grid.nearest(rest, column)
        if self.kept is not None:
            q *= self.kept[:, column]
        if out is not None:
            self.extra[column] = _f16(w - q) * out
            q += self.extra[column]
        return q


def _f16(x: Float32Array) -> Float32Array:
    return as_float32("f16", float_bits(x, "f16"))


def _outliers(w: Float32Array, fmt: Format, inverse: Float32Array, search: Clip | None) -> Mask:
    """Where the outliers of every block are: the weights whose rounding, made up for by the others,
    costs the most (SpQR's sensitivity); ``inverse`` [K] is the diagonal of the inverse Hessian."""
    n, k = w.shape
    rounded = quantize_rtn(np.ascontiguousarray(w), plain(fmt), search).dequantize()
    cost = np.square(w - rounded) / inverse
    count = fmt.field("oc").count
    chosen = np.zeros((n, k), bool)
    for a in range(0, k, fmt.block):
        part = cost[:, a : a + fmt.block]
        if part.shape[1] <= count:
            chosen[:, a : a + fmt.block] = True
            continue
        places = np.argpartition(-part, count - 1, axis=1)[:, :count]
        np.put_along_axis(chosen[:, a : a + fmt.block], places, True, axis=1)
    return chosen


def _outlier_fields(fmt: Format, outliers: Mask, extra: Float32Array) -> dict[str, Array]:
    n, k = outliers.shape
    count, width = fmt.field("oc").count, -(-k // fmt.block) * fmt.block
    full, values = np.zeros((n, width), bool), np.zeros((n, width), np.float32)
    full[:, :k], values[:, :k] = outliers, extra.T
    blocks = full.reshape(n, -1, fmt.block)
    # a block with fewer weights than outliers has some past its end, which are zero
    places = np.sort(np.argsort(~blocks, axis=2, kind="stable")[..., :count], axis=2)
    chosen = np.take_along_axis(values.reshape(blocks.shape), places, axis=2)
    return {"oc": places.astype(np.uint8), "ov": float_bits(np.ascontiguousarray(chosen), "f16")}


def _column_fields(fmt: Format, apart: Indices, extra: Float32Array) -> dict[str, Array]:
    count, n = fmt.field("qc").count, extra.shape[1]
    places = np.full((1, 1, count), apart.max(initial=0), np.uint16)
    places[0, 0, : len(apart)] = apart
    values = np.zeros((n, 1, count), np.float32)
    values[:, 0, : len(apart)] = extra[apart].T
    return {"qc": places, "qv": float_bits(values, "f16")}
