"""Bounds of GPU kernels: occupancy, waves, bytes, and the order of schedules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qigen.backends.cuda import toolchain
from qigen.backends.cuda.gates import Measured
from qigen.backends.cuda.gemm import GemmSpec, Schedule
from qigen.costmodel import gpu
from qigen.errors import UsageError
from qigen.formats import by_name

CODE = Measured(registers=125, stack=0, spills=0, slots=320, mma=32, copies=7, narrow_copies=0,
                ldmatrix=4, loads128=6, loads=0)
SPEC = GemmSpec(by_name("s4g128"), out="f16")


def test_every_target_has_a_row_with_its_source() -> None:
    assert set(gpu.devices()) == set(toolchain.ARCHS)
    for row in gpu.devices().values():
        assert "NVIDIA" in row.source and "CUDA C++ Programming Guide" in row.source
        # the published rate is a whole number of products a cycle of every multiprocessor
        each = row.tensor_f16_tflops * 1e3 / (row.sms * row.ghz)
        assert min(abs(each - power) / power for power in (512, 1024, 2048, 4096)) < 0.01
    with pytest.raises(UsageError, match="sm_75; choose among sm_80"):
        gpu.device("sm_75")


@pytest.mark.parametrize(("registers", "shared", "threads", "blocks", "limit"), [
    (16, 0, 1024, 2, "threads"),
    (128, 0, 128, 4, "registers"),
    (129, 0, 128, 3, "registers"),
    (255, 0, 256, 1, "registers"),
    (32, 81 * 1024, 128, 2, "shared memory"),
    (32, 100 * 1024, 128, 1, "shared memory"),
    (16, 0, 32, 32, "blocks"),
    (16, 164 * 1024, 32, 0, "shared memory"),
])  # fmt: skip
def test_occupancy(registers: int, shared: int, threads: int, blocks: int, limit: str) -> None:
    """Against the CUDA occupancy calculator for compute capability 8.0."""
    held = gpu.occupancy(gpu.device("sm_80"), registers, shared, threads)
    assert (held.blocks, held.limit) == (blocks, limit)
    assert held.warps == blocks * threads // 32


def test_bounds_of_one_row_and_of_many() -> None:
    row = gpu.device("sm_80")
    one = gpu.bound(row, SPEC, 1, 4096, 4096, code=CODE)
    # 16 MiB of 4-bit codes and their scales, each once
    assert one.bytes.weights == 4096 * 4096 // 2 + 4096 * 32 * 2
    assert one.microseconds["memory"] == pytest.approx(one.bytes.total / 1555e3)
    assert (one.blocks, one.waves) == (32, 1)
    assert one.balance == pytest.approx(32 / 108)
    spread = gpu.bound(row, SPEC, 1, 4096, 4096, 108, code=CODE)
    assert spread.balance > 0.9
    assert spread.microseconds["issue"] < 0.4 * one.microseconds["issue"]
    assert spread.bytes.parts > 0 == one.bytes.parts
    many = gpu.bound(row, replace(SPEC, schedule=Schedule(2, 2, 2, 64, 3)), 4096, 4096, 4096,
                     code=replace(CODE, mma=64, slots=430))
    assert many.microseconds["tensor"] > many.microseconds["memory"]
    # the rate is that of the maker, the last wave counts whole
    assert many.microseconds["tensor"] >= 2 * 4096**3 / 312e6
    assert gpu.NOTE in many.describe()


def test_waves_count_whole() -> None:
    row = gpu.device("sm_90")
    times = []
    for tiles in (132, 133, 264):
        b = gpu.bound(row, SPEC, 1, tiles * 128, 1024, code=CODE)
        times.append(b.microseconds["issue"])
    assert times[0] * 2 == pytest.approx(times[1]) == pytest.approx(times[2])


def test_candidates_are_what_the_template_takes() -> None:
    for name, activations in (("s4g128", "f16"), ("z4g64", "f16"), ("w4a8", "s8")):
        spec = GemmSpec(by_name(name), activations)
        for m in (1, 16, 17, 128):
            found = gpu.candidates(spec, m)
            assert len(found) >= 4
            assert all(c.rows <= 16 * -(-m // 16) and c.schedule.m_tiles <= spec.most_tiles
                       for c in found)


@pytest.mark.skipif(not (toolchain.available() and toolchain.reads_sass()),
                    reason="there is no CUDA compiler, or nothing reads its machine code")
@pytest.mark.parametrize("among", [2, pytest.param(99, marks=pytest.mark.slow)])
def test_choice_for_a_weight_that_is_read_once(
    among: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among all candidates, or some: each is compiled."""
    found = gpu.candidates(SPEC, 16)[:among]
    monkeypatch.setattr(gpu, "candidates", lambda *_: found)
    best = gpu.choose(gpu.device("sm_80"), SPEC, 16, 4096, 4096)
    assert len(best) == 2 * len(found)
    assert best[0].resource == "memory"
    assert best[0].bytes.total <= 1.03 * (best[0].bytes.weights + 2 * 2 * 16 * 4096)
    assert [b.least for b in best] == sorted(b.least for b in best)
