"""Tensor-core GEMM of every kind of format, run in the emulator, against numpy in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qigen.backends.cuda.device import make_device
from qigen.backends.cuda.emulator import EmulatedDevice
from qigen.backends.cuda.emulator import Schedule as Turns
from qigen.backends.cuda.gemm import (
    GemmSpec,
    Schedule,
    check_schedule,
    decoding,
    render_gemm,
    supports,
    usual_schedule,
)
from qigen.backends.cuda.gemm_packing import pack_gemm
from qigen.backends.cuda.gemv import LAYOUT, HalvesSpec, render_halves
from qigen.backends.cuda.prefill import GemmForm, panel_spec
from qigen.costmodel import gpu
from qigen.errors import BadInput, Unsupported
from qigen.formats import CATALOG, QuantizedTensor, by_name, packed_shape
from tests.backends.cpu.test_matmul import random_tensor

Array = npt.NDArray[Any]


class Launch:
    """One GEMM on an emulated device, its inputs and what it should give."""

    def __init__(self, spec: GemmSpec, m: int, n: int, k: int, seed: int = 5) -> None:
        self.spec, self.shape = spec, (m, n, k)
        rng = np.random.default_rng(seed)
        self.weight = random_tensor(spec.format, n, k)
        if spec.format.minifloat is not None and spec.format.code_bits == 8:
            codes = self.weight.fields["codes"]  # weights have no NaN and no infinity
            codes[codes & 0x7C >= 0x7C] = 1
        dense = self.weight.dequantize().astype(np.float64)
        every = 128 // spec.decoding.x_bits
        self.ldx = -(-k // every) * every
        self.scales = np.ones(m, np.float32)
        if spec.activations == "s8":
            self.x: Array = rng.integers(-127, 128, (m, self.ldx)).astype(np.int8)
            self.scales = rng.uniform(0.01, 0.1, m).astype(np.float32)
        elif spec.activations == "s4":
            self._int4(m, k, rng)
        else:
            self.x = rng.standard_normal((m, self.ldx)).astype(np.float16)
        x = self.dense if spec.activations == "s4" else self.x[:, :k]
        x = x.astype(np.float64) * self.scales[:, None].astype(np.float64)
        self.want = x @ dense.T
        # what cancels where a zero point or minimum is taken off is as large as the codes
        self.bound = np.abs(x) @ np.abs(dense).T + np.abs(x).sum(1)[:, None] * np.abs(dense).max(1)

    def _int4(self, m: int, k: int, rng: np.random.Generator) -> None:
        """Codes of 4 bits, two a byte, and what x has in the columns apart, as halves."""
        codes = np.zeros((m, self.ldx), np.int8)
        codes[:, :k] = rng.integers(-7, 8, (m, k))
        self.scales = rng.uniform(0.01, 0.1, m).astype(np.float32)
        self.dense = codes[:, :k].astype(np.float64)
        self.apart = np.zeros((m, 0), np.float16)
        if self.spec.columns:
            places = self.weight.fields["qc"].reshape(-1).astype(np.int64)
            codes[:, places] = 0
            values = (4 * rng.standard_normal((m, k))).astype(np.float16)
            self.apart = np.ascontiguousarray(values[:, places])
            self.dense[:, places] = self.apart.astype(np.float64) / self.scales[:, None]
        self.x = (codes[:, ::2] & 15 | codes[:, 1::2] << 4).astype(np.uint8)

    def run(self, blocks: int = 0, turns: Turns | None = None, ptx: str = "",
            launches: int = 1) -> Array:
        spec, (m, n, k) = self.spec, self.shape
        device = self.device = make_device(turns or Turns()) if not ptx else EmulatedDevice(turns)
        loaded = (device.load_ptx(ptx) if ptx else device.load(spec.name, render_gemm(spec)))
        self.kernel = loaded[spec.name]
        grid = spec.grid(m, n, k, blocks)
        parts, counters = spec.workspace(m, n, grid[0])
        self.y = device.allocate(m * n * (2 if spec.out == "f16" else 4))
        self.w = device.upload(pack_gemm(spec, self.weight))
        self.parts, self.counters = device.allocate(parts), device.upload(
            np.zeros(counters, np.int32))
        self.px = device.upload(self.x)
        arguments: list[Any] = [self.y, self.px]
        if spec.decoding.integer:
            arguments.append(device.upload(self.scales))
        if spec.columns:
            arguments.append(device.upload(self.apart))
        arguments += [self.w, self.parts, self.counters]
        arguments += [np.int32(v) for v in (m, n, k, self.ldx, n)]
        for _ in range(launches):
            device.launch(self.kernel, grid, spec.block, arguments, spec.shared_bytes)
        assert not device.read(self.counters, (counters,), np.int32).any()
        return device.read(self.y, (m, n), np.float16 if spec.out == "f16" else np.float32)

    def check(self, got: Array, tolerance: float) -> None:
        error = np.abs(got.astype(np.float64) - self.want)
        assert (error <= tolerance * self.bound).all(), float((error / self.bound).max())


def tolerance(spec: GemmSpec) -> float:
    """Relative to sums of magnitudes: float32 sums; f16 values of float tables; f16 results."""
    fmt = spec.format
    halves = fmt.values is not None or spec.out == "f16" or spec.columns > 0
    return 6e-4 if halves else 4e-6


FAST: list[tuple[str, str, int]] = [
    ("s4g128", "f16", 16), ("z4g64", "f16", 7), ("q4_1", "f16", 1), ("s8g64", "f16", 17),
    ("u4gchannel", "f16", 1), ("nf4g64", "f16", 16), ("nf3g64", "f16", 1), ("nf2g64", "f16", 7),
    ("mxfp4", "f16", 1), ("nvfp4", "f16", 1), ("s8g128", "s8", 16), ("w4a8", "s8", 1),
    ("u4g32", "s8", 7), ("s8gchannel", "s8", 1), ("q5_1", "f16", 7), ("s6g128", "f16", 1),
    ("z7g64", "f16", 16), ("h5g64", "f16", 1), ("bipolar8", "f16", 1), ("fp6_e3m2", "f16", 7),
    ("fp5_e2m2", "f16", 1), ("mxfp6_e2m3", "f16", 1), ("fp8_e4m3_f32", "f16", 1),
    ("mxfp8_e5m2", "f16", 1), ("f16", "f16", 17), ("s4g128_2of4", "f16", 8),
    ("s4gchannel_c32", "s4", 17), ("s4g128", "s4", 7), ("s4gchannel", "s4", 1),
    ("s8g128_2of4", "f16", 1), ("s2g128_2of4", "f16", 17), ("nf4g64_2of4", "f16", 7),
    ("s4g128_2of4", "s8", 9), ("s8gchannel_2of4", "s8", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "activations", "m"), FAST)
def test_gemm(name: str, activations: str, m: int) -> None:
    row = by_name(name)
    spec = GemmSpec(row, activations, schedule=usual_schedule(row, activations))
    launch = Launch(spec, m, 130, 264 if row.ggml_type is None or row.float_kind else 288)
    launch.check(launch.run(), tolerance(spec))


SHAPES: list[tuple[str, str, Schedule, int, int, int]] = [
    ("s4g128", "f32", Schedule(3, 1, 2, 64, 3), 128, 64, 384),
    ("s4g128", "f16", Schedule(2, 2, 2, 64, 4), 17, 71, 205),
    ("z4g64", "f32", Schedule(1, 4, 1, 64, 2), 7, 1, 72),
    ("z8g128", "f32", Schedule(2, 1, 4, 16, 5), 40, 128, 130),
    ("u3g32", "f32", Schedule(2, 1, 1, 64, 3, 32), 17, 65, 320),
    ("iq4_nl", "f32", Schedule(3, 2, 1, 64, 2, 16), 65, 72, 256),
    ("nf4g64", "f32", Schedule(1, 1, 8, 32, 4, 1), 16, 64, 640),
    ("s4g16", "f32", Schedule(1, 1, 2, 64, 4), 1, 64, 208),
    ("s4gchannel", "f32", Schedule(4, 1, 2, 64, 3), 128, 64, 200),
    ("s4g256", "f32", Schedule(1, 2, 2, 32, 4), 16, 128, 512),
    ("s4g128_2of4", "f16", Schedule(4, 1, 2, 64, 3), 128, 70, 384),
    ("s4gchannel_2of4", "f32", Schedule(3, 2, 4, 32, 4), 23, 128, 200),
    ("s6g32", "f32", Schedule(2, 2, 1, 64, 2), 17, 65, 130),
    ("f16", "f32", Schedule(4, 1, 2, 32, 3), 64, 64, 136),
]  # fmt: skip


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: f"{c[0]}-m{c[3]}n{c[4]}k{c[5]}")
def test_shapes_and_schedules(case: tuple[str, str, Schedule, int, int, int]) -> None:
    name, out, schedule, m, n, k = case
    spec = GemmSpec(by_name(name), "f16", out, schedule)
    launch = Launch(spec, m, n, k)
    launch.check(launch.run(), tolerance(spec))


@pytest.mark.parametrize("name", ["s4g128", "nf4g64", "s4g128_2of4"])
def test_shared_tiles_are_added_in_the_order_of_k(name: str) -> None:
    """Any number of blocks in any order gives the same bits, launch after launch."""
    spec = GemmSpec(by_name(name), schedule=Schedule(1, 1, 2, 32, 3))
    launch = Launch(spec, 7, 128, 640)
    assert spec.grid(7, 128, 640, 99)[0] == 20
    for blocks in (5, 7, 20):
        results = []
        for policy, seed in (("fair", 1), ("priority", 2), ("priority", 3)):
            got = launch.run(blocks, Turns(policy, seed, quantum=32), launches=2)
            launch.check(got, tolerance(spec))
            results.append(got.view(np.uint32))
        assert all((r == results[0]).all() for r in results)


def test_weights_come_back_from_the_form_for_tensor_cores() -> None:
    """Its size is known before it is packed, and the codes are those that went in."""
    rows = [row for row in CATALOG.values() if supports(row)]
    assert len(rows) > 100
    forms = [GemmForm(row) for row in rows]
    forms += [GemmForm(by_name(name), "s4") for name in ("s4g128", "s4gchannel_c32")]
    for form in forms:
        row = form.format
        weight = random_tensor(row, 80, 2 * row.block)
        packed = form.pack(weight)
        assert packed.nbytes == form.nbytes((80, 2 * row.block))
        again = form.unpack(weight.shape, packed)
        for name, field in weight.fields.items():
            np.testing.assert_array_equal(again.fields[name], field, err_msg=f"{row.name} {name}")
    with pytest.raises(BadInput, match="pack it again"):
        form.unpack((81, 64), packed)


@pytest.mark.parametrize("name", ["q6_k", "aqlm_2x8", "spqr3", "lut3_channel", "s4g128_2of8",
                                  "tq1_0", "s4gchannel_c32", "bf16"])  # fmt: skip
def test_halves_of_rows_in_the_order_of_the_tensor_cores(name: str) -> None:
    """What formats without a kernel of their own are turned into: as the kernel of f16 weights
    takes it, for some rows at a time."""
    spec = HalvesSpec(by_name(name))
    n, k, first, rows = 90, 2 * max(spec.format.block, 40), 32, 64
    weight = random_tensor(spec.format, n, k)
    dense = np.zeros((rows, k), np.float32)
    dense[: n - first] = weight.dequantize()[first:]
    halves = by_name("f16")
    exact = QuantizedTensor(halves, (rows, k), {"codes": dense.astype(np.float16).view(np.uint16)[
        ..., None]})  # fmt: skip
    want = pack_gemm(panel_spec(), exact).view(np.float16)
    device = make_device(Turns("random"))
    kernel = device.load(spec.name, render_halves(spec))[spec.name]
    panel = device.allocate(want.nbytes)
    kblocks = packed_shape(spec.format, (n, k), LAYOUT)[1]
    device.launch(kernel, spec.grid(rows, k), spec.block, [
        panel, device.upload(weight.pack(LAYOUT)), *(np.int32(v) for v in (n, k, kblocks, first))
    ])  # fmt: skip
    got = device.read(panel, want.shape, np.float16)
    if spec.format.has("oc") or spec.format.has("qc"):  # rounded once more
        np.testing.assert_allclose(got, want, atol=2e-3 * float(np.abs(dense).max()))
        assert (got == want).mean() > 0.9
    else:
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("activations", ["f16", "s8"])
def test_nan_and_infinity_pass_through(activations: str) -> None:
    spec = GemmSpec(by_name("s4g128"), activations)
    launch = Launch(spec, 3, 64, 256)
    launch.weight.fields["d"].view(np.float16)[5] = np.nan
    if activations == "s8":
        launch.scales[1] = np.inf
    else:
        launch.x[1, 17] = np.nan
    got = launch.run()
    assert np.isnan(got[:, 5]).all()
    assert not np.isfinite(got[1]).any()
    rest = np.delete(np.delete(got, 5, 1), 1, 0)
    assert np.isfinite(rest).all()


CASES = [(name, a) for name, row in CATALOG.items() for a in ("f16", "s8", "s4")
         if supports(row, a)]  # fmt: skip


def test_every_row_has_a_schedule_for_any_number_of_tokens() -> None:
    for name, activations in CASES:
        for m_tiles in (1, 2, 3, 4):
            schedule = usual_schedule(by_name(name), activations, m_tiles)
            check_schedule(GemmSpec(by_name(name), activations, schedule=schedule))
            assert schedule.stages >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "activations"), CASES)
def test_gemm_of_every_row(name: str, activations: str) -> None:
    """Each row x {smallest, tail of K, M = 1, 7, 16, 17, 128, odd split} x {fair, two seeds of
    priority}."""
    row = by_name(name)
    for m, blocks, policy in ((0, 0, "fair"), (1, 3, "priority"), (7, 0, "fair"),
                              (16, 5, "priority"), (17, 0, "fair"), (128, 3, "fair")):
        smallest, m = not m, max(m, 1)
        usual = usual_schedule(row, activations, min(-(-m // 16), 4))
        spec = GemmSpec(row, activations, schedule=replace(usual, warps_n=1, stages=3))
        whole = row.block * (1 + 280 // row.block)
        k = 272 if row.ggml_type is None else whole
        launch = Launch(spec, m, 1 if smallest else 70, max(row.block, 8) if smallest else k)
        for seed in ((1, 2) if policy == "priority" else (1,)):
            launch.check(launch.run(blocks, Turns(policy, seed)), tolerance(spec))


def test_what_the_kernel_cannot_take_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"q6_k: .*no tensor-core kernel for f16"):
        render_gemm(GemmSpec(by_name("q6_k")))
    with pytest.raises(Unsupported, match="no tensor-core kernel for s8"):
        render_gemm(GemmSpec(by_name("nf4g64"), "s8"))
    with pytest.raises(Unsupported, match="no tensor-core kernel for s8"):
        render_gemm(GemmSpec(by_name("s4g16"), "s8"))
    for name in ("s4g32_2of4", "nf4g64_2of4"):
        with pytest.raises(Unsupported, match="no tensor-core kernel for s8"):
            render_gemm(GemmSpec(by_name(name), "s8"))
    with pytest.raises(Unsupported, match="no tensor-core kernel for s4"):
        render_gemm(GemmSpec(by_name("s4g32"), "s4"))
    with pytest.raises(Unsupported, match="bytes of shared memory"):
        render_gemm(GemmSpec(by_name("s8g64"), schedule=Schedule(3, 4, 2, 64, 6)))
    with pytest.raises(BadInput, match="the kernel takes s4g64"):
        pack_gemm(GemmSpec(by_name("s4g64")), random_tensor(by_name("s4g128"), 64, 128))
    with pytest.raises(Unsupported, match="at least 128"):
        render_gemm(GemmSpec(by_name("s8g64"), "s8", schedule=Schedule(1, 1, 1, 64)))
    refused = {name for name, row in CATALOG.items() if not supports(row)}
    assert {"q6_k", "tq1_0", "lut4_channel", "aqlm_2x8", "spqr3", "s4g128_2of8"} <= refused


@pytest.mark.parametrize("name", ["s4g128", "nf4g64", "nf3g64", "s6g128", "s4g128_2of4"])
@pytest.mark.parametrize("m", [1, 16])
def test_weights_are_read_once(name: str, m: int) -> None:
    """Bytes that the emulator counts are those of the formula of the cost model, which at 4096 x
    4096 are at most 1.03 times weights, activations and results."""
    row = by_name(name)
    spec = GemmSpec(row, out="f16", schedule=Schedule(-(-m // decoding(row).tile)))
    n, k = 256, 512
    for blocks in (0, 3):
        launch = Launch(spec, m, n, k)
        launch.run(blocks)
        device = launch.device
        packed = pack_gemm(spec, launch.weight).nbytes
        moved = gpu.bytes_moved(spec, m, n, k, blocks or spec.tiles(m, n))
        table = 2 * spec.table_entries and 2 * max(1 << spec.format.code_bits, 8)
        # all of the packed weight once; every block reads the table, which stays in level 2
        requests, distinct = device.traffic(launch.w)[0], device.traffic(launch.w, True)[0]
        assert distinct == -(-packed // 32) * 32 == moved.weights + -table % 32
        if not table:
            assert requests == packed
        assert device.traffic(launch.px, True)[0] == moved.activations
        assert device.traffic(launch.y, True)[1] == moved.results
        parts = device.traffic(launch.parts, True)
        assert parts[0] == parts[1] == moved.parts // 2
        assert (moved.parts > 0) == (blocks == 3)
    full = gpu.bytes_moved(spec, m, 4096, 4096, spec.tiles(m, 4096))
    least = full.weights + 2 * m * 4096 + 2 * m * 4096
    assert full.total <= 1.03 * least


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("name", ["s4g128", "nf4g64", "s4g128_2of4"])
def test_bytes_of_4096_by_4096(name: str, m: int, capsys: pytest.CaptureFixture[str]) -> None:
    """What the emulator counts at this size, all sectors once: at most 1.03 times weights,
    activations and results."""
    row = by_name(name)
    spec = GemmSpec(row, out="f16", schedule=Schedule(-(-m // decoding(row).tile)))
    launch = Launch(spec, m, 4096, 4096)
    launch.check(launch.run(), tolerance(spec))
    buffers = (launch.w, launch.px, launch.y, launch.parts)
    counted = sum(sum(launch.device.traffic(p, True)) for p in buffers)
    least = pack_gemm(spec, launch.weight).nbytes + 2 * m * 4096 + 2 * m * 4096
    assert launch.device.traffic(launch.w)[0] <= 1.001 * pack_gemm(spec, launch.weight).nbytes
    with capsys.disabled():
        print(f"\n{spec.name}, {m} tokens: {counted} bytes, {counted / least:.4f} of the least")
    assert counted <= 1.03 * least


@pytest.mark.parametrize("name", ["s4g128", "z8g128", "nf4g64", "nf3g64", "nf2g64", "s8g128/s8",
                                  "s7g128", "fp6_e3m2", "s4g128_2of4",
                                  "s4g128_2of4/s8"])  # fmt: skip
def test_shared_memory_has_no_conflicts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At most 1.1 times the least wavefronts, look-ups in tables apart, which are printed."""
    name, _, activations = name.partition("/")
    spec = GemmSpec(by_name(name), activations or "f16")
    launch = Launch(spec, 16, 128, 512)
    launch.run()
    look_ups = {1: "ld.shared.u32", 2: "ld.shared.v2.u32"}
    gathers = look_ups[2 if spec.decoding.name == "table2" else 1] if spec.table_entries else ""
    most = 0.0
    for row in launch.kernel.report():
        if not row.ideal_wavefronts:
            continue
        ratio = row.wavefronts / row.ideal_wavefronts
        if row.opcode == gathers:
            most = max(most, ratio)
        else:
            assert ratio <= 1.1, row
    if gathers:
        assert 1 <= most < 4
        with capsys.disabled():
            print(f"\n{spec.name}: look-ups take up to {most:.2f} times the least wavefronts")
