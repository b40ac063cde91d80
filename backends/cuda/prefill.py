"""Products on tensor cores in models: how weights lie, and the kernels for steps of each size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qigen.backends.cuda.gemm import (
    GemmSpec,
    Schedule,
    usual_schedule,
)
from qigen.backends.cuda.gemm_packing import gemm_bytes, pack_gemm, unpack_gemm
from qigen.formats.algebra import Format
from qigen.formats.catalog import by_name
from qigen.formats.tensor import QuantizedTensor

PANEL_BYTES = 32 << 20
"""Halves that a weight without a tensor-core kernel of its own is turned into at a time."""


def product_spec(format: Format, tokens: int, activations: str = "f16") -> GemmSpec:
    """The kernel for steps of so many tokens: few take small tiles with many warps along K, so that
    as many blocks as possible read the weights."""
    if tokens > 16:
        return GemmSpec(format, activations, schedule=usual_schedule(format, activations, 2))
    usual = usual_schedule(format, activations)
    few = replace(usual, warps_n=1, warps_k=4, stages=min(3, usual.stages))
    return GemmSpec(format, activations, schedule=few)


def panel_spec() -> GemmSpec:
    """The kernel that multiplies halves made on the device."""
    return GemmSpec(by_name("f16"), schedule=Schedule(4, depth=32, stages=3))


def panel_rows(n: int, k: int) -> int:
    """Rows of a weight [n, k] that are turned into halves at a time: a multiple of 64."""
    return min(-(-n // 64) * 64, max(64, PANEL_BYTES // (2 * -(-k // 64) * 64) // 64 * 64))


@dataclass(frozen=True)
class GemmForm:
    """A matrix in the order of the tensor cores, for activations of a kind ('f16' or 's4')."""

    format: Format
    activations: str = "f16"

    @property
    def spec(self) -> GemmSpec:
        """A kernel that reads it: all lie alike."""
        return product_spec(self.format, 1, self.activations)

    @property
    def name(self) -> str:
        """What the manifest calls it."""
        of = "" if self.activations == "f16" else f" of {self.activations}"
        return f"{self.format.name} for tensor cores{of}"

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a packed matrix [n, k]."""
        return gemm_bytes(self.spec, *shape)

    def pack(self, weight: QuantizedTensor) -> npt.NDArray[np.uint8]:
        """The packed matrix."""
        packed = pack_gemm(self.spec, weight)
        assert packed.nbytes == self.nbytes(weight.shape), self.name
        return packed

    def unpack(self, shape: tuple[int, int], packed: npt.NDArray[np.uint8]) -> QuantizedTensor:
        """The matrix in its own codes."""
        return unpack_gemm(self.spec, shape, packed)
