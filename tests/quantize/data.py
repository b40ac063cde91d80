"""Small layers with correlated inputs, on which the methods differ as they do on real ones."""

from __future__ import annotations

import numpy as np


def layer(n=48, k=192, seed=0, rank=16, tokens=2000):
    """(w [n, k], x [tokens, k], hessian [k, k]): inputs of low rank and noise, some strong."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((tokens, rank)) @ rng.standard_normal((rank, k))
    x = common + 0.5 * rng.standard_normal((tokens, k))
    x *= np.exp(0.7 * rng.standard_normal(k))
    w = 0.1 * rng.standard_normal((n, k))
    x, w = x.astype(np.float32), w.astype(np.float32)
    return w, x, x.T @ x / np.float32(tokens)


def output_error(w, rounded, x):
    """The squared error of x w^T, relative to its square, by the product itself."""
    exact = x.astype(np.float64) @ w.T
    got = x.astype(np.float64) @ rounded.T
    return float(np.square(got - exact).sum() / np.square(exact).sum())
