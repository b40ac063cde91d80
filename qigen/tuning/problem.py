"""A product to measure kernels on: random weights and activations, and what must come out.

All row-blocks of the weight are the same 16 rows, so that the reference of any N is that of 16.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.backends.cpu.decode import ACTIVATION_GROUP
from qigen.backends.cpu.matmul import (
    ActivationRecord,
    MatmulSpec,
    activation_needs,
    interleaved,
)
from qigen.formats.algebra import Format, QuantizedTensor, as_float32, float_bits, mask_field
from qigen.formats.layout import pack, packed_bytes, packed_shape, row_block_bytes
from qigen.formats.words import ZEROS, fitted, most_probable

Array = npt.NDArray[Any]

ROWS = 16
TOLERANCE = 1e-4
"""Of the sum of |w x|: float32 sums of thousands of terms stay far below, and one wrong weight in
some thousand is far above."""

_HEADER = struct.Struct("<4q6i")


def random_rows(format: Format, k: int, seed: int = 0) -> QuantizedTensor:
    """16 rows of ``k`` columns (rounded up to whole blocks): random codes over their whole range,
    scales without subnormals and infinities."""
    rng = np.random.default_rng(seed)
    nblocks = -(-k // format.block)
    fields: dict[str, Array] = {}
    for f in format.fields:
        shape = f.shape(ROWS, nblocks)
        if format.float_kind:
            values = rng.uniform(-1, 1, shape).astype(np.float32)
            fields[f.name] = float_bits(values, format.float_kind)
        elif f.number in ("f16", "bf16", "f32"):
            floats = rng.uniform(0.01, 0.02, shape).astype(np.float32)
            fields[f.name] = float_bits(floats, f.number)
        elif f.name == "dict":
            fields[f.name] = most_probable(format.code_bits).reshape(shape)
        elif f.name == "codes" and format.words:
            kept = rng.random((ROWS * nblocks, format.block), np.float32)
            codes = np.where(kept < ZEROS, 1, 2 * (kept > (1 + ZEROS) / 2)).astype(np.uint8)
            words = fitted(codes, kept, most_probable(format.code_bits), format.words)
            fields[f.name] = words.reshape(shape).astype(f.dtype)
        elif f.name in ("ix", "bm"):
            assert format.mask is not None
            keep, of = format.mask
            order = rng.random((ROWS, nblocks, format.block // of, of)).argsort(axis=3)
            places = np.sort(order[..., :keep], axis=3).reshape(ROWS, nblocks, -1)
            fields.update(mask_field(format, places))
        elif f.name == "qc":  # columns, ascending
            fields[f.name] = np.sort(rng.integers(0, k, shape)).astype(f.dtype)
        else:
            low, high = (120, 128) if f.name == "e" else (0, 1 << f.bits)
            fields[f.name] = rng.integers(low, high, shape).astype(f.dtype)
    return QuantizedTensor(format, (ROWS, nblocks * format.block), fields)


def random_x(m: int, k: int) -> npt.NDArray[np.float32]:
    """float32 [m, k]: activations, before any rounding."""
    return np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)


@dataclass(frozen=True)
class Problem:
    """x [m, k] times W [n, k]^T for one kernel: the case file, and y of 16 rows with its bound."""

    spec: MatmulSpec
    n: int
    k: int
    m: int

    def _padded(self) -> int:
        kblock = self.spec.format.block * self.spec.layout.blocks
        return packed_shape(self.spec.format, (1, self.k), self.spec.layout)[1] * kblock

    def _x(self) -> Array:
        x = np.zeros((self.m, self._padded()), np.float32)
        x[:, : self.k] = random_x(self.m, self.k)
        return x

    def build(self) -> tuple[bytes, Array, Array]:
        """(the file that ``time_kernels`` reads, y float64 [m, 16], largest errors [m, 16])."""
        spec, x = self.spec, self._x()
        rows = random_rows(spec.format, self.k)
        w: Array = np.zeros((ROWS, x.shape[1]))
        w[:, : rows.shape[1]] = rows.dequantize()
        offsets = (0, 0, 0)
        if spec.integer:
            data, values, offsets = self._records(x)
        elif spec.activations == "bf16":
            bits = float_bits(np.pad(x, ((0, 0), (0, x.shape[1] % 2))), "bf16")
            data, values = bits.view(np.uint8), as_float32("bf16", bits)[:, : x.shape[1]]
            w = as_float32("bf16", float_bits(w.astype(np.float32), "bf16"))
        else:
            data, values = x.view(np.uint8), x
        packed = pack(rows, spec.layout)
        kblocks = packed_shape(spec.format, (ROWS, self.k), spec.layout)[1]
        row_block = row_block_bytes(spec.format, self.k, spec.layout)
        header = _HEADER.pack(
            packed.size - row_block, row_block, data.nbytes, data.shape[1], self.n, kblocks, self.m,
            *offsets,
        )
        values, w = values.astype(np.float64), w.astype(np.float64)
        magnitude = np.abs(values) @ np.abs(w).T
        return header + packed.tobytes() + data.tobytes(), values @ w.T, TOLERANCE * magnitude

    def _records(self, x: Array) -> tuple[Array, Array, tuple[int, int, int]]:
        """(activation rows as the kernel reads them, their values, offsets of scales, zeros and
        sums) of quantized activations."""
        spec, m = self.spec, self.m
        token = spec.activations == "int8-token"
        zeros, sums = activation_needs(spec)
        k = -(-x.shape[1] // ACTIVATION_GROUP) * ACTIVATION_GROUP
        x = np.pad(x, ((0, 0), (0, k - x.shape[1])))
        record = ActivationRecord(k, token, zeros, sums)
        groups = x.reshape(m, 1 if token else k // ACTIVATION_GROUP, -1)
        scale = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)
        safe = np.where(scale > 0, scale, np.float32(1))
        q = np.rint(groups / safe).astype(np.int8)
        data = np.zeros((m, record.nbytes), np.uint8)

        def put(offset: int, array: Array) -> int:
            raw = np.ascontiguousarray(array).view(np.uint8)
            data[:, offset : offset + raw.shape[1]] = raw
            return offset

        def segments(length: int) -> Array:
            return np.asarray(q.astype(np.int32).reshape(m, -1, length).sum(2, dtype=np.int32))

        put(0, q.reshape(m, k))
        put(record.scale_offset, scale[..., 0])
        zero_offset = sum_offset = 0
        for length, zero in zeros:
            part = -zero * segments(length)
            zero_offset = put(record.offset("zero", length, zero), part.astype(np.int32))
        for length in sums:
            factor: Array = np.ones((m, 1), np.float32)
            if not token:
                factor = scale[..., 0].repeat(ACTIVATION_GROUP // length, axis=1)
            part = segments(length).astype(np.float32) * factor
            sum_offset = put(record.offset("sum", length), part)
        values = (q.astype(np.float32) * scale).reshape(m, k)[:, : self._padded()]
        offsets = (record.scale_offset, zero_offset, sum_offset)
        return interleaved(data, spec.tiles), values, offsets

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weight."""
        return packed_bytes(self.spec.format, (self.n, self.k), self.spec.layout)


def wrong(y: Array, expected: Array, bound: Array) -> str:
    """What is wrong with y float32 [m, n], '' if nothing is."""
    repeated = np.arange(y.shape[1]) % ROWS
    error = np.abs(y.astype(np.float64) - expected[:, repeated])
    bad = ~(error <= bound[:, repeated])  # NaN too
    if not bad.any():
        return ""
    token, row = np.argwhere(bad)[0]
    return (
        f"{int(bad.sum())} of {bad.size} results are wrong, first y[{token}, {row}] = "
        f"{y[token, row]:.6g} instead of {expected[token, row % ROWS]:.6g}"
    )
