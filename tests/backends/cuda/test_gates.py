"""The machine code of the kernels against their gates and the golden numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from qigen.backends.cuda import gates
from qigen.backends.cuda.toolchain import ARCHS

ROWS = {g.name: g for g in gates.gated()}

INT4, TABLE = "gemm_s4g128_f16_f32_m16n2k2x64s4", "gemm_nf4g64_f16_f32_m16n2k2x64s4d8"

# the two kernels with bounds of their own for two targets, one of a kind for one: to compile all
# for all targets takes many minutes
FAST = {(INT4, "sm_80"), (INT4, "sm_90"), (TABLE, "sm_80"), (TABLE, "sm_90"),
        ("gemm_s4g128_2of4_f16_f32_m32n2k2x64s4", "sm_80"),
        ("gemm_fp6_e3m2_f16_f32_m16n2k2x64s4", "sm_90"),
        ("gemm_s8g128_s8_f32_m16n2k2x64s4", "sm_120"), ("choose", "sm_80"),
        ("norm_rms", "sm_90")}  # fmt: skip


def cases(names: Iterable[str]) -> list[Any]:
    """Every name with every target; all but the fast ones are slow."""
    return [pytest.param(name, arch, marks=() if (name, arch) in FAST else pytest.mark.slow)
            for name in names for arch in ARCHS]


@pytest.mark.parametrize(("name", "arch"), cases(ROWS))
def test_gate(name: str, arch: str) -> None:
    numbers, broken = gates.check([ROWS[name]], [arch])
    assert not broken
    assert not gates.differences(numbers)


def test_golden_numbers_are_of_the_gated_kernels() -> None:
    _, golden, others = gates.read_golden()
    assert set(golden) == {f"{name} {arch}" for name in ROWS for arch in ARCHS}
    for name in gates.plain():
        for arch in ARCHS:
            assert any(key.startswith(name) and key.endswith(arch) for key in others)
    names = [case.values[0] for case in (*cases(ROWS), *cases(gates.plain())) if not case.marks]
    assert len(names) == len(FAST)


@pytest.mark.parametrize(("name", "arch"), cases(gates.plain()))
def test_gate_of_kernels_without_tensor_cores(name: str, arch: str) -> None:
    numbers, broken = gates.check_plain([name], [arch])
    assert numbers
    assert not broken
    assert not gates.differences(numbers)


def test_what_breaks_a_gate_is_named() -> None:
    good = gates.measure(ROWS[INT4].name, ROWS[INT4].text(), "sm_80")
    assert not gates.faults(ROWS[INT4], good)
    bad = replace(good, stack=8, spills=3, slots=500, mma=31, copies=2, narrow_copies=1,
                  loads128=5, loads=9)
    found = " | ".join(gates.faults(ROWS[INT4], bad))
    for part in ("stack: 8", "spills: 3", "16.13 issue slots", "mma in the main loop: 31",
                 "copies of 128 bits in the main loop: 2", "narrow loads in the main loop: 9",
                 "copies of less than 128 bits: 1", "loads of 128 bits in the main loop: 5"):
        assert part in found
    key = f"{ROWS[INT4].name} sm_80"
    assert gates.differences({key: bad})


def test_a_kernel_that_spills_breaks_its_gate() -> None:
    text = ROWS[INT4].text().replace("__launch_bounds__(128, 1)", "__launch_bounds__(128, 8)")
    m = gates.measure(ROWS[INT4].name, text, "sm_80")
    assert any("spills" in fault for fault in gates.faults(ROWS[INT4], m))
