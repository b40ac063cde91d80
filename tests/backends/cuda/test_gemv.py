"""GEMV of every kind of format, run in the emulator, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from qigen.backends.cuda.device import make_device
from qigen.backends.cuda.emulator import Schedule
from qigen.backends.cuda.gemv import LAYOUT, GemvSpec, render_gemv, supports
from qigen.errors import Unsupported
from qigen.formats import CATALOG, QuantizedTensor, by_name, packed_shape

FAST = [("q4_0", 1), ("q5_1", 1), ("q6_k", 1), ("iq4_xs", 1), ("tq1_0", 1), ("mxfp4", 7),
        ("u3g32", 1), ("s8g64", 8), ("bf16", 2), ("f16", 1), ("f32", 1), ("q4_k", 1)]  # fmt: skip


def random_weight(name: str, n: int, k: int) -> QuantizedTensor:
    """Codes and scales at random, scales of a sensible size."""
    fmt, rng = by_name(name), np.random.default_rng(3)
    nblocks, fields = -(-k // fmt.block), {}
    for field in fmt.fields:
        shape = (n, nblocks, field.count)
        if fmt.float_kind or field.name in ("d", "dmin", "m"):
            values = rng.uniform(0.01, 0.1, shape).astype(np.float32)
            if fmt.float_kind == "bf16":
                fields[field.name] = (values.view(np.uint32) >> 16).astype(np.uint16)
            else:
                kind = np.float16 if field.bits == 16 else np.float32
                fields[field.name] = values.astype(kind).view(field.dtype)
        elif field.name == "e":
            fields[field.name] = rng.integers(118, 130, shape).astype(field.dtype)
        else:
            fields[field.name] = rng.integers(0, 1 << field.bits, shape).astype(field.dtype)
    return QuantizedTensor(fmt, (n, k), fields)


def check(name: str, m: int, n: int, policy: str, tail: int = 0) -> None:
    block = by_name(name).block
    spec = GemvSpec(by_name(name), m, tail=tail > 0)
    k = -(-max(2 * block, 96) // block) * block - tail
    weight = random_weight(name, n, k)
    packed = weight.pack(LAYOUT)
    stride = -(-k // 4) * 4
    x = np.random.default_rng(4).standard_normal((m, stride)).astype(np.float32)
    device = make_device(Schedule(policy))
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
    bound = np.abs(x).astype(np.float64) @ np.abs(dense).T
    # float32 sums of scaled parts: the magnitudes before a minimum is taken off bound the error
    assert (np.abs(got - want) <= 4e-6 * (bound + np.abs(want).max())).all()
    if device.emulated and spec.m == 1 and n % 16 == 0 and not spec.format.float_kind:
        assert device.traffic(w)[0] >= packed.nbytes


@pytest.mark.parametrize(("name", "m"), FAST)
def test_gemv(name: str, m: int) -> None:
    check(name, m, 37, "fair")


@pytest.mark.parametrize(("name", "tail"), [("u4g32", 5), ("s8g64", 61), ("f16", 1)])
def test_k_that_ends_inside_of_a_block(name: str, tail: int) -> None:
    check(name, 2, 20, "fair", tail)


@pytest.mark.parametrize("policy", ["random", "priority"])
def test_gemv_under_other_schedules(policy: str) -> None:
    check("q4_0", 1, 80, policy)


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 7, 8])
@pytest.mark.parametrize("name", [name for name, row in CATALOG.items() if supports(row)])
def test_gemv_of_every_row(name: str, m: int) -> None:
    check(name, m, 37, "random")


def test_other_batches_are_refused() -> None:
    with pytest.raises(Unsupported, match="1 to 8 rows"):
        render_gemv(GemvSpec(by_name("q4_0"), 9))


def test_what_the_template_cannot_decode_is_refused() -> None:
    refused = [row for row in CATALOG.values() if not supports(row)]
    assert {"nf4g64", "z4g128"} <= {row.name for row in refused}
    for row in refused:
        with pytest.raises(Unsupported, match="no GPU kernel"):
            render_gemv(GemvSpec(row))
