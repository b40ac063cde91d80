"""A product to measure kernels on: random weights and activations, and what must come out.

All row-blocks of the weight are the same 16 rows, so that the reference of any N is that of 16.
Cases are files that templates/tools/time_kernels.cpp reads.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from qigen.backends.cpu.decode import ACTIVATION_GROUP
from qigen.backends.cpu.gemm import LANES, PER, GemmSpec, pack_weights, row_block_bytes, steps
from qigen.backends.cpu.matmul import (
    ActivationRecord,
    MatmulSpec,
    activation_needs,
    activation_top,
    interleaved,
)
from qigen.costmodel.gemm import GemmShape
from qigen.formats import layout
from qigen.formats.algebra import Format
from qigen.formats.layout import pack, packed_bytes, packed_shape
from qigen.formats.tensor import QuantizedTensor, as_float32, float_bits, kept_weights, mask_field
from qigen.formats.words import ZEROS, fitted, most_probable

Array = npt.NDArray[Any]

ROWS = 16
TOLERANCE = 1e-4
"""Of the sum of |w x|: float32 sums of thousands of terms stay far below, and one wrong weight in
some thousand is far above."""

_HEADER = struct.Struct("<4q2i")
_MATMUL = struct.Struct("<q4i")
_GEMM = struct.Struct("<3q6i")


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
        elif f.name in ("ix", "bm", "vm"):
            assert format.mask is not None
            _keep, of = format.mask
            worth = rng.random((ROWS, nblocks * format.block // of, of))
            places = np.nonzero(kept_weights(format, worth))[2].reshape(ROWS, nblocks, -1)
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


class Case(Protocol):
    """What a kernel is measured on: y [m, n] of float32, or int32 if its sums are ``exact``."""

    @property
    def m(self) -> int: ...

    @property
    def n(self) -> int: ...

    @property
    def exact(self) -> bool: ...

    def build(self) -> tuple[bytes, Array, Array]:
        """(the file that ``time_kernels`` reads, y float64 [m, 16], largest errors [m, 16])."""


@dataclass(frozen=True)
class Problem:
    """x [m, k] times W [n, k]^T for one kernel: the case file, and y of 16 rows with its bound."""

    spec: MatmulSpec
    n: int
    k: int
    m: int

    exact: ClassVar[bool] = False

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
        row_block = layout.row_block_bytes(spec.format, self.k, spec.layout)
        header = _HEADER.pack(
            0, packed.size - row_block, row_block, data.nbytes, self.n, self.m
        ) + _MATMUL.pack(data.shape[1], kblocks, *offsets)
        values, w = values.astype(np.float64), w.astype(np.float64)
        magnitude = np.abs(values) @ np.abs(w).T
        return header + packed.tobytes() + data.tobytes(), values @ w.T, TOLERANCE * magnitude

    def _records(self, x: Array) -> tuple[Array, Array, tuple[int, int, int]]:
        """(activation rows as the kernel reads them, their values, offsets of scales, zeros and
        sums) of quantized activations."""
        spec, m = self.spec, self.m
        token, top = spec.token_scale, activation_top(spec.activations)
        zeros, sums = activation_needs(spec)
        k = -(-x.shape[1] // ACTIVATION_GROUP) * ACTIVATION_GROUP
        x = np.pad(x, ((0, 0), (0, k - x.shape[1])))
        record = ActivationRecord(k, token, zeros, sums)
        groups = x.reshape(m, 1 if token else k // ACTIVATION_GROUP, -1)
        scale = np.abs(groups).max(axis=2, keepdims=True) / np.float32(top)
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


_X_SLACK = 64  # bytes after the last pixel, whose last vector may be read as a whole


@dataclass(frozen=True)
class GemmProblem:
    """A product or convolution for one kernel without an epilogue: sums of floats, or of bytes as
    int32. The x of all pixels lies as ``shape`` says, with random numbers in every byte of it."""

    spec: GemmSpec
    shape: GemmShape

    @property
    def m(self) -> int:
        """Rows of y: pixels."""
        return self.shape.pixels

    @property
    def n(self) -> int:
        """Output channels."""
        return self.shape.n

    @property
    def exact(self) -> bool:
        """Whether y are the very sums, int32."""
        return self.spec.arithmetic == "u8s8"

    def build(self) -> tuple[bytes, Array, Array]:
        """As :meth:`Case.build`."""
        spec, s = self.spec, self.shape
        per, count = PER[spec.arithmetic], steps(s.k, spec.arithmetic)
        taps = np.array(s.tap_offsets(spec.arithmetic), np.int64)
        x = self._x(int(s.last_pixel + taps.max()) + 4 * count + _X_SLACK)
        w = self._w()
        # in elements of 4 / per bytes: [images, rows, columns] -> [pixels]
        starts = np.add.outer(
            np.add.outer(np.arange(s.images) * s.image_bytes, np.arange(s.rows) * s.row_bytes),
            np.arange(s.columns) * s.pixel,
        ).reshape(-1)
        values, weights = self._values(x), self._weights(w)
        y: Array = np.zeros((s.pixels, LANES))
        magnitude = np.zeros_like(y)
        for tap, of in zip(taps, range(s.taps), strict=True):
            at = ((starts + tap) * per // 4)[:, None] + np.arange(s.k)
            part = values[at].astype(np.float64)
            y += part @ weights[:, of].T
            if not self.exact:
                magnitude += np.abs(part) @ np.abs(weights[:, of]).T
        packed = pack_weights(w, spec.arithmetic)
        block = row_block_bytes(s.taps, s.k, spec.arithmetic)
        header = _HEADER.pack(1, 0, block, x.nbytes, s.n, s.pixels) + _GEMM.pack(
            s.pixel, s.row_bytes, s.image_bytes, s.columns, s.rows, s.images, s.taps, count, 0
        )
        content = header + taps.astype(np.int32).tobytes() + packed.tobytes() + x.tobytes()
        return content, y, TOLERANCE * magnitude

    def _x(self, nbytes: int) -> Array:
        """At least ``nbytes`` bytes of activations."""
        rng = np.random.default_rng(1)
        if self.exact:
            return rng.integers(0, 256, nbytes).astype(np.uint8)
        x = rng.standard_normal(-(-nbytes * PER[self.spec.arithmetic] // 4), np.float32)
        return float_bits(x, "bf16") if self.spec.arithmetic == "bf16" else x

    def _w(self) -> Array:
        """Weights [16, taps, k] of the kernel's type."""
        rng, shape = np.random.default_rng(0), (LANES, self.shape.taps, self.shape.k)
        if self.spec.arithmetic in ("u8s8", "f32s8"):
            return rng.integers(-127, 128, shape).astype(np.int8)
        w = rng.standard_normal(shape, np.float32)
        return float_bits(w, "bf16") if self.spec.arithmetic == "bf16" else w

    def _values(self, x: Array) -> Array:
        return as_float32("bf16", x) if self.spec.arithmetic == "bf16" else x

    def _weights(self, w: Array) -> Array:
        return self._values(w).astype(np.float64)


def wrong(y: Array, expected: Array, bound: Array) -> str:
    """What is wrong with y [m, n], '' if nothing is."""
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
