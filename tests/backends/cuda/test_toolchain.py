"""NVRTC, its cache and the SASS readers."""

from __future__ import annotations

from pathlib import Path

import pytest

from qigen.backends.cuda import toolchain
from qigen.errors import ToolchainError, UsageError

TEXT = """
extern "C" __global__ void scale(float* y, const float* x, float a, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i];
}
"""


def test_ptx_names_the_kernel_and_the_lowest_target() -> None:
    ptx = toolchain.compile_ptx("scale", TEXT)
    assert ".visible .entry scale(" in ptx
    assert ".target sm_80" in ptx


@pytest.mark.parametrize("arch", toolchain.ARCHS)
def test_cubin_of_every_target_is_read_back(arch: str) -> None:
    cubin = toolchain.compile_cubin("scale", TEXT, arch)
    assert cubin[:4] == b"\x7fELF"
    opcodes = [i.opcode for i in toolchain.read_sass(cubin)["scale"]]
    assert any(o.startswith("LDG") for o in opcodes)
    assert any(o.startswith("STG") for o in opcodes)
    resources = toolchain.read_resources(cubin)["scale"]
    assert 4 <= resources.registers <= 32
    assert resources.stack == resources.local == 0


def test_second_compilation_comes_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QIGEN_CACHE", str(tmp_path))
    first = toolchain.compile_ptx("scale", TEXT)
    monkeypatch.setattr(toolchain.Nvrtc, "compile", lambda *_: pytest.fail("compiled again"))
    assert toolchain.compile_ptx("scale", TEXT) == first


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ToolchainError, match=r"(?s)broken: NVRTC failed.*undefined"):
        toolchain.compile_ptx("broken", "__global__ void f() { nowhere(); }")
    with pytest.raises(UsageError, match="sm_70: choose among sm_80"):
        toolchain.compile_cubin("scale", TEXT, "sm_70")


def test_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QIGEN_NVRTC", "/nowhere/libnvrtc.so")
    toolchain.find_nvrtc.cache_clear()
    with pytest.raises(ToolchainError, match=r"cannot be loaded .*QIGEN_NVRTC"):
        toolchain.find_nvrtc()
    toolchain.find_nvrtc.cache_clear()
