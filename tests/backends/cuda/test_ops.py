"""Kernels beside the products, run in the emulator, against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qigen.backends.cuda import ops
from qigen.backends.cuda.device import make_device
from qigen.backends.cuda.emulator import Schedule
from qigen.backends.cuda.gemv import LAYOUT, EmbeddingSpec, GemvSpec, render_embedding, render_gemv
from qigen.backends.cuda.ops import NormSpec
from qigen.formats import by_name, packed_shape
from qigen.ir.ops.elementwise import activate
from tests.backends.cpu.test_matmul import random_tensor

Array = npt.NDArray[Any]


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def i32(x: int) -> np.int32:
    return np.int32(x)


# -- rows and numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q4_0", "q6_k", "bf16", "f32", "nf4g64", "aqlm_2x8",
                                  "s4g128_2of4_o3", "s4gchannel_c32", "lut3_channel"])  # fmt: skip
def test_embedding(name: str) -> None:
    spec = EmbeddingSpec(by_name(name))
    k, tokens = 2 * max(spec.format.block, 24), np.array([3, 36, 0, 17], np.int32)
    table = random_tensor(spec.format, 37, k)
    device = make_device(Schedule("random"))
    kernel = device.load(spec.name, render_embedding(spec))[spec.name]
    stride = k + 8
    y = device.upload(np.full((4, stride), 7, np.float32))
    kblocks = packed_shape(spec.format, (37, k), LAYOUT)[1]
    device.launch(kernel, spec.grid(4, k), spec.block, [
        y, i32(stride), device.upload(table.pack(LAYOUT)), device.upload(tokens), i32(k),
        i32(kblocks), np.float32(1.5)])  # fmt: skip
    got = device.read(y, (4, stride), np.float32)
    want = 1.5 * table.dequantize().astype(np.float64)[tokens]
    np.testing.assert_allclose(got[:, :k], want, rtol=2e-6, atol=2e-6 * np.abs(want).max())
    assert (got[:, k:] == 7).all()


@pytest.mark.parametrize(("bias", "residual"), [(True, False), (False, True), (True, True)])
def test_gemv_adds_bias_and_residual_in_place(bias: bool, residual: bool) -> None:
    spec = GemvSpec(by_name("q4_0"), 2, bias=bias, residual=residual)
    n, k, stride = 37, 64, 48
    weight, x, y, b = random_tensor(spec.format, n, k), normal(2, 80), normal(2, stride), normal(n)
    device = make_device(Schedule("random"))
    kernel = device.load(spec.name, render_gemv(spec))[spec.name]
    at = device.upload(y)
    device.launch(kernel, spec.grid(n), spec.block, [
        at, i32(stride), device.upload(x), i32(80), device.upload(weight.pack(LAYOUT)), i32(n),
        i32(k), i32(2), *([device.upload(b)] if bias else []),
        *([at, i32(stride)] if residual else [])])  # fmt: skip
    got = device.read(at, y.shape, np.float32)
    want = x[:, :k].astype(np.float64) @ weight.dequantize().astype(np.float64).T
    want += (b if bias else 0) + (y[:, :n] if residual else 0)
    np.testing.assert_allclose(got[:, :n], want, atol=2e-5 * np.abs(want).max())
    np.testing.assert_array_equal(got[:, n:], y[:, n:])


NORMS = [("rms", False, 300), ("rms", True, 64), ("layer", False, 1000), ("layer", True, 7)]


@pytest.mark.parametrize(("kind", "add", "n"), NORMS)
def test_norm(kind: str, add: bool, n: int) -> None:
    spec, rows, stride = NormSpec(kind, add), 3, n + 3
    x, base, w, b = normal(rows, stride), normal(rows, stride, seed=2), normal(n), normal(n, seed=4)
    x += 2
    device = make_device(Schedule("random"))
    kernel = device.load(spec.name, ops.render_norm(spec))[spec.name]
    y = device.upload(base) if add else device.allocate(4 * rows * stride)
    device.launch(kernel, (rows,), spec.block, [
        y, i32(stride), device.upload(x), i32(stride), device.upload(w), i32(n), np.float32(1e-5),
        *([device.upload(b)] if kind == "layer" else []),
        *([y, i32(stride)] if add else [])])  # fmt: skip
    got = [device.read(y + 4 * r * stride, (n,), np.float32) for r in range(rows)]
    exact = x[:, :n].astype(np.float64)
    if kind == "layer":
        exact -= exact.mean(axis=1, keepdims=True)
    want = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5) * w
    want += (b if kind == "layer" else 0) + (base[:, :n] if add else 0)
    np.testing.assert_allclose(got, want, rtol=4e-6, atol=4e-6)


def test_norm_passes_nan_through() -> None:
    x = normal(2, 64)
    x[1, 5] = np.nan
    device = make_device()
    kernel = device.load("norm_rms", ops.render_norm(NormSpec()))["norm_rms"]
    y = device.allocate(4 * 2 * 64)
    device.launch(kernel, (2,), NormSpec().block, [y, i32(64), device.upload(x), i32(64),
                                                  device.upload(np.ones(64, np.float32)), i32(64),
                                                  np.float32(1e-5)])  # fmt: skip
    got = device.read(y, (2, 64), np.float32)
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1]).all()


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_activation_in_place(kind: str) -> None:
    gate, up = 8 * normal(2, 150), normal(2, 160, seed=2)
    gate[0, :3] = [-200, 200, np.nan]
    device = make_device()
    (kernel,) = device.load(kind, ops.render_elementwise(kind)).values()
    y = device.upload(gate)
    device.launch(kernel, ops.elementwise_grid(2, 145), (ops.ELEMENTWISE_THREADS,), [
        y, i32(150), i32(145), y, i32(150), device.upload(up), i32(160)])  # fmt: skip
    got = device.read(y, gate.shape, np.float32)
    want = activate(gate.astype(np.float64), kind)[:, :145] * up[:, :145]
    np.testing.assert_allclose(got[:, :145], want, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(got[:, 145:], gate[:, 145:])


def test_softcap_rows_and_columns() -> None:
    x, rows = 30 * normal(4, 140), np.array([2, 0], np.int32)
    columns = np.random.default_rng(2).permutation(140).astype(np.int32)
    device = make_device()
    kernels = {kind: next(iter(device.load(kind, ops.render_elementwise(kind)).values()))
               for kind in ("softcap", "rows", "columns")}  # fmt: skip
    at, block = device.upload(x), (ops.ELEMENTWISE_THREADS,)
    y, z = device.allocate(4 * 2 * 140), device.allocate(4 * 2 * 140)
    grid = ops.elementwise_grid(2, 140)
    device.launch(kernels["rows"], grid, block,
                  [y, i32(140), i32(140), at, i32(140), device.upload(rows)])  # fmt: skip
    device.launch(kernels["columns"], grid, block,
                  [z, i32(140), i32(140), y, i32(140), device.upload(columns)])  # fmt: skip
    np.testing.assert_array_equal(device.read(z, (2, 140), np.float32), x[rows][:, columns])
    device.launch(kernels["softcap"], grid, block, [y, i32(140), i32(140), np.float32(20)])
    want = 20 * np.tanh(x[rows].astype(np.float64) / 20)
    np.testing.assert_allclose(device.read(y, (2, 140), np.float32), want, rtol=1e-5)


@pytest.mark.parametrize(("bits", "columns"), [(8, 0), (4, 0), (4, 16)])
def test_quantized_rows(bits: int, columns: int) -> None:
    """Codes within half a step, columns apart as halves, zeros for rows of zeros, a NaN kept."""
    m, k, ldx, top = 4, 71, 96, 2 ** (bits - 1) - 1
    x = normal(m, 80)
    x[2], x[3, 9] = 0, np.nan
    places = np.sort(np.random.default_rng(2).choice(np.setdiff1d(np.arange(k), [9]), 16, False))
    x[:, places] *= 50
    name = f"quantize_{bits}" + f"_c{columns}" * bool(columns)
    device = make_device(Schedule("random"))
    kernel = device.load(name, ops.render_quantize(bits, columns))[name]
    codes, scales, apart = (device.allocate(n) for n in (m * ldx * bits // 8, 4 * m, 2 * m * 16))
    device.launch(kernel, (m,), (ops.QUANTIZE_THREADS,), [
        codes, i32(ldx), scales, device.upload(x), i32(80), i32(k),
        *([apart, device.upload(places.astype(np.uint16))] if columns else [])])  # fmt: skip
    kept = x[:, :k].copy()
    if columns:
        kept[:, places] = 0
        np.testing.assert_array_equal(device.read(apart, (m, 16), np.float16),
                                      x[:, places].astype(np.float16))  # fmt: skip
    raw = device.read(codes, (m, ldx * bits // 8), np.int8)
    if bits == 4:
        raw = np.stack([raw << 4 >> 4, raw >> 4], axis=-1).reshape(m, ldx)
    got = device.read(scales, (m,), np.float32)
    assert got[2] == 0
    assert np.isnan(got[3])
    np.testing.assert_allclose(got[:2], np.abs(kept[:2]).max(axis=1) / top, rtol=1e-6)
    assert not raw[:3, k:].any()
    error = np.abs(raw[:3, :k] * got[:3, None] - kept[:3])
    assert (error <= 0.5001 * got[:3, None]).all()


def test_argmax() -> None:
    logits = normal(6, 1000)
    logits[1, [700, 400]] = 9  # the lower of two
    logits[2, ::2] = np.nan
    logits[3] = np.nan
    logits[4] = -np.inf
    logits[5, 999] = np.inf
    device = make_device(Schedule("random"))
    kernel = device.load("argmax", ops.render_argmax())["argmax"]
    out = device.allocate(24)
    device.launch(kernel, (6,), (ops.ARGMAX_THREADS,),
                  [out, device.upload(logits), np.int64(1000), i32(1000)])  # fmt: skip
    want = [int(np.argmax(logits[0])), 400, int(np.nanargmax(logits[2])), -1, -1, 999]
    assert device.read(out, (6,), np.int32).tolist() == want


def drawn(logits: Array, temperature: float, top_k: int, top_p: float, min_p: float,
          random: float) -> int:  # fmt: skip
    """What runtime/src/sampler.cpp draws, in float64."""
    ids = [i for i in np.lexsort((np.arange(logits.size), -logits)) if not np.isnan(logits[i])]
    if top_k:
        ids = ids[:top_k]
    weights = np.exp((logits[ids].astype(np.float64) - logits[ids[0]]) / temperature)
    if top_p < 1:
        count = int(np.searchsorted(np.cumsum(weights), top_p * weights.sum())) + 1
        ids, weights = ids[:count], weights[:count]
    kept = sorted((i, w) for i, w in zip(ids, weights, strict=True) if w >= min_p)
    sums = np.cumsum([w for _, w in kept])
    return int(kept[int(np.searchsorted(sums, random * sums[-1], side="right"))][0])


CHOICES = [(1.0, 0, 1.0, 0.0), (0.7, 40, 1.0, 0.0), (1.3, 0, 0.9, 0.0), (0.8, 20, 0.8, 0.05),
           (2.0, 3, 0.5, 0.0), (0.5, 0, 1.0, 0.2), (1.0, 1, 1.0, 0.0)]  # fmt: skip


@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_choice_of_the_next_token(case: tuple[float, int, float, float]) -> None:
    """As the host draws, with equal logits, NaN and infinities among them."""
    temperature, top_k, top_p, min_p = case
    rng = np.random.default_rng(int(100 * temperature))
    device = make_device(Schedule("random"))
    kernel = device.load("choose", ops.render_choose())["choose"]
    for n in (7, 1000):
        logits = np.round(3 * rng.standard_normal(n), 1).astype(np.float32)  # many are equal
        logits[2], logits[4] = np.nan, -np.inf
        token, at = device.allocate(4), device.upload(logits)
        for random in (0.0, 0.31, 0.777, 1 - 2.0**-53):
            how = np.zeros(1, [("scale", "f4"), ("top_k", "i4"), ("top_p", "u8"), ("least", "u8"),
                               ("random", "u8")])  # fmt: skip
            how["scale"] = np.log2(np.e) / temperature
            how["top_k"] = top_k
            how["top_p"] = int(top_p * 2**64) if top_p < 1 else 0
            how["least"] = int(np.ceil(min_p * 2**40))
            how["random"] = int(random * 2**53) << 11
            assert how.nbytes == ops.SAMPLING_BYTES
            device.launch(kernel, (1,), (ops.CHOOSE_THREADS,),
                          [token, at, device.upload(how.view(np.uint8)), i32(n)])  # fmt: skip
            got = int(device.read(token, (1,), np.int32)[0])
            assert got == drawn(logits, temperature, top_k, top_p, min_p, random)


def test_greedy_choice_and_logits_that_give_none() -> None:
    device = make_device()
    kernel = device.load("choose", ops.render_choose())["choose"]
    token, how = device.allocate(4), device.upload(np.zeros(ops.SAMPLING_BYTES, np.uint8))
    for row, want in (([1, 3, np.nan, 3], 1), ([np.nan] * 4, -1), ([-np.inf] * 4, -1),
                      ([1, np.inf, 0, 0], -1)):  # fmt: skip
        at = device.upload(np.array(row, np.float32))
        device.launch(kernel, (1,), (ops.CHOOSE_THREADS,), [token, at, how, i32(4)])
        assert int(device.read(token, (1,), np.int32)[0]) == want
