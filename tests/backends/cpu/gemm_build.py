"""Kernels of the gemm family: their structs, for ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.backends.base import Isa, KernelSource
from qigen.backends.cpu.gemm import PREPARE_ENTRIES
from tests.backends.cpu import entry_build
from tests.backends.cpu.entry_build import run as run
from tests.backends.cpu.kernel_build import SANITIZERS

Array = npt.NDArray[Any]

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class GemmInput(ctypes.Structure):
    """``qg::GemmInput`` of gemm.h."""

    _fields_ = [("p", _P), ("pixel", _L), ("row", _L), ("image", _L)]


class GemmOutput(ctypes.Structure):
    """``qg::GemmOutput``."""

    _fields_ = [("y", _P), ("y_pixel", _L), ("y_row", _L), ("y_image", _L), ("bias", _P),
                ("scale", _P), ("init", _P), ("wsum", _P), ("x_scale", _P), ("x_zero", _P),
                ("x_scale_step", _I), ("y_scale", _F), ("y_zero", _I), ("inputs", GemmInput * 4)]


class GemmArgs(ctypes.Structure):
    """``qg::GemmArgs``."""

    _fields_ = [("w", _P), ("row_block", _L), ("x", _P), ("x_pixel", _L), ("x_row", _L),
                ("x_image", _L), ("columns", _I), ("rows", _I), ("images", _I), ("taps", _P),
                ("n_taps", _I), ("steps", _I), ("n", _I), ("out", GemmOutput)]


class DepthwiseArgs(ctypes.Structure):
    """``qg::DepthwiseArgs``."""

    _fields_ = [("w", _P), ("x", _P), ("x_pixel", _L), ("x_row", _L), ("x_image", _L), ("h", _I),
                ("width", _I), ("channels", _I), ("columns", _I), ("rows", _I), ("images", _I),
                ("kernel_h", _I), ("kernel_w", _I), ("stride_h", _I), ("stride_w", _I),
                ("dilation_h", _I), ("dilation_w", _I), ("pad_top", _I), ("pad_left", _I),
                ("out", GemmOutput)]


class PadArgs(ctypes.Structure):
    """``qg::PadArgs``."""

    _fields_ = [("x", _P), ("x_channel", _L), ("x_pixel", _L), ("x_row", _L), ("x_image", _L),
                ("channels", _I), ("columns", _I), ("rows", _I), ("images", _I), ("y", _P),
                ("y_channels", _I), ("top", _I), ("bottom", _I), ("left", _I), ("right", _I),
                ("scale", _F), ("zero", _I), ("partials", _P), ("scale_out", _P), ("zero_out", _P)]


class QuantizeRowsArgs(ctypes.Structure):
    """``qg::QuantizeRowsArgs``."""

    _fields_ = [("x", _P), ("x_stride", _L), ("m", _I), ("k", _I), ("y", _P), ("y_stride", _L),
                ("k_padded", _I), ("scale", _P), ("zero", _P)]


STRUCTS = {s.__name__: s for s in (GemmArgs, DepthwiseArgs, PadArgs, QuantizeRowsArgs)}

def struct_of(entry: str) -> str:
    """The name of the struct that an entry takes."""
    if entry in PREPARE_ENTRIES:
        return PREPARE_ENTRIES[entry]
    return "DepthwiseArgs" if entry.startswith("depthwise") else "GemmArgs"


def build(folder: Path, isa: Isa, kernels: Sequence[KernelSource], sanitize: bool = False) -> Path:
    """Compile everything in one translation unit, once; the path of the library."""
    struct = {entry: struct_of(entry) for kernel in kernels for entry in kernel.entries}
    flags = SANITIZERS if sanitize else ()
    return entry_build.build(folder, isa, kernels, "gemm.h", struct, flags, STRUCTS)


def load(path: Path) -> Any:
    """The library, checked to agree on the layout of the structs."""
    return entry_build.load(path, STRUCTS.values())


def fill(struct: ctypes.Structure, values: Mapping[str, Any]) -> list[Array]:
    """Set members by name, arrays by their address; the arrays, which must outlive the call."""
    kept = []
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            assert value.flags.c_contiguous
            kept.append(value)
            setattr(struct, name, value.ctypes.data)
        else:
            setattr(struct, name, value)
    return kept
