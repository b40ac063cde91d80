"""Round to nearest: every code is the one whose value lies nearest to the weight.

Scales and minima are rounded to their stored type before the codes are chosen, so that the codes
are the nearest ones to what the stored scale really says.
"""

from __future__ import annotations

import numpy as np

from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import Array, Float32Array, Format, QuantizedTensor, check_columns

# Weights handled at a time, so that the temporaries stay in a level-2 cache.
_CHUNK_WEIGHTS = 1 << 16


def quantize_rtn(w: Float32Array, fmt: Format) -> QuantizedTensor:
    """Quantize ``w`` (float32 [N, K]) to a dense float format or to one with affine codes.

    Takes f32, f16, bf16, the group rows (u*, s*) and q8_0, q4_0, q4_1, q5_0, q5_1. Asymmetric rows
    (with a minimum 'm') spread 2^b codes from the least to the greatest weight of a block.
    Symmetric rows take, block by block, the better of two scales in squared error: the weight of
    greatest magnitude on the code 0, the farthest from the zero (the scale may be negative), or its
    magnitude on the last code. If K is no multiple of a group row's block, the codes past K stand
    for nothing: they are the zero (symmetric) or 0.

    Raises BadInput if a weight is NaN, infinite or too large for the format's scale, Unsupported if
    the format's codes are not affine with a scale a block.
    """
    if w.ndim != 2 or w.dtype != np.float32:
        raise BadInput(f"the weight is {w.dtype}{list(w.shape)}; give a float32 matrix [N, K]")
    n, k = w.shape
    check_rounding(fmt, k)
    integer = _is_affine(fmt)
    nblocks = -(-k // fmt.block)
    fields = {field.name: np.empty((n, nblocks, field.count), field.dtype)
              for field in fmt.fields}
    step = max(1, _CHUNK_WEIGHTS // max(1, k))
    for a in range(0, n, step):
        chunk = np.ascontiguousarray(w[a : a + step])
        if not np.isfinite(chunk).all():
            row = a + int(np.argmin(np.isfinite(chunk).all(axis=1)))
            raise BadInput(f"row {row} of the weight has a NaN or an infinity; repair the model "
                           "first", fmt.name)
        part = _affine(_blocks(chunk, fmt), fmt) if integer else _dense(chunk, fmt)
        for name, array in part.items():
            fields[name][a : a + step] = array
    if integer and k % fmt.block:
        fields["codes"][:, -1, k % fmt.block :] = fmt.zero
    return QuantizedTensor(fmt, (n, k), fields)


def check_rounding(fmt: Format, k: int) -> None:
    """Raise Unsupported if :func:`quantize_rtn` does not take the format, BadInput if rows of ``k``
    weights cannot be cut into its blocks.
    """
    if not _is_affine(fmt) and not fmt.float_kind:
        raise Unsupported("round to nearest needs affine codes with one scale a block; take a "
                          "group row such as s4g32, or q8_0, q4_0, q4_1, q5_0, q5_1", fmt.name)
    check_columns(fmt, k)


def _is_affine(fmt: Format) -> bool:
    """Whether W = d * (c - Z) with Z in the middle of the codes, or W = d * c + m."""
    names = {field.name for field in fmt.fields}
    if fmt.float_kind or fmt.table is not None or fmt.base3:
        return False
    centred = fmt.zero == 1 << (fmt.code_bits - 1)
    return names == {"codes", "d", "m"} or (names == {"codes", "d"} and centred)


def _blocks(chunk: Float32Array, fmt: Format) -> Float32Array:
    """[n, K] as [n, nblocks, block]; a short last block is filled so that it changes nothing.

    The fill is the last weight where the range counts and zero where the magnitude does.
    """
    n, k = chunk.shape
    short = -k % fmt.block
    if short:
        chunk = np.pad(chunk, ((0, 0), (0, short)), "edge" if fmt.has("m") else "constant")
    return chunk.reshape(n, -1, fmt.block)


def _stored(scale: Float32Array, fmt: Format) -> tuple[Array, Float32Array]:
    """The f16 bits [n, nblocks, 1] of ``scale`` and the float32 that they stand for."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise BadInput("a weight is too large for a scale of 16 bits; keep this tensor in f32",
                       fmt.name)
    return half.view(np.uint16), half.astype(np.float32)


def _nearest(x: Float32Array, scale: Float32Array, zero: int, top: int) -> Float32Array:
    """The codes 0 to ``top``, still as floats, nearest to ``x`` in steps of ``scale``."""
    codes: Float32Array = np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale != 0))
    codes += np.float32(zero)
    return codes.clip(0, top, out=codes)


def _affine(x: Float32Array, fmt: Format) -> dict[str, Array]:
    """The field arrays of the blocks ``x`` [n, nblocks, block]."""
    top = (1 << fmt.code_bits) - 1
    least, greatest = x.min(axis=2, keepdims=True), x.max(axis=2, keepdims=True)
    dtype = fmt.field("codes").dtype
    if fmt.has("m"):
        m_bits, m = _stored(least, fmt)
        # Each end is divided by itself: the difference of two finite floats may be infinite.
        d_bits, d = _stored(greatest / np.float32(top) - least / np.float32(top), fmt)
        codes = _nearest(x - m, d, 0, top)
        return {"codes": codes.astype(dtype), "d": d_bits, "m": m_bits}
    zero = fmt.zero
    extreme = np.where(-least > greatest, least, greatest)
    best: tuple[Float32Array, Array, Float32Array] | None = None
    for scale in (extreme / np.float32(-zero), np.abs(extreme) / np.float32(top - zero)):
        bits, d = _stored(scale, fmt)
        codes = _nearest(x, d, zero, top)
        miss = (codes - np.float32(zero)) * d
        miss -= x
        error: Float32Array = np.einsum("nbk,nbk->nb", miss, miss)[..., None]
        if best is None:
            best = codes, bits, error
        else:
            better = error < best[2]
            best = np.where(better, codes, best[0]), np.where(better, bits, best[1]), error
    assert best is not None
    return {"codes": best[0].astype(dtype), "d": best[1]}


def _dense(chunk: Float32Array, fmt: Format) -> dict[str, Array]:
    """The bit patterns of ``chunk`` [n, K] rounded to nearest even in a dense float format."""
    bits = chunk.view(np.uint32)
    if fmt.float_kind == "f16":
        with np.errstate(over="ignore"):
            bits = chunk.astype(np.float16).view(np.uint16)
    elif fmt.float_kind == "bf16":
        # The low half is rounded away: add just under half, and one more where the result is odd.
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        bits = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    codes = np.zeros((len(chunk), -(-chunk.shape[1] // fmt.block) * fmt.block), bits.dtype)
    codes[:, : chunk.shape[1]] = bits
    infinity = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[fmt.float_kind or ""]
    if ((codes & codes.dtype.type(infinity)) == infinity).any():
        raise BadInput("a weight is too large for the format; keep this tensor in f32", fmt.name)
    return {"codes": codes.reshape(len(chunk), -1, fmt.block)}
