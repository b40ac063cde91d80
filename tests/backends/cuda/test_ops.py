"""Kernels beside the products, run in the emulator, against numpy in float64."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qigen.backends.cuda import ops, toolchain
from qigen.backends.cuda.device import make_device
from qigen.backends.cuda.emulator import Schedule, driver_library
from qigen.backends.cuda.gemv import LAYOUT, EmbeddingSpec, GemvSpec, render_embedding, render_gemv
from qigen.backends.cuda.ops import AttentionSpec, KvSpec, NormSpec, RopeSpec
from qigen.errors import MachineMismatch, ToolchainError, Unsupported, UsageError
from qigen.formats import by_name, packed_shape
from qigen.ir.ops.elementwise import activate
from qigen.ir.ops.rope import rotate
from tests.backends.cpu.test_matmul import random_tensor

Array = npt.NDArray[Any]
CAPACITY = 320  # positions of a cache


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def i32(x: int) -> np.int32:
    return np.int32(x)


def test_the_same_through_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """QIGEN_EXEC=cuda runs these tests on the driver's device; here the emulator is the driver."""
    if os.environ.get("QIGEN_EXEC", "emulator") != "cuda":
        monkeypatch.setenv("QIGEN_CUDA_DRIVER", str(driver_library()))
    monkeypatch.setenv("QIGEN_EXEC", "cuda")
    test_argmax()
    test_norm("rms", True, 64)
    test_tiled_attention("f16", 4, 2, 8, 0, 0.0)
    with pytest.raises(ToolchainError, match=r"cuModuleGetFunction|cuModuleLoadData|invalid"):
        make_device().load_ptx(".visible .entry nothing(")
    monkeypatch.setenv("QIGEN_CUDA_DRIVER", "/nowhere/libcuda.so")
    with pytest.raises(MachineMismatch, match="no CUDA driver here"):
        make_device()
    monkeypatch.setenv("QIGEN_EXEC", "gpu")
    with pytest.raises(UsageError, match="emulator or cuda"):
        make_device()


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


# -- attention ------------------------------------------------------------------------------------


class Cache:
    """A session's cache on the device, with ``before`` bytes a position of another layer."""

    def __init__(self, device: Any, spec: KvSpec, before: int = 48) -> None:
        self.device, self.spec, self.before = device, spec, before
        size = CAPACITY * (before + spec.position_bytes)
        self.base = device.allocate(size)
        device.write(self.base, np.zeros(size, np.uint8))

    def rows(self) -> tuple[Array, Array]:
        """float64 [positions, kv_heads, head_dim]: keys and values as they were rounded."""
        s = self.spec
        data = self.device.read(
            self.base + CAPACITY * self.before, (CAPACITY * s.position_bytes,), np.uint8
        )
        split = 2 * s.kv_heads * CAPACITY * s.row_bytes
        rows = data[:split].reshape(s.kv_heads, 2, CAPACITY, s.row_bytes)
        scales = data[split:].reshape(s.kv_heads, 2, CAPACITY, s.scale_bytes)
        if s.kind == "f16":
            numbers = rows.view(np.float16).astype(np.float64)
        elif s.kind == "int8":
            numbers = rows.view(np.int8).astype(np.float64) * scales.view(np.float32)
        else:
            codes = np.stack([rows & 15, rows >> 4], axis=-1).reshape(*rows.shape[:3], -1)
            step, minimum = np.split(scales.view(np.float16).astype(np.float64), 2, axis=-1)
            numbers = codes * step + minimum
        numbers = numbers[..., : s.head_dim].transpose(1, 2, 0, 3)
        return numbers[0], numbers[1]


def caches_of(device: Any, caches: list[Cache]) -> int:
    return device.upload(np.array([[c.base, CAPACITY] for c in caches], np.int64))


ROPES = [("f16", 4, 2, 8, 8, True, False), ("int8", 3, 1, 20, 16, False, False),
         ("int4", 2, 2, 64, 64, False, True), ("f16", 2, 1, 80, 0, False, False)]  # fmt: skip


@pytest.mark.parametrize(("kind", "heads", "kv_heads", "hd", "rot", "interleaved", "norm"), ROPES)
def test_rope_writes_the_cache(
    kind: str, heads: int, kv_heads: int, hd: int, rot: int, interleaved: bool, norm: bool
) -> None:
    spec = RopeSpec(KvSpec(kind, kv_heads, hd), heads, rot, interleaved, norm)
    device = make_device(Schedule("random"))
    kernel = device.load(spec.name, ops.render_rope(spec))[spec.name]
    q, k, v = normal(3, heads * hd), normal(3, kv_heads * hd, seed=2), normal(3, kv_heads * hd)
    weights = normal(2, hd, seed=7)
    caches = [Cache(device, spec.cache), Cache(device, spec.cache)]
    positions = np.array([5, 63, -1], np.int32)
    frequency = 10000.0 ** (-2.0 * np.arange(rot // 2) / max(rot, 1))
    angle = np.arange(CAPACITY)[:, None] * frequency
    table = np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
    q_at = device.upload(q)
    norms = device.upload(weights)
    device.launch(kernel, spec.grid(3), spec.block, [
        q_at, i32(heads * hd), device.upload(k), i32(kv_heads * hd), device.upload(v),
        i32(kv_heads * hd), device.upload(positions), caches_of(device, [*caches, caches[0]]),
        np.int64(48), *([device.upload(table)] if rot else []),
        *([norms, norms + 4 * hd, np.float32(1e-6)] if norm else [])])  # fmt: skip
    attrs = {"rotary_dim": rot, "head_dim": hd, "base": 10000.0, "position_scale": 1.0,
             "attn_factor": 1.0, "style": "interleaved" if interleaved else "half"}  # fmt: skip

    def turned(x: Array, weight: Array) -> Array:
        rows = x.astype(np.float64).reshape(3, -1, hd)
        if norm:
            rows = rows / np.sqrt((rows**2).mean(axis=-1, keepdims=True) + 1e-6) * weight
        return rotate(rows.reshape(3, -1), positions, attrs, None) if rot else rows.reshape(3, -1)

    got = device.read(q_at, q.shape, np.float32)
    np.testing.assert_allclose(got[:2], turned(q, weights[0])[:2], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[2], q[2])
    tolerance = {"f16": 1 / 1024, "int8": 1 / 200, "int4": 1 / 10}[kind]
    for cache, t, position in zip(caches, (0, 1), (5, 63), strict=True):
        keys, values = cache.rows()
        for have, want in ((keys, turned(k, weights[1])), (values, v)):
            want_heads = want[t].reshape(kv_heads, hd)
            bound = tolerance * np.abs(want_heads).max(axis=1, keepdims=True)
            assert (np.abs(have[position] - want_heads) <= bound).all()
            assert not np.delete(have, position, axis=0).any()


def attended(q: Array, keys: Array, values: Array, position: int, scale: float, window: int,
             cap: float, group: int) -> Array:  # fmt: skip
    """float64 [heads, head_dim] of one token."""
    first = max(0, position - window + 1) if window else 0
    k = keys[first : position + 1].repeat(group, axis=1)
    v = values[first : position + 1].repeat(group, axis=1)
    scores = np.einsum("hd,jhd->hj", q.astype(np.float64), k) * scale
    if cap:
        scores = cap * np.tanh(scores / cap)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hj,jhd->hd", weights / weights.sum(axis=1, keepdims=True), v)


def fill(device: Any, spec: KvSpec, heads: int, count: int, seed: int) -> Cache:
    """A cache with ``count`` random positions, written by the kernel that does so in a model."""
    rope = RopeSpec(spec, heads, 0, False, False)
    kernel = device.load(rope.name, ops.render_rope(rope))[rope.name]
    cache = Cache(device, spec)
    width = spec.kv_heads * spec.head_dim
    q, k, v = (device.upload(normal(count, n, seed=seed + i)) for i, n in
               enumerate((heads * spec.head_dim, width, width)))  # fmt: skip
    device.launch(kernel, rope.grid(count), rope.block, [
        q, i32(heads * spec.head_dim), k, i32(width), v, i32(width),
        device.upload(np.arange(count, dtype=np.int32)), caches_of(device, [cache] * count),
        np.int64(48)])  # fmt: skip
    return cache


CASES = [("f16", 4, 2, 8, 0, 0.0), ("f16", 9, 3, 64, 0, 0.0), ("int8", 2, 1, 20, 0, 5.0),
         ("int4", 2, 2, 48, 50, 0.0), ("f16", 4, 4, 80, 100, 0.0),
         ("f16", 2, 1, 256, 0, 0.0)]  # fmt: skip
POLICIES = itertools.cycle(("fair", "random", "priority"))


@pytest.mark.parametrize(("kind", "heads", "kv_heads", "hd", "window", "cap"), CASES)
def test_split_attention(
    kind: str, heads: int, kv_heads: int, hd: int, window: int, cap: float
) -> None:
    spec = AttentionSpec(KvSpec(kind, kv_heads, hd), heads, bool(cap))
    device = make_device(Schedule(next(POLICIES)))
    kernels = device.load(spec.name, ops.render_attention(spec))
    lengths = (1, 130, 260)
    caches = [fill(device, spec.cache, heads, n, n) for n in lengths]
    positions = np.array([*(n - 1 for n in lengths), -1], np.int32)
    q, scale, chunk, chunks = 2 * normal(4, heads * hd + 4), hd**-0.5, 128, 3
    partial = device.allocate(4 * spec.partial_floats(4, chunks))
    out, at, q_at = (device.upload(a) for a in (np.ones_like(q), positions, q))
    device.launch(kernels[f"{spec.name}_split"], spec.split_grid(4, chunks), (128,), [
        partial, q_at, i32(heads * hd + 4), at, caches_of(device, [*caches, caches[0]]),
        np.int64(48), np.float32(scale), i32(window), *([np.float32(cap)] if cap else []),
        i32(chunk), i32(chunks)])  # fmt: skip
    device.launch(kernels[f"{spec.name}_combine"], spec.combine_grid(4), spec.combine_block, [
        out, i32(heads * hd + 4), partial, at, i32(window), i32(chunk), i32(chunks)])  # fmt: skip
    got = device.read(out, q.shape, np.float32)
    for t, cache in enumerate(caches):
        rows = q[t, : heads * hd].reshape(heads, hd)
        want = attended(rows, *cache.rows(), lengths[t] - 1, scale, window, cap, spec.group)
        np.testing.assert_allclose(got[t, : heads * hd], want.reshape(-1), rtol=1e-5, atol=1e-5)
    assert not got[3, : heads * hd].any()
    assert (got[:, heads * hd :] == 1).all()


@pytest.mark.parametrize(("kind", "heads", "kv_heads", "hd", "window", "cap"), CASES)
def test_tiled_attention(
    kind: str, heads: int, kv_heads: int, hd: int, window: int, cap: float
) -> None:
    spec = AttentionSpec(KvSpec(kind, kv_heads, hd), heads, bool(cap))
    device = make_device(Schedule(next(POLICIES)))
    kernel = device.load(spec.name, ops.render_attention(spec))[f"{spec.name}_tiled"]
    first, tokens = 124, 11
    cache = fill(device, spec.cache, heads, first + 9, 3)
    positions = np.array([*range(first, first + 9), -1, -1], np.int32)
    q, scale = 2 * normal(tokens, heads * hd), hd**-0.5
    out = device.upload(np.ones_like(q))
    device.launch(kernel, spec.tiled_grid(tokens), (128,), [
        out, i32(heads * hd), device.upload(q), i32(heads * hd), device.upload(positions),
        caches_of(device, [cache] * tokens), np.int64(48), np.float32(scale), i32(window),
        *([np.float32(cap)] if cap else []), i32(tokens)])  # fmt: skip
    got = device.read(out, q.shape, np.float32)
    keys, values = cache.rows()
    for t in range(9):
        rows = q[t].reshape(heads, hd)
        want = attended(rows, keys, values, first + t, scale, window, cap, spec.group)
        np.testing.assert_allclose(got[t], want.reshape(-1), rtol=1e-5, atol=1e-5)
    assert not got[9:].any()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_machine_code_of_attention(head_dim: int) -> None:
    """It can be made (static shared memory is bounded), without spills."""
    spec = AttentionSpec(KvSpec("f16", 2, head_dim), 8, False)
    cubin = toolchain.compile_cubin(spec.name, ops.render_attention(spec), "sm_90")
    resources = toolchain.read_resources(cubin)
    assert len(resources) == 3
    for kernel in resources.values():
        assert kernel.local == kernel.stack == 0
        assert kernel.registers <= 128
        assert kernel.shared <= 48 << 10


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(Unsupported, match="at most 256"):
        KvSpec("f16", 1, 512)
    with pytest.raises(UsageError, match="choose one of f16, int8, int4"):
        KvSpec("f8", 1, 64)
