"""Products of many tokens on tensor cores, from a second form of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qigen.backends.cuda.gemm import GemmSpec, gemm_bytes, pack_gemm, usual_schedule
from qigen.formats.algebra import Format, QuantizedTensor


@dataclass(frozen=True)
class GemmForm:
    """A matrix in the order of the tensor cores, beside its other form in weights.bin."""

    format: Format

    @property
    def spec(self) -> GemmSpec:
        """The kernel that reads it."""
        return GemmSpec(self.format, schedule=usual_schedule(self.format, m_tiles=2))

    @property
    def name(self) -> str:
        """What the manifest calls it."""
        return f"{self.format.name} for tensor cores"

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a packed matrix [n, k]."""
        return gemm_bytes(self.spec, *shape)

    def pack(self, weight: QuantizedTensor) -> npt.NDArray[np.uint8]:
        """The packed matrix."""
        packed = pack_gemm(self.spec, weight)
        assert packed.nbytes == self.nbytes(weight.shape), self.name
        return packed
