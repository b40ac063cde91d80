"""The device behind the driver API, with the emulator in the driver's place."""

from __future__ import annotations

import os

import pytest

from qigen.backends.cuda.device import make_device
from qigen.backends.cuda.emulator import driver_library
from qigen.errors import MachineMismatch, ToolchainError, UsageError
from tests.backends.cuda import test_attention, test_ops


def test_the_same_through_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """QIGEN_EXEC=cuda runs these tests on the driver's device; here the emulator is the driver."""
    if os.environ.get("QIGEN_EXEC", "emulator") != "cuda":
        monkeypatch.setenv("QIGEN_CUDA_DRIVER", str(driver_library()))
    monkeypatch.setenv("QIGEN_EXEC", "cuda")
    test_ops.test_argmax()
    test_ops.test_norm("rms", True, 64)
    test_attention.test_attention_on_tensor_cores("f16", 4, 2, 8, 0, 0.0)
    with pytest.raises(ToolchainError, match=r"cuModuleGetFunction|cuModuleLoadData|invalid"):
        make_device().load_ptx(".visible .entry nothing(")
    monkeypatch.setenv("QIGEN_CUDA_DRIVER", "/nowhere/libcuda.so")
    with pytest.raises(MachineMismatch, match="no CUDA driver here"):
        make_device()
    monkeypatch.setenv("QIGEN_EXEC", "gpu")
    with pytest.raises(UsageError, match="emulator or cuda"):
        make_device()
