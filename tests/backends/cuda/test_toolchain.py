"""NVRTC, its cache and the SASS readers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qigen.backends.cuda import toolchain
from qigen.backends.cuda.gemm import GemmSpec, render_gemm
from qigen.errors import ToolchainError, UsageError
from qigen.formats import by_name
from tests.backends.cuda.test_gemm import Launch, tolerance

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


@pytest.fixture
def fresh() -> Iterator[None]:
    """The compiler is looked for again, now and afterwards."""
    toolchain.find_compiler.cache_clear()
    yield
    toolchain.find_compiler.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_missing_compiler_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QIGEN_NVRTC", "/nowhere/libnvrtc.so")
    with pytest.raises(ToolchainError, match=r"cannot be loaded .*QIGEN_NVRTC"):
        toolchain.find_compiler()
    monkeypatch.setenv("QIGEN_NVCC", "/nowhere/nvcc")
    with pytest.raises(ToolchainError, match=r"nvcc cannot be started .*qigen\[cuda\]"):
        toolchain.find_compiler()
    old = tmp_path / "nvcc"
    for says, message in (("release 11.8, V11.8.89", "nvcc 11.8 knows no sm_120"),
                          ("gcc", "this is no nvcc")):
        old.write_text(f"#!/bin/sh\necho '{says}'\n")
        old.chmod(0o755)
        monkeypatch.setenv("QIGEN_NVCC", str(old))
        with pytest.raises(ToolchainError, match=message):
            toolchain.find_compiler()
    monkeypatch.delenv("QIGEN_NVCC")
    monkeypatch.delenv("QIGEN_NVRTC")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(toolchain, "_wheel_folders", list)
    assert not toolchain.available()
    with pytest.raises(ToolchainError, match=r"no CUDA compiler .*qigen\[cuda\]"):
        toolchain.find_compiler()


@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no CUDA toolkit")
def test_nvcc_where_there_is_no_nvrtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PTX and machine code of a tensor-core kernel; it multiplies as NVRTC's does."""
    monkeypatch.setenv("QIGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(toolchain, "_libraries", list)
    assert toolchain.available()
    compiler = toolchain.find_compiler()
    assert isinstance(compiler, toolchain.Nvcc)
    assert compiler.label.startswith("nvcc 1")
    spec = GemmSpec(by_name("s4g128"))
    launch = Launch(spec, 3, 70, 264)
    ptx = toolchain.compile_ptx(spec.name, render_gemm(spec))
    launch.check(launch.run(ptx=ptx), tolerance(spec))
    assert toolchain.compile_cubin("scale", TEXT, "sm_90")[:4] == b"\x7fELF"
    with pytest.raises(ToolchainError, match=r"(?s)broken: nvcc failed.*undefined"):
        toolchain.compile_ptx("broken", "__global__ void f() { nowhere(); }")
