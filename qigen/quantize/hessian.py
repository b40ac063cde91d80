"""What calibration knows of the input of a matrix, and how it is made fit for use.

The Hessian of the squared error of ``x W^T`` in a row of W is ``H = E[x x^T]`` (up to a factor that
changes nothing), the same for all rows. Everything that quantizes with data goes by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, UsageError

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

DAMPING = 0.01
"""The part of the mean of the diagonal that is added to the diagonal (GPTQ)."""

_MOST_DAMPING = 10.0


@dataclass
class Statistics:
    """Sums over the input ``x [K]`` of a matrix, token by token.

    ``products`` is float32 [K, K], the sum of x x^T; ``largest`` and ``total`` [K], the greatest
    and the sum of |x|; ``sums`` [K] the sum of x; ``tokens`` how many there were.
    """

    products: Float32Array
    largest: Float32Array
    total: Float64Array
    sums: Float64Array
    tokens: int = 0

    @classmethod
    def empty(cls, k: int) -> Statistics:
        """Nothing seen yet of an input of ``k`` numbers."""
        return cls(np.zeros((k, k), np.float32), np.zeros(k, np.float32), np.zeros(k), np.zeros(k))

    def add(self, x: npt.NDArray[Any]) -> None:
        """Count the rows of ``x`` [.., K]; BadInput if they are not finite."""
        rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]), np.float32)
        magnitude = np.abs(rows)
        largest = magnitude.max(axis=0, initial=0)
        if not np.isfinite(largest).all():
            raise BadInput("the calibration data make activations that are not finite; repair the "
                           "model, or take other data", "calibration")
        self.products += rows.T @ rows
        np.maximum(self.largest, largest, out=self.largest)
        self.total += magnitude.sum(axis=0, dtype=np.float64)
        self.sums += rows.sum(axis=0, dtype=np.float64)
        self.tokens += len(rows)

    def merge(self, other: Statistics) -> None:
        """Count what another has counted, too."""
        self.products += other.products
        np.maximum(self.largest, other.largest, out=self.largest)
        self.total += other.total
        self.sums += other.sums
        self.tokens += other.tokens

    @property
    def hessian(self) -> Float32Array:
        """float32 [K, K]: the mean of x x^T."""
        mean: Float32Array = self.products / np.float32(max(1, self.tokens))
        return mean

    def centred(self) -> Statistics:
        """The same of x less its mean, where that is made up for otherwise."""
        mean = self.sums / max(1, self.tokens)
        products = self.products - np.float32(self.tokens) * np.outer(mean, mean).astype(np.float32)
        np.fill_diagonal(products, np.diagonal(products).clip(0))
        return Statistics(products, self.largest, self.total, self.sums, self.tokens)

    @property
    def mean(self) -> Float32Array:
        """float32 [K]: the mean of x."""
        return (self.sums / max(1, self.tokens)).astype(np.float32)

    @property
    def mean_magnitude(self) -> Float32Array:
        """float32 [K]: the mean of |x|."""
        return (self.total / max(1, self.tokens)).astype(np.float32)


def check_memory(k: int, memory: int, where: str) -> None:
    """UsageError, saying how much it takes, if the statistics of an input of ``k`` numbers do not
    fit into ``memory`` bytes."""
    needed = 4 * k * k
    if needed > memory:
        raise UsageError(f"the statistics of {k} columns take {needed / 2**20:.1f} MiB, and "
                         f"calibration may have {memory / 2**20:.1f}; give --calibration-memory "
                         f"{-(-needed // 2**20)}MiB or more", where)


def check_hessian(hessian: npt.ArrayLike, k: int) -> Float32Array:
    """``hessian`` as float32 [K, K]; BadInput if it is none of a weight of ``k`` columns."""
    try:
        h = np.asarray(hessian, np.float32)
    except (TypeError, ValueError):
        raise BadInput("the Hessian is not a matrix of numbers", "hessian") from None
    if h.shape != (k, k):
        raise BadInput(f"the Hessian is {list(h.shape)}; a weight of {k} columns needs [{k}, {k}]",
                       "hessian")
    if not np.isfinite(h).all():
        raise BadInput("the Hessian has a NaN or an infinity; calibrate again", "hessian")
    diagonal = np.diagonal(h)
    scale = float(np.abs(h).max(initial=0))
    if diagonal.min(initial=0) < -1e-6 * scale:
        raise BadInput("the Hessian has a negative number on its diagonal, so it is no sum of "
                       "x x^T; calibrate again", "hessian")
    if np.abs(h - h.T).max(initial=0) > 1e-3 * scale:
        raise BadInput("the Hessian is not symmetric; calibrate again", "hessian")
    return h


def importance(hessian: Float32Array | None) -> Float32Array | None:
    """float32 [K], 1 in the mean: the weight of each column in a search, its input's mean square.

    A column that never had an input still counts a little. None without a Hessian.
    """
    if hessian is None:
        return None
    diagonal = np.diagonal(hessian).clip(0)
    mean = float(diagonal.mean()) if len(diagonal) else 0.0
    if not mean > 0:
        return None
    found: Float32Array = (diagonal / mean + 1e-4).astype(np.float32)
    return found


@dataclass(frozen=True)
class Factor:
    """``upper`` float32 [K, K] with ``upper^T upper = (H + damping I)^-1`` in the given order.

    ``dead`` [K] are the columns whose input was never anything but zero: they stand alone.
    """

    upper: Float32Array
    damping: float
    dead: npt.NDArray[np.bool_]


def factor(hessian: Float32Array, order: npt.NDArray[np.intp] | None = None,
           damping: float = DAMPING) -> Factor:
    """The Cholesky factor of the inverse that the feedback of errors goes by (GPTQ, step 4).

    ``damping`` times the mean of the diagonal is added to it, ten times as much for as long as the
    matrix is not positive definite; BadInput if that does not help.
    """
    h = hessian.astype(np.float64)
    diagonal = np.diagonal(h).copy()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    h[dead, :] = 0
    h[:, dead] = 0
    h[dead, dead] = mean
    if order is not None:
        h = h[np.ix_(order, order)]
    share = damping
    while True:
        damped = h.copy()
        np.fill_diagonal(damped, np.diagonal(h) + share * mean)
        try:
            lower = np.linalg.cholesky(damped)
            inverse = np.linalg.inv(lower)
            upper = np.linalg.cholesky(inverse.T @ inverse).T
            if np.isfinite(upper).all():
                break
        except np.linalg.LinAlgError:
            pass
        if share >= _MOST_DAMPING:
            raise BadInput("the Hessian is not positive definite, even with ten times the mean of "
                           "its diagonal added; calibrate again with more data", "hessian")
        share = max(10 * share, 1e-4)
    return Factor(np.ascontiguousarray(upper, np.float32), share, dead)


def output_error(w: Float32Array, rounded: Float32Array,
                 hessian: Float32Array | None) -> tuple[float, float]:
    """(mean squared error of the output, the same relative to its mean square).

    Of ``y = x W^T``: E|x (W - Q)^T|^2 / N; without a Hessian as if the x were independent and of
    variance 1.
    """
    miss = w - rounded
    if hessian is None:
        error, power = np.square(miss).sum(dtype=np.float64), np.square(w).sum(dtype=np.float64)
    else:
        error = np.einsum("nk,nk->", miss @ hessian, miss, dtype=np.float64)
        power = np.einsum("nk,nk->", w @ hessian, w, dtype=np.float64)
    n = max(1, len(w))
    return float(error) / n, float(error / power) if power else 0.0
