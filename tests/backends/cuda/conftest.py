"""GPU kernels are tested where NVRTC is installed, or with the nvcc that QIGEN_NVCC names, which
takes several times as long; no GPU is needed."""

from __future__ import annotations

import os

import pytest

from qigen.backends.cuda import toolchain


@pytest.fixture(scope="session", autouse=True)
def nvrtc() -> None:
    """Skips every test of this folder where CUDA text cannot be compiled and read back."""
    nvcc = toolchain.available() and isinstance(toolchain.find_compiler(), toolchain.Nvcc)
    if not toolchain.available() or (nvcc and "QIGEN_NVCC" not in os.environ):
        pytest.skip("NVRTC is not installed: pip install 'qigen[cuda]'")
    if not toolchain.reads_sass():
        pytest.skip("nvdisasm or cuobjdump is not installed: pip install 'qigen[cuda]'")
