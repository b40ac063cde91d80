"""Kernels of the gemm family against numpy references that are written from their definitions.

Float arithmetics are compared with float64 within bounds of their roundings; for u8s8 the integer
sums are exact and what follows them is the same float32 operations, so the outputs are equal.
"""

from __future__ import annotations

import ctypes
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qigen.backends.base import Isa
from qigen.backends.cpu import gemm
from qigen.backends.cpu.elementwise import Step, chain_reference
from qigen.backends.cpu.gemm import DepthwiseSpec, GemmSpec
from qigen.backends.cpu.isa import ISAS
from qigen.errors import Unsupported
from tests.backends.cpu.gemm_build import (
    DepthwiseArgs,
    GemmArgs,
    GemmInput,
    PadArgs,
    QuantizeRowsArgs,
    build,
    fill,
    load,
    run,
)
from tests.backends.cpu.kernel_build import EMULATED_TILES, compiler, why_not

Array = npt.NDArray[Any]

U = 2.0**-24
"""Unit roundoff of float32: a sum of n rounded terms is off by at most n U of their magnitudes."""
BF16 = 2.0**-8
"""Half a unit in the last place of bf16, relatively."""
TIE = 1e-3
"""How far from half a quantum a float32 value may lie and still round to either side."""

GUARD = 0x5A  # bytes of y where nothing may be written

GATED = (Step("mul", ("acc", "in0")), Step("add", ("t0", "in1")), Step("relu", ("t1",)))
"""relu(acc * in0 + in1): one input by channel, one by output."""
KINDS = ("channel", "full")
ROWS = {**ISAS, EMULATED_TILES.name: EMULATED_TILES}
SLOPE = 2.0  # what the chain multiplies errors by: in0 lies in [-2, 2]

GEMMS: tuple[dict[str, Any], ...] = (
    {"arithmetic": "f32"},
    {"arithmetic": "f32", "chain": GATED, "inputs": KINDS, "output": "bf16"},
    {"arithmetic": "f32s8"},
    {"arithmetic": "f32s8", "chain": GATED, "inputs": KINDS, "output": "bf16"},
    {"arithmetic": "f32", "chain": (Step("clip", ("acc",), (-1.0, 2.0)),), "output": "u8"},
    {"arithmetic": "u8s8", "chain": GATED, "inputs": KINDS},
    {"arithmetic": "u8s8", "output": "s8", "divide": False},
    {"arithmetic": "u8s8", "chain": GATED, "inputs": KINDS, "output": "u8", "dynamic": True},
    {"arithmetic": "u8s8", "output": "i32"},
    {"arithmetic": "u8s8", "output": "i32", "dynamic": True},
    {"arithmetic": "bf16", "chain": GATED, "inputs": KINDS},
)
DEPTHWISE: tuple[dict[str, Any], ...] = (
    {"arithmetic": "f32", "chain": GATED, "inputs": KINDS},
    {"arithmetic": "f32", "output": "bf16"},
    {"arithmetic": "u8s8", "output": "s8", "divide": False},
    {"arithmetic": "u8s8", "chain": GATED, "inputs": KINDS, "output": "u8", "dynamic": True},
    {"arithmetic": "u8s8", "chain": GATED, "inputs": KINDS},
)


def specs(isa: Isa) -> tuple[list[GemmSpec], list[DepthwiseSpec]]:
    """The kernels under test; a row that differs from another in bf16 only has that one."""
    gemms = [GemmSpec(isa, **about) for about in GEMMS]
    if isa.tiles:
        return [s for s in gemms if s.tiles.matrix], []
    if isa.native_bf16:
        return [s for s in gemms if s.arithmetic == "bf16"], []
    return gemms, [DepthwiseSpec(isa, **about) for about in DEPTHWISE]


@dataclass
class Library:
    handle: ctypes.CDLL
    gemms: list[GemmSpec]
    depthwise: list[DepthwiseSpec]


@functools.cache
def library(isa_name: str, folder: Path) -> Library:
    isa = ROWS[isa_name]
    gemms, depthwise = specs(isa)
    kernels = [gemm.render_gemm(s) for s in gemms] + [gemm.render_depthwise(s) for s in depthwise]
    return Library(load(build(folder, isa, [*kernels, gemm.render_prepare(isa)])), gemms, depthwise)


@pytest.fixture(params=list(ROWS))
def lib(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Library:
    if why_not(ROWS[request.param]):
        pytest.skip(why_not(ROWS[request.param]))
    return library(request.param, pytestconfig.cache.mkdir("kernels"))


# ---- values ----

def bf16_bits(x: Array) -> Array:
    """uint16: float32 to the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.asarray((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: Array) -> Array:
    return np.asarray(bits.astype(np.uint32) << 16).view(np.float32)


def elements(rng: np.random.Generator, shape: tuple[int, ...], arithmetic: str, x: bool) -> Array:
    """Inputs (x) or weights as a kernel stores them; bytes take their extreme values."""
    if arithmetic == "u8s8":
        low, high = (0, 255) if x else (-128, 127)
        q = rng.integers(low, high, shape, endpoint=True)
        q[rng.random(shape) < 0.3] = high if x else low
        return q.astype(np.uint8 if x else np.int8)
    if arithmetic == "f32s8" and not x:
        return rng.integers(-128, 127, shape, endpoint=True).astype(np.int8)
    values = rng.normal(0, 1, shape).astype(np.float32)
    return bf16_bits(values) if arithmetic == "bf16" else values


def numbers(stored: Array) -> Array:
    """What elements stand for, in float64 or int64."""
    if stored.dtype == np.uint16:
        return bf16_values(stored).astype(np.float64)
    return stored.astype(np.float64 if stored.dtype == np.float32 else np.int64)


def channels(rng: np.random.Generator, n: int, low: float, high: float) -> Array:
    """A float32 vector by channel, padded to 16."""
    return rng.uniform(low, high, -(-n // 16) * 16).astype(np.float32)


DTYPES = {"f32": np.float32, "bf16": np.uint16, "u8": np.uint8, "s8": np.int8, "i32": np.int32}


@dataclass
class Geometry:
    """Outputs [images, rows, columns, n] in a larger array: every stride has a gap."""

    images: int
    rows: int
    columns: int
    n: int
    gap: int = 0

    def tensor(self, dtype: npt.DTypeLike) -> tuple[Array, tuple[int, int, int]]:
        """A flat array of exactly the bytes in reach, and the strides in elements."""
        pixel = self.n + self.gap
        row = pixel * self.columns + self.gap
        image = row * self.rows + self.gap
        last = (self.images - 1) * image + (self.rows - 1) * row + (self.columns - 1) * pixel
        array = np.full((last + self.n) * np.dtype(dtype).itemsize, GUARD, np.uint8).view(dtype)
        return array, (pixel, row, image)

    def view(self, flat: Array, strides: tuple[int, int, int]) -> Array:
        size = flat.itemsize
        pixel, row, image = strides
        return np.lib.stride_tricks.as_strided(
            flat, (self.images, self.rows, self.columns, self.n),
            (image * size, row * size, pixel * size, size))


@dataclass
class Outputs:
    """What a kernel does with sums, drawn at random, and what must come of it."""

    spec: GemmSpec | DepthwiseSpec
    geometry: Geometry
    values: dict[str, Any]
    flat: Array
    strides: tuple[int, int, int]
    bias: Array
    scale: Array
    x_zero: Array  # by pixel, or one
    x_scale: Array
    inputs: list[Array]  # as [images, rows, columns, n]
    kept: list[Array]

    @staticmethod
    def random(rng: np.random.Generator, spec: GemmSpec | DepthwiseSpec, g: Geometry,
               wsum: Array, by_pixel: bool) -> Outputs:
        flat, strides = g.tensor(DTYPES[spec.output])
        pixels = (g.images, g.rows, g.columns) if by_pixel else (1,)
        bias = channels(rng, g.n, -1, 1)
        scale = channels(rng, g.n, 1e-3, 2e-3)
        x_zero = rng.integers(0, 255, pixels, endpoint=True).astype(np.int32)
        x_scale = rng.uniform(0.5, 2, pixels).astype(np.float32)
        padded = np.zeros(bias.size, np.int32)
        padded[: g.n] = wsum
        values: dict[str, Any] = {
            "y": flat, "y_pixel": strides[0], "y_row": strides[1], "y_image": strides[2],
            "bias": bias, "scale": scale, "x_zero": x_zero, "y_scale": 0.013, "y_zero": 3,
        }
        if spec.dynamic:
            values.update(wsum=padded, x_scale=x_scale, x_scale_step=int(by_pixel))
        else:
            values["init"] = -x_zero.reshape(-1)[0] * padded
        inputs, kept = [], []
        for kind in spec.inputs:
            if kind == "channel":
                data = channels(rng, g.n, -SLOPE, SLOPE)
                inputs.append(np.broadcast_to(data[: g.n], (g.images, g.rows, g.columns, g.n)))
            else:
                data, _ = g.tensor(np.float32)
                data[:] = rng.normal(0, 1, data.size)
                inputs.append(g.view(data, strides))
            kept.append(data)
        return Outputs(spec, g, values, flat, strides, bias, scale, x_zero, x_scale, inputs, kept)

    def set(self, out: ctypes.Structure) -> None:
        fill(out, self.values)
        for i, data in enumerate(self.kept):
            out.inputs[i] = GemmInput(data.ctypes.data, *self.strides)

    def written(self) -> Array:
        """The outputs; what lies between them is as it was."""
        gaps = self.flat.copy()
        self.geometry.view(gaps, self.strides)[:] = np.zeros(1, gaps.dtype)
        want = np.full_like(gaps.view(np.uint8), GUARD).view(gaps.dtype)
        self.geometry.view(want, self.strides)[:] = np.zeros(1, gaps.dtype)
        assert np.array_equal(gaps, want)
        return self.geometry.view(self.flat, self.strides)

    def check(self, sums: Array, magnitude: Array, terms: int) -> None:
        """Compare with what becomes of ``sums`` [images, rows, columns, n] of ``terms`` products.

        Integers have the zeros of x taken off; ``magnitude``: sums of the magnitudes of products.
        """
        got, spec, n = self.written(), self.spec, self.geometry.n
        exact = spec.arithmetic == "u8s8"
        if spec.output == "i32":
            assert np.array_equal(got, sums)
            return
        bias, real = self.bias[:n], np.float32 if exact else np.float64
        if exact:
            scale = self.scale[:n]
            if spec.dynamic:
                scale = self.x_scale[..., None] * scale
            acc = sums.astype(np.float32) * scale + bias
        elif spec.arithmetic == "f32s8":
            acc = sums * self.scale[:n] + bias
            magnitude = magnitude * self.scale[:n]
        else:
            acc = sums + bias
        names = {"acc": acc, **{f"in{i}": x.astype(real) for i, x in enumerate(self.inputs)}}
        want = chain_reference(spec.chain, names) if spec.chain else acc
        error = np.zeros(1)
        if not exact:
            # the vector sum, the bias, then the chain's roundings
            error = SLOPE * (terms + 4) * U * (magnitude + 8)
        if spec.output in ("u8", "s8"):
            low, high = (0, 255) if spec.output == "u8" else (-128, 127)
            y_scale = np.float32(self.values["y_scale"])
            quanta = want.astype(real) / y_scale if spec.divide else want
            if exact:
                assert np.array_equal(got, np.clip(np.rint(quanta) + 3, low, high))
            else:
                clipped = np.clip(quanta + 3, low, high)
                assert (np.abs(got - clipped) <= 0.5 + TIE + error / y_scale).all()
        elif spec.output == "bf16":
            near = BF16 * np.abs(want) + error + 2.0**-130
            assert (np.abs(bf16_values(got) - want) <= near).all()
        elif exact:
            assert np.array_equal(got, want)
        else:
            assert (np.abs(got - want) <= error).all()


# ---- products and convolutions ----

@dataclass(frozen=True)
class Shape:
    """A convolution; a product has columns = M and a kernel of one tap."""

    columns: int
    k: int
    n: int
    rows: int = 1
    images: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    gap: int = 0

    @property
    def input(self) -> tuple[int, int]:
        """Rows and columns of x, borders included."""
        h, w = ((count - 1) * s + (taps - 1) * d + 1 for count, s, taps, d in zip(
            (self.rows, self.columns), self.stride, self.kernel, self.dilation, strict=True))
        return h, w


SHAPES = {
    "product": Shape(37, 20, 40),
    "one_row": Shape(1, 35, 77),
    "deep": Shape(21, 270, 48),
    "few_rows": Shape(3, 64, 100),
    "tiny": Shape(1, 1, 1),
    "pointwise": Shape(9, 24, 56, rows=3, images=2, gap=3),
    "strided": Shape(14, 8, 24, rows=5, stride=(2, 2)),
    "spatial": Shape(13, 12, 33, rows=4, images=2, kernel=(3, 3)),
    "tall": Shape(2, 8, 16, rows=27, kernel=(5, 1), stride=(1, 2)),
    "dilated": Shape(10, 3, 17, rows=3, kernel=(2, 3), stride=(2, 1), dilation=(2, 3), gap=1),
}


def convolved(x: Array, w: Array, s: Shape) -> Array:
    """[images, rows, columns, N] of x [images, h, w, K] and weights [N, taps, K]."""
    y = np.zeros((s.images, s.rows, s.columns, len(w)), x.dtype)
    for tap in range(w.shape[1]):
        i, j = divmod(tap, s.kernel[1])
        top, left = i * s.dilation[0], j * s.dilation[1]
        part = x[:, top : top + (s.rows - 1) * s.stride[0] + 1 : s.stride[0],
                 left : left + (s.columns - 1) * s.stride[1] + 1 : s.stride[1]]
        y += part @ w[:, tap].T
    return y


def call_gemm(handle: ctypes.CDLL, spec: GemmSpec, s: Shape, threads: int) -> Outputs:
    """Run a kernel on random data and compare; what was written."""
    rng = np.random.default_rng(7)
    kind = spec.arithmetic
    h, width = s.input
    count = gemm.steps(s.k, kind)
    k_padded = count * gemm.PER[kind]
    x = elements(rng, (s.images, h, width, k_padded), kind, x=True)
    taps = s.kernel[0] * s.kernel[1]
    w = elements(rng, (s.n, taps, s.k), kind, x=False)
    packed = gemm.pack_weights(w, kind)
    assert packed.size == gemm.packed_bytes(s.n, taps, s.k, kind)
    pixel = x.strides[2]
    offsets = np.array([i * s.dilation[0] * x.strides[1] + j * s.dilation[1] * pixel
                        for i in range(s.kernel[0]) for j in range(s.kernel[1])], np.int32)
    by_pixel = spec.dynamic and taps == 1
    g = Geometry(s.images, s.rows, s.columns, s.n, s.gap)
    wsum = w.astype(np.int32).sum(axis=(1, 2)) if kind == "u8s8" else np.zeros(s.n, np.int32)
    outputs = Outputs.random(rng, spec, g, wsum, by_pixel)
    args = GemmArgs()
    values = {
        "w": packed, "row_block": gemm.row_block_bytes(taps, s.k, kind), "x": x,
        "x_pixel": s.stride[1] * pixel, "x_row": s.stride[0] * x.strides[1],
        "x_image": x.strides[0], "columns": s.columns, "rows": s.rows, "images": s.images,
        "n_taps": taps, "steps": count, "n": s.n,
    }
    if taps > 1:
        values["taps"] = offsets
    kept = fill(args, values)
    outputs.set(args.out)
    run(handle, spec.name, args, threads)
    xs, ws = numbers(x[..., : s.k]), numbers(w)
    sums = convolved(xs, ws, s)
    magnitude = convolved(np.abs(xs), np.abs(ws), s)
    if kind == "u8s8":
        sums -= outputs.x_zero[..., None] * wsum
    outputs.check(sums, magnitude, taps * k_padded)
    del kept
    return outputs


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gemm(lib: Library, shape: Shape) -> None:
    for spec in lib.gemms:
        one = call_gemm(lib.handle, spec, shape, 1)
        for threads in (2, 3):
            more = call_gemm(lib.handle, spec, shape, threads)
            assert one.flat.tobytes() == more.flat.tobytes(), spec.name


def test_a_long_sum_of_extreme_bytes_is_exact(lib: Library) -> None:
    """As many products as the bound allows, all of the largest magnitude."""
    spec = next((s for s in lib.gemms if s.output == "i32" and not s.dynamic), None)
    if spec is None:
        pytest.skip("no integer kernel of its own")
    k = gemm.I32_MAX // gemm.PRODUCT_MAX // 4 * 4
    gemm.check_sums(k)
    with pytest.raises(Unsupported, match="overflow"):
        gemm.check_sums(k + 4)
    x = np.full((2, k), 255, np.uint8)
    w = np.full((3, 1, k), -128, np.int8)
    y, init = np.zeros((2, 3), np.int32), np.zeros(16, np.int32)
    args = GemmArgs()
    kept = fill(args, {"w": gemm.pack_weights(w, "u8s8"), "x": x, "x_pixel": k, "columns": 2,
                       "row_block": gemm.row_block_bytes(1, k, "u8s8"), "rows": 1, "images": 1,
                       "n_taps": 1, "steps": k // 4, "n": 3})
    kept += fill(args.out, {"y": y, "y_pixel": 3, "init": init})
    run(lib.handle, spec.name, args)
    assert (y == -128 * 255 * k).all()
    del kept


@pytest.mark.parametrize("kind", list(gemm.PER))
def test_packing_loses_nothing(kind: str) -> None:
    for n, taps, k in ((1, 1, 1), (16, 9, 3), (33, 2, 21)):
        w = elements(np.random.default_rng(n), (n, taps, k), kind, x=False)
        packed = gemm.pack_weights(w, kind)
        assert packed.size == gemm.packed_bytes(n, taps, k, kind)
        assert np.array_equal(gemm.unpack_weights(packed, n, taps, k, kind), w)
    lanes = gemm.pack_weights(w, kind).view(w.dtype).reshape(3, 2, -1, 16, gemm.PER[kind])
    assert lanes[1, 1, 0, 5, 0] == w[21, 1, 0]


# ---- depthwise ----

@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution of x [images, h, w, channels]."""

    h: int
    w: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    images: int = 1
    gap: int = 0

    @property
    def output(self) -> tuple[int, int]:
        rows, columns = ((size + before + after - (taps - 1) * d - 1) // s + 1
                         for size, before, after, taps, d, s in zip(
                             (self.h, self.w), self.pads[:2], self.pads[2:], self.kernel,
                             self.dilation, self.stride, strict=True))
        return rows, columns


DEPTHWISE_SHAPES = {
    "3x3": Depthwise(6, 19, 24, (3, 3), pads=(1, 1, 1, 1), images=2),
    "5x5_strided": Depthwise(11, 24, 16, (5, 5), stride=(2, 2), pads=(2, 2, 2, 2), gap=2),
    "dilated": Depthwise(9, 12, 33, (3, 2), dilation=(2, 3), pads=(1, 3, 2, 0)),
    "wide": Depthwise(1, 150, 5, (1, 7), pads=(0, 3, 0, 3)),
    "as_large_as_can_be": Depthwise(5, 171, 16, (5, 5), dilation=(1, 50), pads=(2, 34, 2, 0)),
    "larger_than_x": Depthwise(2, 3, 17, (5, 5), stride=(1, 2), pads=(4, 4, 3, 3)),
}


def call_depthwise(handle: ctypes.CDLL, spec: DepthwiseSpec, s: Depthwise,
                   threads: int) -> Outputs:
    rng = np.random.default_rng(11)
    kind = spec.arithmetic
    x = elements(rng, (s.images, s.h, s.w, s.channels), kind, x=True)
    taps = s.kernel[0] * s.kernel[1]
    w = elements(rng, (taps, s.channels), kind, x=False)
    rows, columns = s.output
    g = Geometry(s.images, rows, columns, s.channels, s.gap)
    outputs = Outputs.random(rng, spec, g, np.zeros(s.channels, np.int32), False)
    args = DepthwiseArgs()
    kept = fill(args, {
        "w": gemm.pack_depthwise(w), "x": x, "x_pixel": s.channels, "x_row": s.w * s.channels,
        "x_image": s.h * s.w * s.channels, "h": s.h, "width": s.w, "channels": s.channels,
        "columns": columns, "rows": rows, "images": s.images, "kernel_h": s.kernel[0],
        "kernel_w": s.kernel[1], "stride_h": s.stride[0], "stride_w": s.stride[1],
        "dilation_h": s.dilation[0], "dilation_w": s.dilation[1], "pad_top": s.pads[0],
        "pad_left": s.pads[1]})
    outputs.set(args.out)
    run(handle, spec.name, args, threads)
    xs, ws = numbers(x), numbers(w)
    if kind == "u8s8":
        xs = xs - int(outputs.x_zero[0])  # borders are zeros
    (top, left, bottom, right) = s.pads
    full = np.pad(xs, ((0, 0), (top, bottom), (left, right), (0, 0)))
    shape = Shape(columns, 1, 1, rows, s.images, s.kernel, s.stride, s.dilation)
    both = []
    for a, b in ((full, ws), (np.abs(full), np.abs(ws))):
        by_channel = [convolved(a[..., c : c + 1], b[None, :, c : c + 1], shape)
                      for c in range(s.channels)]
        both.append(np.concatenate(by_channel, axis=3))
    outputs.check(both[0], both[1], taps)
    del kept
    return outputs


@pytest.mark.parametrize("shape", DEPTHWISE_SHAPES.values(), ids=DEPTHWISE_SHAPES.keys())
def test_depthwise(lib: Library, shape: Depthwise) -> None:
    for spec in lib.depthwise:
        one = call_depthwise(lib.handle, spec, shape, 1)
        for threads in (2, 3):
            more = call_depthwise(lib.handle, spec, shape, threads)
            assert one.flat.tobytes() == more.flat.tobytes(), spec.name


def test_depthwise_kernels_outside_the_domain_are_refused() -> None:
    gemm.check_depthwise((22, 22), 1, "u8s8")
    gemm.check_depthwise((23, 23), 1, "f32")
    with pytest.raises(Unsupported, match="not exact"):
        gemm.check_depthwise((23, 23), 1, "u8s8")
    with pytest.raises(Unsupported, match="too large"):
        gemm.check_depthwise((3, 3), 171, "f32")


# ---- inputs ----

@dataclass(frozen=True)
class Image:
    """A tensor [images, rows, columns, channels] and the borders of its copy."""

    images: int
    rows: int
    columns: int
    channels: int
    y_channels: int
    borders: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right
    planar: bool = False  # stored as [images, channels, rows, columns]

    def padded(self, y: Array, value: Any) -> Array:
        top, bottom, left, right = self.borders
        return np.pad(y, ((0, 0), (top, bottom), (left, right),
                          (0, self.y_channels - self.channels)), constant_values=value)


IMAGES = {
    "bordered": Image(2, 4, 9, 24, 24, (1, 2, 1, 0)),
    "padded_channels": Image(1, 3, 7, 21, 24, (0, 0, 2, 1)),
    "planar": Image(2, 5, 300, 3, 4, (1, 1, 1, 1), planar=True),
    "matrix": Image(1, 1, 50, 18, 20),
    "many_channels": Image(1, 2, 3, 1030, 1032, planar=True),
    "plain": Image(1, 6, 8, 16, 16),
}


def pad_args(image: Image, x: Array, dtype: npt.DTypeLike) -> tuple[PadArgs, Array, list[Array]]:
    """Arguments for the NHWC tensor x, the output and what must outlive the call."""
    top, bottom, left, right = image.borders
    y = np.full((image.images, top + image.rows + bottom, left + image.columns + right,
                 image.y_channels), 77, dtype)
    stored = np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if image.planar else x
    order = (0, 2, 3, 1) if image.planar else (0, 1, 2, 3)
    image_, row, pixel, channel = (stored.strides[i] // x.itemsize for i in order)
    args = PadArgs()
    kept = fill(args, {
        "x": stored, "x_channel": channel, "x_pixel": pixel, "x_row": row, "x_image": image_,
        "channels": image.channels, "columns": image.columns, "rows": image.rows,
        "images": image.images, "y": y, "y_channels": image.y_channels, "top": top,
        "bottom": bottom, "left": left, "right": right})
    return args, y, kept


def quantized(x: Array, scale: Any, zero: int) -> Array:
    """ONNX QuantizeLinear to u8, in float32."""
    return np.asarray(np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255)).astype(np.uint8)


def dynamic_scale(x: Array) -> tuple[Any, int]:
    """Scale and zero of ONNX DynamicQuantizeLinear."""
    low, high = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    scale = (high - low) / np.float32(255) if high > low else np.float32(1)
    return scale, int(np.clip(np.rint(-low / scale), 0, 255))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())
def test_pad(lib: Library, image: Image, threads: int) -> None:
    rng = np.random.default_rng(3)
    shape = (image.images, image.rows, image.columns, image.channels)
    x = rng.normal(0.3, 1, shape).astype(np.float32)
    converted: dict[str, tuple[Array, dict[str, Any], Callable[[Array], Array], int]] = {
        "gemm_pad_f32": (x, {}, lambda x: x, 0),
        "gemm_pad_bf16": (x, {}, bf16_bits, 0),
        "gemm_pad_u8": (x, {"scale": 0.011, "zero": 100}, lambda x: quantized(x, 0.011, 100), 100),
        "gemm_pad_bytes": (rng.integers(0, 256, shape).astype(np.uint8), {"zero": 9},
                           lambda x: x, 9),
    }
    for entry, (data, about, meaning, empty) in converted.items():
        want = image.padded(meaning(data), empty)
        args, y, kept = pad_args(image, data, want.dtype)
        fill(args, about)
        run(lib.handle, entry, args, threads)
        assert np.array_equal(y, want), entry
        del kept


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())
def test_dynamic_quantization(lib: Library, image: Image, threads: int) -> None:
    rng = np.random.default_rng(4)
    shape = (image.images, image.rows, image.columns, image.channels)
    normal = rng.normal(0.3, 1, shape).astype(np.float32)
    for x in (normal, np.abs(normal) + 1, -np.abs(normal), np.zeros(shape, np.float32)):
        args, y, kept = pad_args(image, x, np.uint8)
        partials, scale, zero = np.zeros((threads, 16), np.float32), np.zeros(1), np.zeros(1)
        scale, zero = scale.astype(np.float32), zero.astype(np.int32)
        kept += fill(args, {"partials": partials, "scale_out": scale, "zero_out": zero})
        run(lib.handle, "gemm_minmax", args, threads)
        run(lib.handle, "gemm_pad_u8_dynamic", args, threads)
        want_scale, want_zero = dynamic_scale(x)
        assert scale[0] == want_scale and zero[0] == want_zero
        assert np.array_equal(y, image.padded(quantized(x, want_scale, want_zero), want_zero))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_quantize_rows(lib: Library, symmetric: bool, threads: int) -> None:
    rng = np.random.default_rng(5)
    m, k, k_padded, stride = 7, 45, 48, 50
    x = rng.normal(0, 1, (m, stride)).astype(np.float32)
    x[1], x[2], x[3] = 0, np.abs(x[2]) + 5, -np.abs(x[3])
    y = np.full((m, k_padded + 2), 77, np.uint8)
    scale, zero = np.zeros(m, np.float32), np.zeros(m, np.int32)
    args = QuantizeRowsArgs()
    kept = fill(args, {"x": x, "x_stride": stride, "m": m, "k": k, "y": y, "k_padded": k_padded,
                       "y_stride": k_padded + 2, "scale": scale, "zero": zero})
    run(lib.handle, "gemm_quantize_rows" + symmetric * "_symmetric", args, threads)
    for i, row in enumerate(x[:, :k]):
        most = np.abs(row).max()
        want = dynamic_scale(row)
        if symmetric:
            want = (most / np.float32(127) if most else np.float32(1), 128)
        assert (scale[i], zero[i]) == want
        assert (np.abs(y[i, :k] - (np.clip(row / want[0], -want[1], 255 - want[1]) + want[1]))
                <= 0.5 + TIE).all()
        assert (y[i, k:k_padded] == want[1]).all() and (y[i, k_padded:] == 77).all()
    del kept


# ---- specifications ----

def test_names_carry_the_specification() -> None:
    isa = ISAS["avx512vnni"]
    all_specs = [GemmSpec(isa, **about) for about in GEMMS]
    all_specs += [replace(s, divide=not s.divide) for s in all_specs if s.output in ("u8", "s8")]
    all_specs.append(GemmSpec(isa, "f32", chain=(Step("clip", ("acc",), (-1.0, 3.0)),),
                              output="u8"))
    names = {s.name for s in all_specs}
    assert len(names) == len(all_specs) and all(name.isidentifier() for name in names)


def test_unused_inputs_are_refused() -> None:
    with pytest.raises(AssertionError, match="all inputs"):
        GemmSpec(ISAS["scalar"], "f32", inputs=("full",))


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("kind", list(gemm.PER))
def test_tiles_fit_the_registers(isa: Isa, kind: str) -> None:
    tiles = gemm.tiles_for(isa, kind)
    if tiles.matrix:
        assert (tiles.pixels, tiles.blocks, tiles.tall) == (16, 2, 0)  # two registers of sums
        return
    for blocks, pixels in tiles.shapes:
        assert pixels * blocks + blocks + 1 <= isa.registers


TILINGS = (
    gemm.Tiles(5, 1, 2, 1 << 16), gemm.Tiles(2, 2, 1, 1 << 16), gemm.Tiles(1, 1, 0, 1 << 19),
)  # fmt: skip


@pytest.mark.parametrize("kind", ["f32", "u8s8"])
def test_every_tiling_has_the_same_results(kind: str, pytestconfig: pytest.Config) -> None:
    """To the last bit: the planner may choose any."""
    isa = ISAS["avx2"] if not why_not(ISAS["avx2"]) else ISAS["scalar"]
    if why_not(isa):
        pytest.skip(why_not(isa))
    own = GemmSpec(isa, kind)
    kernels = [own, *(GemmSpec(isa, kind, chosen=tiles) for tiles in TILINGS)]
    assert len({spec.name for spec in kernels}) == len(kernels)
    path = build(pytestconfig.cache.mkdir("kernels"), isa, [gemm.render_gemm(s) for s in kernels])
    handle = load(path)
    for shape in SHAPES.values():
        one = call_gemm(handle, own, shape, 1)
        for spec in kernels[1:]:
            for threads in (1, 3):
                more = call_gemm(handle, spec, shape, threads)
                assert one.flat.tobytes() == more.flat.tobytes(), spec.name


# ---- sanitizers ----

def every_case(lib: Library) -> None:
    for gemm_spec in lib.gemms:
        for shape in SHAPES.values():
            call_gemm(lib.handle, gemm_spec, shape, 2)
    for depthwise_spec in lib.depthwise:
        for case in DEPTHWISE_SHAPES.values():
            call_depthwise(lib.handle, depthwise_spec, case, 2)
    for image in IMAGES.values():
        test_pad(lib, image, 1)
        test_dynamic_quantization(lib, image, 3)
    for symmetric in (False, True):
        test_quantize_rows(lib, symmetric, 2)


def test_sanitizers(pytestconfig: pytest.Config) -> None:
    """Buffers of exactly the documented sizes, in a process with AddressSanitizer."""
    isa = ISAS["avx2"] if not why_not(ISAS["avx2"]) else ISAS["scalar"]
    if why_not(isa):
        pytest.skip(why_not(isa))
    found = [subprocess.run([compiler() or "g++", f"-print-file-name=lib{name}.so"], check=True,
                            capture_output=True, text=True).stdout.strip()
             for name in ("asan", "ubsan")]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("the compiler has no sanitizers")
    gemms = [GemmSpec(isa, **GEMMS[i]) for i in (1, 5, 8)]
    depthwise = [DepthwiseSpec(isa, **DEPTHWISE[i]) for i in (0, 3)]
    kernels = [gemm.render_gemm(s) for s in gemms] + [gemm.render_depthwise(s) for s in depthwise]
    path = build(pytestconfig.cache.mkdir("kernels"), isa, [*kernels, gemm.render_prepare(isa)],
                 sanitize=True)
    code = ("import sys, pickle; from tests.backends.cpu import test_gemm as t; "
            "gemms, depthwise = pickle.loads(bytes.fromhex(sys.argv[2])); "
            "t.every_case(t.Library(t.load(t.Path(sys.argv[1])), gemms, depthwise))")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), pickle.dumps((gemms, depthwise)).hex()],
        env={"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0",
             "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
