"""GEMV of every kind of format, run in the emulator, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from qigen.backends.cuda.device import make_device
from qigen.backends.cuda.emulator import Schedule
from qigen.backends.cuda.gemv import LAYOUT, GemvSpec, render_gemv, supports
from qigen.errors import Unsupported
from qigen.formats import CATALOG, by_name, packed_shape
from tests.backends.cpu.test_matmul import random_tensor

FAST = [("q4_0", 1), ("q5_1", 1), ("q6_k", 1), ("iq4_xs", 1), ("tq1_0", 1), ("mxfp4", 7),
        ("u3g32", 1), ("s8g64", 8), ("bf16", 2), ("f16", 1), ("f32", 1), ("q4_k", 1),
        ("z4g64", 2), ("h3g64", 1), ("u5gchannel", 1), ("nf4g64_f32", 1), ("lut4_tensor_g64", 1),
        ("lut3_channel", 2), ("lut2_group_g64", 1), ("fp6_e3m2", 1), ("fp8_e4m3g128_f32", 1),
        ("nvfp4", 1), ("w4a8", 1), ("bipolar3", 1), ("ternary5", 1), ("aqlm_2x8", 2),
        ("s4g128_2of4", 2), ("s4g128_2of8", 1), ("s4g128_16of32b", 1), ("spqr3", 1),
        ("s4gchannel_c32", 2)]  # fmt: skip


def check(name: str, m: int, n: int, policy: str, tail: int = 0, seed: int = 1) -> None:
    block = by_name(name).block
    spec = GemvSpec(by_name(name), m, tail=tail > 0)
    k = -(-max(2 * block, 96) // block) * block - tail
    weight = random_tensor(spec.format, n, k)
    packed = weight.pack(LAYOUT)
    stride = -(-k // 4) * 4
    x = np.random.default_rng(4).standard_normal((m, stride)).astype(np.float32)
    device = make_device(Schedule(policy, seed))
    kernel = device.load(spec.name, render_gemv(spec))[spec.name]
    y, w = device.allocate(4 * m * n), device.upload(packed)
    kblocks = packed_shape(spec.format, (n, k), LAYOUT)[1]
    n_, k_, kblocks_ = (np.int32(v) for v in (n, k, kblocks))
    arguments = [y, n_, device.upload(x), np.int32(stride), w, n_, k_, kblocks_]
    x = x[:, :k]
    device.launch(kernel, spec.grid(n), spec.block, arguments)
    got = device.read(y, (m, n), np.float32)
    dense = weight.dequantize().astype(np.float64)
    want = x.astype(np.float64) @ dense.T
    # float32 sums of scaled parts: what cancels where a zero point, a minimum or what is kept apart
    # is taken off is as large as the greatest weights of a row
    bound = np.abs(x).astype(np.float64) @ np.abs(dense).T
    bound += np.abs(x).sum(1)[:, None] * np.abs(dense).max(1)
    assert (np.abs(got - want) <= 4e-6 * bound).all()
    read_all = not (spec.format.float_kind or spec.format.vector)
    if device.emulated and spec.m == 1 and n % 16 == 0 and read_all:
        assert device.traffic(w)[0] >= packed.nbytes


@pytest.mark.parametrize(("name", "m"), FAST)
def test_gemv(name: str, m: int) -> None:
    check(name, m, 37, "fair")


TAILS = [("u4g32", 5), ("s8g64", 61), ("f16", 1), ("aqlm_2x8", 9), ("s4g128_2of4_o3", 30)]


@pytest.mark.parametrize(("name", "tail"), TAILS)
def test_k_that_ends_inside_of_a_block(name: str, tail: int) -> None:
    check(name, 2, 20, "fair", tail)


@pytest.mark.parametrize("policy", ["random", "priority"])
def test_gemv_under_other_schedules(policy: str) -> None:
    check("q4_0", 1, 80, policy)


@pytest.mark.parametrize("name", ["q4_0", "nf4g64", "f16", "s4g128_2of4"])
def test_nan_passes_through_and_is_not_invented(name: str) -> None:
    """Of a weight into its column of y, of x into its row."""
    spec = GemvSpec(by_name(name), 2)
    n, k = 20, 2 * max(by_name(name).block, 64)
    weight = random_tensor(spec.format, n, k)
    field = "d" if spec.format.has("d") else "codes"
    weight.fields[field].view(np.float16)[5] = np.nan
    x = np.random.default_rng(4).standard_normal((2, k)).astype(np.float32)
    x[1] = np.nan  # a mask reads some columns only
    device = make_device(Schedule("random"))
    kernel = device.load(spec.name, render_gemv(spec))[spec.name]
    y, kblocks = device.allocate(8 * n), packed_shape(spec.format, (n, k), LAYOUT)[1]
    device.launch(kernel, spec.grid(n), spec.block, [
        y, np.int32(n), device.upload(x), np.int32(k), device.upload(weight.pack(LAYOUT)),
        *(np.int32(v) for v in (n, k, kblocks))])  # fmt: skip
    got = device.read(y, (2, n), np.float32)
    assert np.isnan(got[1]).all()
    assert np.isnan(got[0]).tolist() == [i == 5 for i in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 7, 8])
@pytest.mark.parametrize("name", [name for name, row in CATALOG.items() if supports(row)])
def test_gemv_of_every_row(name: str, m: int) -> None:
    """Each row x {one column, many, an odd number} x {fair, two seeds of priority}: blocks share
    nothing, so that every order meets some size."""
    for n, policy, seed in ((1, "priority", 1), (37, "fair", 1), (61, "priority", 2)):
        check(name, m, n, policy, seed=seed)


def test_other_batches_are_refused() -> None:
    with pytest.raises(Unsupported, match="1 to 8 rows"):
        render_gemv(GemvSpec(by_name("q4_0"), 9))
    assert not supports(by_name("s4g128_lr16"))
    with pytest.raises(Unsupported, match="take a mask such as _2of8"):
        render_gemv(GemvSpec(by_name("s4g128_2of8v64")))
    with pytest.raises(Unsupported, match=r"qmoe12_512x36: words of a dictionary .* ternary5"):
        render_gemv(GemvSpec(by_name("qmoe12_512x36")))
    with pytest.raises(Unsupported, match="take the row without _lr"):
        render_gemv(GemvSpec(by_name("s4g128_lr16")))
