"""Source blocks (the bytes of a GGUF tensor) to field arrays and back, by the catalog's runs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import Array, Field, Format, Run
from qigen.formats.tensor import QuantizedTensor, check_columns

# Source bytes handled at a time, so that the temporaries stay in a level-2 cache.
_CHUNK_BYTES = 1 << 17


def from_blocks(fmt: Format, raw: npt.NDArray[np.uint8],
                shape: tuple[int, int]) -> QuantizedTensor:
    """Read the weight ``shape`` = (N, K) from its source blocks.

    ``raw`` is uint8 of N * K / block * block_bytes bytes in any shape. Lossless: NaN scales and
    unused codes are kept. Raises BadInput if the size or K does not fit, Unsupported if the format
    has no source blocks.
    """
    _check_source(fmt)
    n, k = shape
    check_columns(fmt, k)
    nblocks = -(-k // fmt.block)
    want = n * nblocks * fmt.block_bytes
    if raw.dtype != np.uint8 or raw.size != want:
        raise BadInput(f"a {n}x{k} weight takes {want} bytes but {raw.size} of type {raw.dtype} "
                       "are here; the file is damaged or cut short", fmt.name)
    source = raw.reshape(n * nblocks, fmt.block_bytes)
    fields = {field.name: np.empty((n, nblocks, field.count), field.dtype)
              for field in fmt.fields}
    step = max(1, _CHUNK_BYTES // fmt.block_bytes)
    for a in range(0, n * nblocks, step):
        part = source[a : a + step]
        for field in fmt.fields:
            target = fields[field.name].reshape(n * nblocks, field.count)[a : a + step]
            _gather(field, part, target)
            if field.name == "codes" and fmt.codes_xor:
                target ^= target.dtype.type(fmt.codes_xor)
    return QuantizedTensor(fmt, shape, fields)


def to_blocks(tensor: QuantizedTensor) -> npt.NDArray[np.uint8]:
    """uint8 [N, nblocks * block_bytes]: the exact inverse of :func:`from_blocks`."""
    fmt = tensor.format
    _check_source(fmt)
    n, nblocks = tensor.shape[0], tensor.nblocks
    out = np.zeros((n * nblocks, fmt.block_bytes), np.uint8)
    step = max(1, _CHUNK_BYTES // fmt.block_bytes)
    for field in fmt.fields:
        array = tensor.fields[field.name].reshape(n * nblocks, field.count)
        for a in range(0, n * nblocks, step):
            part = array[a : a + step]
            if field.name == "codes" and fmt.codes_xor:
                part = part ^ part.dtype.type(fmt.codes_xor)
            _scatter(field, part, out[a : a + step])
    return out.reshape(n, nblocks * fmt.block_bytes)


def _check_source(fmt: Format) -> None:
    if not all(field.runs for field in fmt.fields):
        raise Unsupported("the format has no source blocks; quantize a float weight to make it",
                          fmt.name)


def _elements(run: Run) -> slice:
    return slice(run.start, run.start + run.step * (run.nbytes - 1) + 1, run.step)


def _gather(field: Field, source: Array, target: Array) -> None:
    """Write the field's bits of ``source`` [blocks, bytes] to ``target`` [blocks, count]."""
    for run in sorted(field.runs, key=lambda run: run.low):
        # Copied first, so that the arithmetic runs over one long contiguous array.
        part = np.ascontiguousarray(source[:, run.byte : run.byte + run.nbytes])
        if run.shift:
            part = part >> np.uint8(run.shift)
        if run.shift + run.bits < 8:
            part = part & np.uint8((1 << run.bits) - 1)
        if run.low:
            target[:, _elements(run)] |= part.astype(field.dtype) << field.dtype.type(run.low)
        else:  # every element has one such run: it sets what the others are added to
            target[:, _elements(run)] = part


def _scatter(field: Field, source: Array, target: Array) -> None:
    """Or the elements ``source`` [blocks, count] into the field's bits of ``target``."""
    for run in field.runs:
        part = np.ascontiguousarray(source[:, _elements(run)])
        if run.low:
            part = part >> field.dtype.type(run.low)
        if run.low + run.bits < field.bits:
            part = part & field.dtype.type((1 << run.bits) - 1)
        part = part.astype(np.uint8, copy=False)
        if run.shift:
            part = part << np.uint8(run.shift)
        target[:, run.byte : run.byte + run.nbytes] |= part
