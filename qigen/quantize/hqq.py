"""Zero points without data: half-quadratic quantization (Badri and Shaji 2023).

The scale of a group is that of its range. Its zero point minimises the p-norm (p < 1) of the
group's errors, which a few large ones count less for than they do for the squared error: an
auxiliary variable takes up the large errors, by the generalized soft threshold of the p-norm
(Badri and Yahia 2016), and the zero point follows from the rest in closed form.
"""

from __future__ import annotations

import numpy as np

from qigen.errors import UsageError
from qigen.formats.algebra import Array, Float32Array, Format
from qigen.formats.tensor import QuantizedTensor, as_float32
from qigen.formats.tensor import float_bits as bits_of
from qigen.quantize.rtn import better_of, blocks_of_codes, grouped, quantize_rtn

_CHUNK_WEIGHTS = 1 << 20


def hqq(w: Float32Array, fmt: Format, *, p: float, beta: float, kappa: float,
        steps: int) -> QuantizedTensor:
    """``w`` float32 [N, K] in a format with a float zero point or minimum of every group.

    The threshold takes 1/``beta`` |e|^(``p`` - 1) off an error e, in steps of the code; ``beta``
    grows by ``kappa`` every one of ``steps`` iterations. Of all zero points that come up, a group
    keeps the one with the least p-norm. UsageError for options that make no sense.
    """
    if not 0 < p <= 1 or not beta > 0 or not kappa >= 1 or steps < 0:
        raise UsageError("method hqq needs 0 < p <= 1, beta > 0, kappa >= 1 and steps >= 0")
    start = quantize_rtn(w, fmt)
    fields = {name: array.copy() for name, array in start.fields.items()}
    rows = max(1, _CHUNK_WEIGHTS // w.shape[1])
    for a in range(0, len(w), rows):
        part = _half_quadratic(w[a : a + rows], start.rows(a, a + rows), p, beta, kappa, steps)
        for name, array in part.items():
            fields[name][a : a + rows] = array
    return QuantizedTensor(fmt, start.shape, fields)


def _half_quadratic(w: Float32Array, start: QuantizedTensor, p: float, beta: float, kappa: float,
                    steps: int) -> dict[str, Array]:
    fmt = start.format
    n, k = w.shape
    x = grouped(w, fmt)
    counts = np.zeros(x.shape[1] * x.shape[2], np.float32)
    counts[:k] = 1
    counts = counts.reshape(x.shape[1:])
    number = counts.sum(axis=1)[None, :, None].clip(1)
    top = np.float32((1 << fmt.code_bits) - 1)
    d = as_float32(fmt.field("d").number, start.fields["d"]).reshape(n, -1, 1)
    alive = np.broadcast_to(d != 0, x.shape)
    scaled = np.divide(x, d, out=np.zeros_like(x), where=alive)
    step = np.where(d == 0, np.float32(1), d)
    name = "m" if fmt.has("m") else "z"

    def stored(z: Float32Array) -> tuple[Array, Float32Array]:
        """(the field, the zero point that it says)."""
        if name == "m":
            bits = bits_of(-z * step, fmt.field("m").number)
            return bits, (-as_float32(fmt.field("m").number, bits) / step).astype(np.float32)
        bits = bits_of(z, fmt.field("z").number)
        return bits, as_float32(fmt.field("z").number, bits)

    z = as_float32(fmt.field(name).number, start.fields[name]).reshape(n, -1, 1)
    if name == "m":
        z = (-z / step).astype(np.float32)
    best: tuple[Array, ...] | None = None
    for _ in range(steps + 1):
        bits, z = stored(z)
        codes = np.rint(scaled + z).clip(0, top)
        miss = scaled - (codes - z)
        size = np.abs(miss)
        norm = np.einsum("ngk,gk->ng", size**p, counts)[..., None]
        best = better_of(best, (norm, bits, codes))
        kept = size - np.maximum(size, 1e-6) ** np.float32(p - 1) / np.float32(beta)
        large = np.sign(miss) * np.maximum(kept, 0)
        z = ((codes - scaled + large) * counts).sum(axis=2, keepdims=True) / number
        beta *= kappa
    assert best is not None
    _, bits, codes = best
    # a group of zeros alone keeps what rounding to nearest has for it
    dead = ~alive[..., 0]
    bits = np.where(dead[..., None], start.fields[name].reshape(bits.shape), bits)
    result = blocks_of_codes(codes.reshape(n, -1), k, fmt).reshape(start.fields["codes"].shape)
    groups = np.repeat(dead, x.shape[2], axis=1)[:, :k]
    if groups.any():
        old = start.fields["codes"].reshape(n, -1)[:, :k]
        new = result.reshape(n, -1)[:, :k]
        result = blocks_of_codes(np.where(groups, old, new), k, fmt)
    return {name: bits.astype(start.fields[name].dtype).reshape(start.fields[name].shape),
            "codes": result}
