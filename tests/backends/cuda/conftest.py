"""GPU kernels are tested where NVRTC is installed; no GPU is needed."""

from __future__ import annotations

import pytest

from qigen.backends.cuda import toolchain


@pytest.fixture(scope="session", autouse=True)
def nvrtc() -> None:
    """Skips every test of this folder where CUDA text cannot be compiled."""
    if not toolchain.available():
        pytest.skip("NVRTC is not installed: pip install 'qigen[cuda]'")
