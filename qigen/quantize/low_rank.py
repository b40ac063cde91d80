"""Residuals of low rank: what rounding leaves over, as the product of two thin f16 matrices.

``W = Q + B A`` with B [N, r] and A [r, K]. The factors are the greatest singular vectors of what
the codes miss, each column weighed by the mean square of its input where that is known
(ZeroQuant-V2, Yao et al. 2023, arXiv:2303.08302; LQER, Zhang et al. 2024, arXiv:2402.02446).
Rounding what the factors leave over and finding the factors anew lessens the error once more
(LQ-LoRA, Guo et al. 2023, arXiv:2311.12023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from qigen.errors import BadInput
from qigen.formats.algebra import Array, Float32Array, Format
from qigen.formats.tensor import QuantizedTensor, as_float32, float_bits

STEPS = 3
"""Rounds of rounding and factoring at most: they stop where the error grows."""

_MORE = 8  # vectors of the search beyond the rank (Halko et al. 2011, arXiv:0909.4061)
_POWERS = 4

Rounding = Callable[[Float32Array, Format], QuantizedTensor]


def without_low_rank(fmt: Format) -> Format:
    """The format without its low-rank residual."""
    return replace(fmt, fields=tuple(f for f in fmt.fields if f.name not in ("la", "lb")))


def with_residual(w: Float32Array, fmt: Format, rounded: Rounding,
                  importance: Float32Array | None = None, steps: int = STEPS) -> QuantizedTensor:
    """``w`` [N, K] in a format with a low-rank residual; ``rounded`` brings a matrix to the format
    without it, ``importance`` [K] (None: all alike) weighs the columns of the error.

    Raises what ``rounded`` raises, and BadInput where a factor is too large for f16.
    """
    base = without_low_rank(fmt)
    weight = np.ones(w.shape[1], np.float32) if importance is None else np.sqrt(importance)
    best: QuantizedTensor | None = None
    least = np.inf
    product = np.zeros_like(w)
    for _ in range(steps):
        tensor = rounded(np.ascontiguousarray(w - product), base)
        missing = w - tensor.dequantize()
        b, a = _factors(missing * weight, fmt.rank)
        a /= weight
        lb, la = float_bits(b, "f16"), float_bits(a, "f16")
        b, a = as_float32("f16", lb), as_float32("f16", la)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise BadInput("a factor of the low-rank residual is too large for f16; keep this "
                           "tensor in f32", fmt.name)
        product = b @ a
        error = float(np.square((missing - product) * weight).sum(dtype=np.float64))
        if error >= least:
            break
        best, least = QuantizedTensor(fmt, (len(w), w.shape[1]), {
            **tensor.fields, **_fields(fmt, lb, la)}), error
    assert best is not None
    return best


def _fields(fmt: Format, lb: Array, la: Array) -> dict[str, Array]:
    """The fields of factors [N, r] and [r, K] in f16 bits; past K there are zeros."""
    k = la.shape[1]
    padded = np.zeros((-(-k // fmt.block) * fmt.block, fmt.rank), np.uint16)
    padded[:k] = la.T
    return {"lb": lb[:, None, :], "la": padded.reshape(1, -1, fmt.block * fmt.rank)}


def _factors(x: Float32Array, rank: int) -> tuple[Float32Array, Float32Array]:
    """(B [N, rank], A [rank, K]): the nearest product to ``x`` [N, K], but for what the search for
    its singular vectors misses; zeros where there are fewer."""
    n, k = x.shape
    b, a = np.zeros((n, rank), np.float32), np.zeros((rank, k), np.float32)
    wanted = min(rank, n, k)
    if not wanted:
        return b, a
    size = min(wanted + _MORE, n, k)
    if size == min(n, k):
        basis: Float32Array = np.eye(n, dtype=np.float32)
    else:
        rng = np.random.default_rng(0)
        basis, _ = np.linalg.qr(x @ rng.standard_normal((k, size)).astype(np.float32))
        for _ in range(_POWERS):
            across, _ = np.linalg.qr(x.T @ basis)
            basis, _ = np.linalg.qr(x @ across)
    left, values, right = np.linalg.svd(basis.T @ x, full_matrices=False)
    root = np.sqrt(values[:wanted])
    b[:, :wanted] = basis @ left[:, :wanted] * root
    a[:wanted] = right[:wanted] * root[:, None]
    return b, a
