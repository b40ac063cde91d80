"""The machine code of the kernels against their gates and the golden numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qigen.backends.cuda import gates

ROWS = gates.gated()


# one kernel of a kind always; compiling all for all targets takes minutes
FAST = ("gemm_s4g128_f16_f32_m16", "gemm_nf4g64_f16_f32_m16", "gemm_s4g128_2of4_f16_f32_m32",
        "gemm_fp6_e3m2", "gemm_s8g128_s8")  # fmt: skip


@pytest.mark.parametrize(
    "gate",
    [pytest.param(g, marks=() if g.name.startswith(FAST) else pytest.mark.slow) for g in ROWS],
    ids=[g.name for g in ROWS],
)
def test_gate(gate: gates.Gated) -> None:
    numbers, broken = gates.check([gate])
    assert not broken
    assert not gates.differences(numbers)


def test_golden_numbers_are_of_the_gated_kernels() -> None:
    _, golden, others = gates.read_golden()
    assert set(golden) == {f"{g.name} {arch}" for g in ROWS for arch in gates.ARCHS}
    for name in gates.plain():
        assert any(key.startswith(name) for key in others)


QUICK = ("choose", "norm_rms")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in gates.plain()],
)
def test_gate_of_kernels_without_tensor_cores(name: str) -> None:
    numbers, broken = gates.check_plain([name])
    assert numbers
    assert not broken
    assert not gates.differences(numbers)


def test_what_breaks_a_gate_is_named() -> None:
    good = gates.measure(ROWS[0].name, ROWS[0].text(), "sm_80")
    assert not gates.faults(ROWS[0], good)
    bad = replace(good, stack=8, spills=3, slots=500, mma=31, copies=2, narrow_copies=1,
                  loads128=5, loads=9)
    found = " | ".join(gates.faults(ROWS[0], bad))
    for part in ("stack: 8", "spills: 3", "16.13 issue slots", "mma in the main loop: 31",
                 "copies of 128 bits in the main loop: 2", "narrow loads in the main loop: 9",
                 "copies of less than 128 bits: 1", "loads of 128 bits in the main loop: 5"):
        assert part in found
    key = f"{ROWS[0].name} sm_80"
    assert gates.differences({key: bad})


def test_a_kernel_that_spills_breaks_its_gate() -> None:
    text = ROWS[0].text().replace("__launch_bounds__(128, 1)", "__launch_bounds__(128, 8)")
    m = gates.measure(ROWS[0].name, text, "sm_80")
    assert any("spills" in fault for fault in gates.faults(ROWS[0], m))
