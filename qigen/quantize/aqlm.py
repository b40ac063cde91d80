"""Sums of codebook entries, fitted to the output (AQLM, Egiazarian et al. 2024).

The codebooks begin as residual k-means of the weights. Then codes, codebooks and scales are made
better in turn for ``E|x (W - Q)^T|^2 = sum (w - q) H (w - q)^T``: the codes of one group of columns
at a time by a beam search over the books, all rows at once; the books by least squares, solved by
conjugate gradients; the scale of every row in closed form. The paper trains the books with Adam,
layer by layer and then across layers; here nothing is trained across layers.
"""

from __future__ import annotations

import numpy as np

from qigen.errors import UsageError
from qigen.formats.algebra import Array, Float32Array, Format
from qigen.formats.tensor import QuantizedTensor, as_float32
from qigen.formats.tensor import float_bits as bits_of
from qigen.quantize.rtn import quantize_rtn

_SCORES = 1 << 22
"""Scores of entries at a time."""

_DAMPING = 0.01

_LEAST_GAIN = 1e-3
"""A round that lessens the error by a smaller part is the last one."""


def aqlm(w: Float32Array, fmt: Format, hessian: Float32Array, *, beam: int, rounds: int,
         steps: int) -> QuantizedTensor:
    """``w`` float32 [N, K] in a format of vectors with codebooks, ``hessian`` [K, K] is E[x x^T].

    ``beam`` combinations of codes are followed from book to book; ``rounds`` times codes, books and
    scales are improved, the books by ``steps`` steps of conjugate gradients. Never worse than where
    it began. UsageError for options that make no sense.
    """
    if beam < 1 or rounds < 0 or steps < 1:
        raise UsageError("method aqlm needs beam >= 1, rounds >= 0 and steps >= 1")
    start = quantize_rtn(w, fmt)
    if not w.size:
        return start
    state = _State(w, start, hessian)
    best = state.error(), start
    if rounds:
        state.search(beam)
    for _ in range(rounds):
        state.fit_books(steps)
        state.fit_scales()
        state.search(beam)
        error = state.error()
        if error < best[0]:
            gain = 1 - error / best[0] if best[0] else 0.0
            best = error, state.tensor()
            if gain >= _LEAST_GAIN:
                continue
        break
    return best[1]


class _State:
    """A weight in units of its rows' scales, and what stands for it.

    ``x`` [N, K'], K' whole blocks; ``codes`` [N, groups, books]; ``books`` [books, entries, size];
    ``h`` [K', K'], damped, zero past K. ``pull`` [N, K'] is (x - q) h as the codes are by now.
    """

    def __init__(self, w: Float32Array, start: QuantizedTensor, hessian: Float32Array) -> None:
        fmt = start.format
        self.fmt, self.shape, self.fields = fmt, start.shape, start.fields
        n, k = w.shape
        self.size = fmt.vector
        self.groups = -(-k // self.size)
        width = start.nblocks * fmt.block
        self.w = np.zeros((n, width), np.float32)
        self.w[:, :k] = w
        self.h = np.zeros((width, width), np.float32)
        self.h[:k, :k] = hessian
        mean = float(np.diagonal(hessian).mean()) or 1.0
        self.h[np.arange(k), np.arange(k)] += np.float32(_DAMPING * mean)
        count = fmt.field("codes").count * self.size // fmt.block
        self.codes = start.fields["codes"].reshape(n, -1, count).astype(np.intp)
        self.books = as_float32("f16", start.fields["book"]).reshape(count, -1, self.size).copy()
        self.d = as_float32("f16", start.fields["d"]).reshape(n, 1)
        self._normalize()

    def _normalize(self) -> None:
        self.x = np.divide(self.w, self.d, out=np.zeros_like(self.w), where=self.d != 0)
        self.pull = (self.x - self.decoded(self.books)) @ self.h

    def decoded(self, books: Float32Array) -> Float32Array:
        """float32 [N, K']: the sums of the entries."""
        values = books[0][self.codes[..., 0]]
        for i in range(1, len(books)):
            values = values + books[i][self.codes[..., i]]
        sums: Float32Array = values.reshape(self.w.shape)
        return sums

    def error(self) -> float:
        """The squared error of the output."""
        miss = (self.x - self.decoded(self.books)) * self.d
        return float(np.einsum("nk,nk->", miss @ self.h, miss, dtype=np.float64))

    def tensor(self) -> QuantizedTensor:
        """The weight as it is by now."""
        codes = self.codes.reshape(self.fields["codes"].shape)
        return QuantizedTensor(self.fmt, self.shape, {
            "codes": codes.astype(self.fields["codes"].dtype),
            "d": bits_of(self.d, "f16").reshape(self.fields["d"].shape),
            "book": bits_of(self.books, "f16").reshape(self.fields["book"].shape)})

    # -- codes ------------------------------------------------------------------------------------

    def search(self, beam: int) -> None:
        """New codes, group by group, for the others as they are."""
        rows = max(1, _SCORES // (self.books.shape[1] * (beam if len(self.books) > 1 else 1)))
        for g in range(self.groups):
            at = slice(g * self.size, (g + 1) * self.size)
            h = self.h[at, at]
            turned = self.books @ h  # [books, entries, size]
            own = np.einsum("bes,bes->be", turned, self.books)
            entries = np.concatenate([-2 * self.books, own[..., None]], axis=2).transpose(0, 2, 1)
            before = self._vectors(g)
            target = self.pull[:, at] + before @ h
            for a in range(0, len(self.x), rows):
                self.codes[a : a + rows, g] = self._beam(
                    target[a : a + rows], self.codes[a : a + rows, g], turned, entries, beam)
            self.pull -= (self._vectors(g) - before) @ self.h[at]

    def _vectors(self, g: int) -> Float32Array:
        """float32 [N, size]: what the codes of a group stand for."""
        values = np.zeros((len(self.w), self.size), np.float32)
        for i, book in enumerate(self.books):
            values += book[self.codes[:, g, i]]
        return values

    def _beam(self, target: Float32Array, codes: Array, turned: Float32Array,
              entries: Float32Array, beam: int) -> Array:
        """The codes [n, books] with the least v h v^T - 2 target v^T, v the sum of their entries.

        ``turned`` are the entries e times h, ``entries`` [books, size + 1, entries] -2 e and
        e h e^T. One book after the other has its code replaced, in the ``beam`` best combinations
        so far.
        """
        n, count = codes.shape
        kept = codes[:, None]  # [n, combinations, books]
        for i in range(count):
            rest = np.zeros((n, kept.shape[1], self.size), np.float32)
            cost = np.zeros((n, kept.shape[1]), np.float32)
            pulled = np.zeros_like(rest)  # rest h
            for j in range(count):
                if j != i:
                    rest += self.books[j][kept[..., j]]
                    pulled += turned[j][kept[..., j]]
            if count > 1:
                cost = np.einsum("ncs,ncs->nc", rest, pulled - 2 * target[:, None])
            # the costs of all entries by one product: a column of ones brings what is their own
            left = np.ones((n * kept.shape[1], self.size + 1), np.float32)
            left[:, :-1] = (target[:, None] - pulled).reshape(-1, self.size)
            scores = (left @ entries[i]).reshape(n, kept.shape[1], -1)
            kept = _best(kept, i, scores, cost, beam if i < count - 1 else 1)
        return kept[:, 0]

    # -- books and scales -------------------------------------------------------------------------

    def _spread(self, values: Float32Array) -> Float32Array:
        """float32 [books, entries, size]: the sums of ``values`` [N, K'] over who uses an entry."""
        parts = values.reshape(len(values), -1, self.size)[:, : self.groups]
        total = np.empty(self.books.shape, np.float32)
        for i, book in enumerate(total):
            flat = self.codes[:, : self.groups, i].reshape(-1)
            for j in range(self.size):
                book[:, j] = np.bincount(flat, parts[..., j].reshape(-1), minlength=len(book))
        return total

    def fit_books(self, steps: int) -> None:
        """The books with the least error for these codes: conjugate gradients, preconditioned by
        the diagonal."""
        weight = np.square(self.d)
        diagonal = self._spread(np.broadcast_to(weight * np.diagonal(self.h), self.x.shape))
        inverse = np.where(diagonal > 0, 1 / np.where(diagonal > 0, diagonal, 1), 0)
        gradient = self._spread(self.pull * weight)
        moved = np.zeros_like(self.books)
        ahead = inverse * gradient
        direction = ahead.copy()
        size = float(np.vdot(gradient, ahead))
        for _ in range(steps):
            if not size > 0:
                break
            image = self._spread((self.decoded(direction) @ self.h) * weight)
            curvature = float(np.vdot(direction, image))
            if not curvature > 0:
                break
            length = np.float32(size / curvature)
            moved += length * direction
            gradient -= length * image
            ahead = inverse * gradient
            last, size = size, float(np.vdot(gradient, ahead))
            direction = ahead + np.float32(size / last) * direction
        books = as_float32("f16", bits_of(self.books + moved, "f16"))
        if np.isfinite(books).all():
            self.books = books
        self.pull = (self.x - self.decoded(self.books)) @ self.h

    def fit_scales(self) -> None:
        """The best scale of every row for its codes."""
        q = self.decoded(self.books)
        pulled = q @ self.h
        own = np.einsum("nk,nk->n", pulled, q)
        cross = np.einsum("nk,nk->n", pulled, self.w)
        fitted = np.divide(cross, own, out=self.d[:, 0].copy(), where=own > 0)
        fitted = as_float32("f16", bits_of(fitted, "f16"))[:, None]
        self.d = np.where(np.isfinite(fitted) & (fitted != 0), fitted, self.d)
        self._normalize()


def _best(kept: Array, i: int, scores: Float32Array, cost: Float32Array, beam: int) -> Array:
    """The ``beam`` best of the combinations ``kept`` [n, c, books] with their code ``i`` replaced:
    ``scores`` [n, c, entries] are the costs of the codes, which are overwritten, and ``cost``
    [n, c] is what is added for each combination."""
    n, combinations, entries = scores.shape
    beam = min(beam, combinations * entries)
    rows = np.arange(n)
    found = np.empty((n, beam), np.intp)
    if beam == 1:
        own = scores.argmin(axis=2)
        least = np.take_along_axis(scores, own[..., None], axis=2)[..., 0] + cost
        which = least.argmin(axis=1)
        found[:, 0] = which * entries + own[rows, which]
    else:
        scores += cost[..., None]
        flat = scores.reshape(n, -1)
        for j in range(beam):  # few: faster than a partition
            found[:, j] = flat.argmin(axis=1)
            flat[rows, found[:, j]] = np.inf
    chosen = np.take_along_axis(kept, (found // entries)[..., None], axis=1)
    chosen[..., i] = found % entries
    return chosen
