"""A device through the driver API, with the face of the emulated one: the same tests on hardware.

The driver is libcuda.so.1, or the library that QIGEN_CUDA_DRIVER names (the emulator's own, for
instance, by which this module itself is tested). Functions: the CUDA driver API documents.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.backends.cuda import toolchain as cuda
from qigen.backends.cuda.emulator import EmulatedDevice, Schedule, argument_bytes
from qigen.errors import MachineMismatch, ToolchainError, UsageError

Array = npt.NDArray[Any]

_SHARED_WITHOUT_ASKING = 32 << 10  # 48 KiB with what kernels have of their own
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@dataclass(frozen=True)
class DriverKernel:
    """A kernel of a module that the driver holds."""

    name: str
    handle: int


class DriverDevice:
    """The first device of the driver. MachineMismatch if there is no driver or no device."""

    emulated = False

    def __init__(self) -> None:
        path = os.environ.get("QIGEN_CUDA_DRIVER") or "libcuda.so.1"
        try:
            self.library = ctypes.CDLL(path)
        except OSError as error:
            raise MachineMismatch(f"there is no CUDA driver here ({error})", path) from None
        self._check("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._check("cuDeviceGet", ctypes.byref(device), 0)
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._check("cuCtxPushCurrent_v2", context)
        stream = ctypes.c_void_p()
        self._check("cuStreamCreate", ctypes.byref(stream), 1)
        self.stream = stream

    def _check(self, function: str, *arguments: Any) -> None:
        code = getattr(self.library, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            raise ToolchainError(f"{function}: {(text.value or b'').decode()} (error {code})")

    def allocate(self, nbytes: int) -> int:
        """Address of ``nbytes`` bytes."""
        address = ctypes.c_uint64()
        size = ctypes.c_size_t(max(nbytes, 1))
        self._check("cuMemAlloc_v2", ctypes.byref(address), size)
        return address.value

    def free(self, address: int) -> None:
        """Give an allocation back."""
        self._check("cuMemFree_v2", ctypes.c_uint64(address))

    def write(self, address: int, array: Array) -> None:
        """Copy an array to the device."""
        data = np.ascontiguousarray(array)
        if data.nbytes:
            self._check("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address),
                        ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes),
                        self.stream)  # fmt: skip
            self._check("cuStreamSynchronize", self.stream)

    def read(self, address: int, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Copy from the device."""
        out = np.empty(tuple(shape), dtype)
        self._check("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(out.ctypes.data),
                    ctypes.c_uint64(address), ctypes.c_size_t(out.nbytes),
                    self.stream)  # fmt: skip
        self._check("cuStreamSynchronize", self.stream)
        return out

    def upload(self, array: Array) -> int:
        """Address of a new copy of the array."""
        address = self.allocate(array.nbytes)
        self.write(address, array)
        return address

    def load(self, name: str, text: str) -> dict[str, DriverKernel]:
        """The kernels of CUDA ``text``, by name."""
        return self.load_ptx(cuda.compile_ptx(name, text))

    def load_ptx(self, ptx: str) -> dict[str, DriverKernel]:
        """The kernels of a PTX module, by name."""
        module = ctypes.c_void_p()
        self._check("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(ptx.encode()))
        kernels = {}
        for line in ptx.splitlines():
            if line.startswith(".visible .entry"):
                name = line.split()[2].split("(")[0]
                handle = ctypes.c_void_p()
                self._check("cuModuleGetFunction", ctypes.byref(handle), module, name.encode())
                assert handle.value is not None
                kernels[name] = DriverKernel(name, handle.value)
        return kernels

    def launch(
        self,
        kernel: DriverKernel,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        shared: int = 0,
    ) -> None:
        """Run a kernel to its end. Arguments are addresses, numpy scalars or ctypes values.

        The driver does not tell how many there are. Raises ToolchainError for what it reports.
        """
        function = ctypes.c_void_p(kernel.handle)
        if shared > _SHARED_WITHOUT_ASKING:
            self._check("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared)
        raw = [argument_bytes(a) for a in arguments]
        holders = [ctypes.create_string_buffer(r, len(r)) for r in raw]
        pointers = (ctypes.c_void_p * max(len(raw), 1))(*(ctypes.addressof(h) for h in holders))
        sizes = [ctypes.c_uint(n) for n in (*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3], shared)]
        self._check("cuLaunchKernel", function, *sizes, self.stream, pointers, None)
        self._check("cuStreamSynchronize", self.stream)


def make_device(schedule: Schedule | None = None) -> Any:
    """The device that QIGEN_EXEC names: "emulator" (the default), or "cuda", the driver's.

    ``schedule`` is the emulator's: hardware has its own. UsageError for another value.
    """
    where = os.environ.get("QIGEN_EXEC", "emulator")
    if where == "cuda":
        return DriverDevice()
    if where != "emulator":
        raise UsageError(f"QIGEN_EXEC={where}: it is emulator or cuda")
    return EmulatedDevice(schedule)
