"""Weights of -1, 0 and 1 times a scale.

BitNet b1.58 (Ma et al. 2024) takes the mean magnitude for the scale and rounds to nearest. The
least squared error has another (Li and Liu 2016, Ternary Weight Networks): the k greatest
magnitudes are kept, their mean is the scale, and k is what makes their sum squared over k greatest.
"""

from __future__ import annotations

import numpy as np

from qigen.errors import UsageError
from qigen.formats.algebra import Float32Array, Format
from qigen.formats.tensor import QuantizedTensor, as_float32
from qigen.formats.tensor import float_bits as bits_of
from qigen.quantize.rtn import blocks_of_codes, grouped

SCALES = ("absmean", "least")


def ternary(w: Float32Array, fmt: Format, *, scale: str) -> QuantizedTensor:
    """``w`` float32 [N, K] in a format of three levels, each row or group with the ``scale`` that
    its magnitudes have: "absmean" (BitNet) or "least" (the least squared error). UsageError for
    another."""
    if scale not in SCALES:
        raise UsageError(f"scale {scale}: choose one of {', '.join(SCALES)}")
    n, k = w.shape
    x = grouped(w, fmt)
    counts = np.zeros(x.shape[1] * x.shape[2], np.float32)
    counts[:k] = 1
    counts = counts.reshape(1, *x.shape[1:])
    size = np.abs(x) * counts
    if scale == "absmean":
        d = size.sum(axis=2, keepdims=True) / counts.sum(axis=2, keepdims=True).clip(1)
    else:
        falling = -np.sort(-size, axis=2)
        sums = np.cumsum(falling, axis=2, dtype=np.float64)
        kept = np.arange(1, size.shape[2] + 1)
        at = np.argmax(sums**2 / kept, axis=2)[..., None]
        d = np.take_along_axis(sums, at, axis=2) / (at + 1)
    bits = bits_of((d / np.float32(fmt.scale_factor)).astype(np.float32), fmt.field("d").number)
    d = as_float32(fmt.field("d").number, bits) * np.float32(fmt.scale_factor)
    level = np.rint(np.divide(x, d, out=np.zeros_like(x), where=d != 0)).clip(-1, 1)
    codes = (level + np.float32(fmt.zero)).reshape(n, -1)
    nblocks = -(-k // fmt.block)
    return QuantizedTensor(fmt, (n, k), {
        "codes": blocks_of_codes(codes.astype(np.uint8), k, fmt),
        "d": bits.reshape(fmt.field("d").shape(n, nblocks))})
