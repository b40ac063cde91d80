"""The rounding of the KV cache, and what a query sees of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qigen.errors import UsageError
from qigen.formats.kv import BLOCK, KV_FORMATS, kv_format, padded, round_block, round_groups
from qigen.ir.graph import State
from qigen.ir.interpreter import KvCache


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4]), st.floats(-300, 300), st.floats(0, 30))
def test_numbers_move_by_half_a_step(seed: int, bits: int, offset: float, size: float) -> None:
    x = np.random.default_rng(seed).standard_normal((BLOCK, 3)) * size + offset
    x = x.astype(np.float16).astype(np.float32)
    got = round_groups(x, bits, 0)
    assert got.codes.max() <= 2**bits - 1
    scale = got.scale.astype(np.float32)
    # half a step, and what rounding the scale to 11 bits moves the greatest code by
    limit = scale * (0.5 + (2**bits - 1) * 2.0**-10) + 1e-6
    assert (np.abs(got.dequantize() - x) <= limit).all()
    again = round_groups(got.dequantize().astype(np.float16), bits, 0)
    assert np.abs(again.dequantize() - got.dequantize()).max() <= limit.max() / 4 + 1e-6


def test_equal_numbers_and_padding() -> None:
    row = KV_FORMATS["int2"]
    keys = np.full((BLOCK, 2, 24), -1.5, np.float16)
    values = np.ones((BLOCK, 2, 24), np.float16)
    values[:, 1] = 7
    k, v = round_block(keys, values, row)
    assert not k.codes.any() and (k.dequantize() == -1.5).all()
    assert v.codes.shape == (BLOCK, 2, padded(24) // row.group(24), row.group(24))
    assert not v.codes.any()  # zeros beyond the head do not widen the range


def test_what_a_query_sees_follows_from_its_position() -> None:
    row = KV_FORMATS["int4"]
    sealed = row.sealed(np.arange(400))
    assert not sealed[: row.window + BLOCK - 1].any() and sealed[row.window + BLOCK - 1] == 1
    newest = np.arange(400) + 1 - BLOCK * sealed
    assert (newest[200:] >= row.window).all() and (newest < row.window + BLOCK).all()
    state = State("kv", "kv", 2, 16)
    k, v = np.random.default_rng(0).standard_normal((2, 300, 32)).astype(np.float32)
    whole = KvCache(state, "int4", np.dtype(np.float32))
    whole.append(np.arange(300), k, v)
    parts = KvCache(state, "int4", np.dtype(np.float32))
    for i in range(300):
        parts.append(np.array([i]), k[i : i + 1], v[i : i + 1])
    for position in (126, 127, 128, 299):
        count = int(row.sealed(np.array(position)))
        for a, b in zip(whole.read(position + 1, count), parts.read(position + 1, count),
                        strict=True):  # fmt: skip
            assert np.array_equal(a, b)


def test_rewinding_keeps_what_is_rounded() -> None:
    state = State("kv", "kv", 1, 16)
    k, v = np.random.default_rng(0).standard_normal((2, 300, 16)).astype(np.float32)
    cache = KvCache(state, "int4", np.dtype(np.float32))
    cache.append(np.arange(300), k, v)
    rounded = cache.read(300, 3)[0][:100].copy()
    cache.append(np.array([100]), k[:1], v[:1])  # sealed(100) is 0: all of it is the window again
    keys = cache.read(101, 0)[0]
    assert np.array_equal(keys[:100], rounded.astype(np.float16))
    assert np.array_equal(keys[100, 0], k[0].astype(np.float16))


def test_names() -> None:
    with pytest.raises(UsageError, match="f16, int8, int4, int2"):
        kv_format("int3")
