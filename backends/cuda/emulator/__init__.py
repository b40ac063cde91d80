"""The PTX emulator behind ctypes, with a face like the driver API: modules, launches, memory.

The C++ beside this file is compiled once with the project's toolchain and cached. It runs the PTX
that ships, so what it finds is in the kernels; what it cannot see is said in docs/gpu.md.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.backends.cuda import toolchain as cuda
from qigen.errors import QigenError, ToolchainError, UsageError
from qigen.toolchain import ObjectCache, Unit, cache_folder, find_compiler

_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off")
_SOURCES = ("api", "collective", "driver", "execute", "memory", "parser", "scheduler")
POLICIES = ("fair", "random", "priority")

Array = npt.NDArray[Any]


class Finding(QigenError):
    """A kernel did something wrong: a race, an access outside of memory, a deadlock ..."""

    kind = "finding"


@functools.lru_cache(maxsize=1)
def driver_library() -> Path:
    """The emulator as a shared library, compiled if it is not cached.

    It has the functions of the CUDA driver that artifacts call: QIGEN_CUDA_DRIVER may name it, and
    QIGEN_EMULATED_GPU then says what device it is (backends/cuda/emulator/driver.cpp).
    """
    folder = Path(__file__).parent
    compiler = find_compiler()
    headers = {p.name: p.read_text() for p in sorted(folder.glob("*.h"))}
    with ObjectCache(compiler, os.cpu_count() or 1) as cache:
        units = [
            Unit(f"ptx_{name}", (folder / f"{name}.cpp").read_text(), _FLAGS, headers)
            for name in _SOURCES
        ]
        keys = "".join(cache.key(unit) for unit in units)
        objects = [future.result() for future in [cache.compile(unit) for unit in units]]
    name = f"ptx-emulator-{hashlib.blake2b(keys.encode(), digest_size=20).hexdigest()}.so"
    target = cache_folder() / "cuda" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}")
        compiler.run(["-shared", *map(str, objects), "-o", str(temporary)], name)
        temporary.replace(target)
    return target


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(driver_library()))
    handle, address = ctypes.c_void_p, ctypes.c_uint64
    library.ptxLastError.restype = ctypes.c_char_p
    library.ptxCreateDevice.restype = handle
    library.ptxDestroyDevice.argtypes = [handle]
    library.ptxAllocate.restype = address
    library.ptxAllocate.argtypes = [handle, address]
    library.ptxFree.argtypes = [handle, address]
    library.ptxCopyToDevice.argtypes = [handle, address, handle, address]
    library.ptxCopyToHost.argtypes = [handle, handle, address, address]
    library.ptxTraffic.argtypes = [handle, address, handle, handle]
    library.ptxDistinctTraffic.argtypes = [handle, address, handle, handle]
    library.ptxLoadKernel.restype = handle
    library.ptxLoadKernel.argtypes = [handle, ctypes.c_char_p, ctypes.c_char_p]
    library.ptxUnloadKernel.argtypes = [handle]
    library.ptxParameterCount.argtypes = [handle]
    library.ptxParameterSize.argtypes = [handle, ctypes.c_int]
    library.ptxStaticShared.restype = address
    library.ptxStaticShared.argtypes = [handle]
    library.ptxLaunch.argtypes = [
        handle, handle, handle, handle, address, handle, ctypes.c_int, address, ctypes.c_int,
        ctypes.c_int, address,
    ]  # fmt: skip
    library.ptxReport.restype = ctypes.c_char_p
    library.ptxReport.argtypes = [handle]
    return library


def _check(code: int) -> None:
    if code == 2:
        raise Finding(_library().ptxLastError().decode())
    if code:
        raise ToolchainError(_library().ptxLastError().decode())


@dataclass(frozen=True)
class Row:
    """What one instruction of a launch did, summed over all warps."""

    line: int
    opcode: str
    executed: int
    wavefronts: int
    ideal_wavefronts: int
    sectors: int
    ideal_sectors: int


@dataclass(frozen=True)
class Schedule:
    """How blocks and warps take turns: 'fair', 'random' or 'priority' of blocks, and the seed.

    ``resident`` blocks run at a time, a warp ``quantum`` instructions; a launch may take ``budget``
    warp instructions before it counts as a livelock.
    """

    policy: str = "fair"
    seed: int = 1
    resident: int = 8
    quantum: int = 64
    budget: int = 400_000_000


class Kernel:
    """A kernel of a module, loaded on an emulated device."""

    def __init__(self, device: EmulatedDevice, ptx: str, name: str) -> None:
        self.device, self.name = device, name
        self.handle = _library().ptxLoadKernel(device.handle, ptx.encode(), name.encode())
        if not self.handle:
            raise ToolchainError(_library().ptxLastError().decode(), name)
        weakref.finalize(self, _library().ptxUnloadKernel, self.handle)

    def report(self) -> list[Row]:
        """What each instruction of the last launch did."""
        text = _library().ptxReport(self.handle).decode()
        rows = [line.split("\t") for line in text.splitlines()]
        return [Row(int(r[0]), r[1], *map(int, r[2:])) for r in rows]


class EmulatedDevice:
    """A GPU that is none: memory and launches with the findings of the emulator."""

    emulated = True

    def __init__(self, schedule: Schedule | None = None) -> None:
        self.schedule = schedule or Schedule()
        self.handle = _library().ptxCreateDevice()
        weakref.finalize(self, _library().ptxDestroyDevice, self.handle)

    def allocate(self, nbytes: int) -> int:
        """Address of ``nbytes`` bytes that nobody wrote yet."""
        return int(_library().ptxAllocate(self.handle, max(nbytes, 1)))

    def free(self, address: int) -> None:
        """Give an allocation back."""
        _library().ptxFree(self.handle, address)

    def write(self, address: int, array: Array) -> None:
        """Copy an array to the device."""
        data = np.ascontiguousarray(array)
        if data.nbytes:
            _check(
                _library().ptxCopyToDevice(self.handle, address, data.ctypes.data, data.nbytes)
            )

    def read(self, address: int, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Copy from the device; a Finding if a byte of it was never written."""
        out = np.empty(tuple(shape), dtype)
        _check(_library().ptxCopyToHost(self.handle, out.ctypes.data, address, out.nbytes))
        return out

    def upload(self, array: Array) -> int:
        """Address of a new copy of the array."""
        address = self.allocate(array.nbytes)
        self.write(address, array)
        return address

    def load(self, name: str, text: str) -> dict[str, Kernel]:
        """The kernels of CUDA ``text``, by name."""
        ptx = cuda.compile_ptx(name, text)
        return self.load_ptx(ptx)

    def load_ptx(self, ptx: str) -> dict[str, Kernel]:
        """The kernels of a PTX module, by name."""
        names = [line.split()[2].split("(")[0] for line in ptx.splitlines()
                 if line.startswith(".visible .entry")]
        return {name: Kernel(self, ptx, name) for name in names}

    def launch(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        shared: int = 0,
    ) -> None:
        """Run a kernel to its end. Arguments are addresses, numpy scalars or ctypes values.

        Raises Finding for what the kernel does wrong, UsageError for arguments that do not fit.
        """
        library, schedule = _library(), self.schedule
        count = library.ptxParameterCount(kernel.handle)
        if len(arguments) != count:
            raise UsageError(f"{kernel.name} takes {count} arguments, not {len(arguments)}")
        holders = []
        for n, argument in enumerate(arguments):
            raw = argument_bytes(argument)
            size = library.ptxParameterSize(kernel.handle, n)
            if len(raw) != size:
                raise UsageError(f"argument {n} of {kernel.name} has {size} bytes, not {len(raw)}")
            holders.append(ctypes.create_string_buffer(raw, size))
        pointers = (ctypes.c_void_p * max(count, 1))(*(ctypes.addressof(h) for h in holders))
        three = ctypes.c_uint32 * 3
        _check(
            library.ptxLaunch(
                self.handle, kernel.handle, three(*(*grid, 1, 1)[:3]), three(*(*block, 1, 1)[:3]),
                shared, pointers, POLICIES.index(schedule.policy), schedule.seed,
                schedule.resident, schedule.quantum, schedule.budget,
            )
        )  # fmt: skip

    def traffic(self, address: int, distinct: bool = False) -> tuple[int, int]:
        """Bytes of an allocation that the last launch read and wrote, in sectors of 32: every
        request of a warp, or every sector once (``distinct``)."""
        read, written = ctypes.c_uint64(), ctypes.c_uint64()
        count = _library().ptxDistinctTraffic if distinct else _library().ptxTraffic
        count(self.handle, address, ctypes.byref(read), ctypes.byref(written))
        return read.value, written.value


def argument_bytes(argument: Any) -> bytes:
    """A kernel argument as it lies in memory: an int is an address, other numbers need a type."""
    if isinstance(argument, int):
        return argument.to_bytes(8, "little")
    if isinstance(argument, np.generic):
        return argument.tobytes()
    if isinstance(argument, float):
        raise UsageError("a float argument needs a type: np.float32(x)")
    return bytes(argument)
