"""Rotation, the KV cache and attention, run in the emulator, against numpy in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qigen.backends.cuda import ops, toolchain
from qigen.backends.cuda.device import make_device
from qigen.backends.cuda.emulator import Schedule
from qigen.backends.cuda.ops import KV_KINDS, AttentionSpec, KvSpec, RopeSpec
from qigen.errors import Unsupported, UsageError
from qigen.ir.ops.rope import rotate
from tests.backends.cuda.test_ops import i32, normal

Array = npt.NDArray[Any]
CAPACITY = 320  # positions of a cache


class Cache:
    """A session's cache on the device, with ``before`` bytes a position of another layer."""

    def __init__(
        self, device: Any, spec: KvSpec, capacity: int = CAPACITY, before: int = 48
    ) -> None:
        self.device, self.spec, self.capacity, self.before = device, spec, capacity, before
        size = capacity * (before + spec.position_bytes)
        self.base = device.allocate(size)
        device.write(self.base, np.zeros(size, np.uint8))

    def rows(self) -> tuple[Array, Array]:
        """float64 [positions, kv_heads, head_dim]: keys and values as they were rounded."""
        s, n = self.spec, self.capacity
        data = self.device.read(
            self.base + n * self.before, (n * s.position_bytes,), np.uint8
        )
        split = 2 * s.kv_heads * n * s.row_bytes
        rows = data[:split].reshape(s.kv_heads, 2, n, s.row_bytes)
        scales = data[split:].reshape(s.kv_heads, 2, n, s.scale_bytes)
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
    return device.upload(np.array([[c.base, c.capacity] for c in caches], np.int64))


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


def fill(device: Any, spec: KvSpec, heads: int, count: int, seed: int, nan: int = -1,
         capacity: int = CAPACITY) -> Cache:
    """A cache with ``count`` random positions, written by the kernel that does so in a model; the
    values of position ``nan`` and the keys of the next are no numbers."""
    rope = RopeSpec(spec, heads, 0, False, False)
    kernel = device.load(rope.name, ops.render_rope(rope))[rope.name]
    cache = Cache(device, spec, capacity)
    width = spec.kv_heads * spec.head_dim
    arrays = [normal(count, n, seed=seed + i)
              for i, n in enumerate((heads * spec.head_dim, width, width))]
    if nan >= 0:
        arrays[1][nan + 1] = arrays[2][nan] = np.nan
    q, k, v = map(device.upload, arrays)
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


class Prompt:
    """Tokens of one session behind others in the cache, with padding, and what they should give."""

    def __init__(self, spec: AttentionSpec, window: int, cap: float, first: int = 124,
                 count: int = 9, padding: int = 2, nan: int = -1,
                 capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.spec, self.window, self.cap, self.first, self.count = spec, window, cap, first, count
        self.tokens, self.nan = count + padding, nan
        c = spec.cache
        self.scale = c.head_dim**-0.5
        self.q = 2 * normal(self.tokens, spec.heads * c.head_dim)
        self.positions = np.array([*range(first, first + count), *[-1] * padding], np.int32)

    def run(self, device: Any, kernel: Any, mma: bool) -> Array:
        """float32 [tokens, heads * head_dim]."""
        spec, width = self.spec, self.q.shape[1]
        self.cache = fill(device, spec.cache, spec.heads, self.first + self.count, 3, self.nan,
                          self.capacity)
        out = device.upload(np.ones_like(self.q))
        arguments = [
            out, i32(width), device.upload(self.q), i32(width), device.upload(self.positions),
            caches_of(device, [self.cache] * self.tokens), np.int64(48), np.float32(self.scale),
            i32(self.window), *([np.float32(self.cap)] if self.cap else []),
            i32(self.tokens)]  # fmt: skip
        grid = spec.mma_grid(self.tokens) if mma else spec.tiled_grid(self.tokens)
        device.launch(kernel, grid, (128,), arguments, spec.mma_shared if mma else 0)
        return device.read(out, self.q.shape, np.float32)

    def check(self, got: Array, halves: bool) -> None:
        """Against float64; ``halves``: queries, keys, values and weights are rounded to 11 bits."""
        keys, values = self.cache.rows()
        spec, eps = self.spec, 2.0**-11
        for t in range(self.count):
            rows, position = self.q[t].reshape(spec.heads, -1), self.first + t
            if 0 <= self.nan <= position:
                assert np.isnan(got[t]).all()
                continue
            want = attended(rows, keys, values, position, self.scale, self.window, self.cap,
                            spec.group)  # fmt: skip
            tolerance = 1e-5 + 1e-5 * np.abs(want)
            if halves:
                seen = np.abs(keys[: position + 1]).repeat(spec.group, axis=1)
                score = np.einsum("hd,jhd->hj", np.abs(rows), seen).max(axis=1) * self.scale
                score *= 2 if spec.cache.kind == "f16" else 4  # on both sides of the fraction
                most = np.abs(values[: position + 1]).max(axis=(0, 2)).repeat(spec.group)
                tolerance = tolerance + (eps * (score + 3) * most)[:, None]
            error = np.abs(got[t].reshape(spec.heads, -1) - want)
            assert (error <= tolerance).all(), float((error / tolerance).max())
        assert not got[self.count :].any()


@pytest.mark.parametrize(("kind", "heads", "kv_heads", "hd", "window", "cap"), CASES)
def test_tiled_attention(
    kind: str, heads: int, kv_heads: int, hd: int, window: int, cap: float
) -> None:
    spec = AttentionSpec(KvSpec(kind, kv_heads, hd), heads, bool(cap))
    device = make_device(Schedule(next(POLICIES)))
    kernel = device.load(spec.name, ops.render_attention(spec))[f"{spec.name}_tiled"]
    prompt = Prompt(spec, window, cap)
    prompt.check(prompt.run(device, kernel, mma=False), halves=False)


def mma_kernel(device: Any, spec: AttentionSpec) -> Any:
    return device.load(spec.mma_name, ops.render_attention_mma(spec))[spec.mma_name]


# group of heads, odd head sizes, windows, caps, every kind of cache
MMA_CASES = [("f16", 4, 2, 8, 0, 0.0), ("f16", 3, 1, 64, 0, 0.0), ("int8", 2, 1, 20, 0, 5.0),
             ("int4", 2, 2, 48, 50, 0.0), ("f16", 2, 2, 80, 100, 0.0), ("int8", 4, 1, 64, 30, 0.0),
             ("int4", 1, 1, 256, 0, 0.0), ("f16", 1, 1, 256, 0, 3.0)]  # fmt: skip


@pytest.mark.parametrize(("kind", "heads", "kv_heads", "hd", "window", "cap"), MMA_CASES)
def test_attention_on_tensor_cores(
    kind: str, heads: int, kv_heads: int, hd: int, window: int, cap: float
) -> None:
    """More tokens than a block takes, behind others, of which some are padding."""
    spec = AttentionSpec(KvSpec(kind, kv_heads, hd), heads, bool(cap))
    device = make_device(Schedule(next(POLICIES)))
    prompt = Prompt(spec, window, cap, first=70, count=spec.mma_tokens + 5, padding=3)
    prompt.check(prompt.run(device, mma_kernel(device, spec), mma=True), halves=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("hd", [16, 40, 64, 96, 128, 256])
def test_attention_on_tensor_cores_of_any_length(kind: str, hd: int) -> None:
    """{first token of all, one, tails of 7, 16, 17 and 64} x {fair, two seeds of priority}."""
    spec = AttentionSpec(KvSpec(kind, 1, hd), 2, False)
    for first, count in ((0, 1), (0, 7), (130, 16), (61, 17), (200, 64)):
        for policy, seed in (("fair", 1), ("priority", 1), ("priority", 2)):
            device = make_device(Schedule(policy, seed, quantum=24))
            prompt = Prompt(spec, 0, 0.0, first, count, padding=1)
            prompt.check(prompt.run(device, mma_kernel(device, spec), mma=True), halves=True)


@pytest.mark.parametrize(("kind", "mma"), [("f16", True), ("int8", True), ("int4", False)])
def test_no_number_reaches_tokens_that_do_not_see_it(kind: str, mma: bool) -> None:
    """A token whose values are NaN, or keys: those before it are as without it, it and those behind
    it are NaN."""
    spec = AttentionSpec(KvSpec(kind, 1, 24), 2, False)
    device = make_device()
    tiled = device.load(spec.name, ops.render_attention(spec))[f"{spec.name}_tiled"]
    kernel = mma_kernel(device, spec) if mma else tiled
    prompt = Prompt(spec, 0, 0.0, first=40, count=12, nan=46)
    prompt.check(prompt.run(device, kernel, mma), halves=mma)


@pytest.mark.parametrize("head_dim", [pytest.param(64, marks=pytest.mark.slow),
                                      pytest.param(128, marks=pytest.mark.slow), 256])
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
