"""Products of many tokens on tensor cores, from a second form of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qigen.backends.cuda.gemm import COLUMNS, GemmSpec, Schedule, pack_gemm
from qigen.formats.algebra import Format, QuantizedTensor

SCHEDULE = Schedule(m_tiles=2)
"""Every format that has a kernel takes it."""


@dataclass(frozen=True)
class GemmForm:
    """A matrix in the order of the tensor cores, beside its other form in weights.bin."""

    format: Format

    @property
    def spec(self) -> GemmSpec:
        """The kernel that reads it."""
        return GemmSpec(self.format, schedule=SCHEDULE)

    @property
    def name(self) -> str:
        """What the manifest calls it."""
        return f"{self.format.name} for tensor cores"

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a packed matrix [n, k]."""
        spec = self.spec
        rows, columns = (-(-v // to) * to for v, to in
                         zip(shape, (COLUMNS, spec.padding), strict=True))  # fmt: skip
        groups = columns // spec.group if spec.group else 1
        codes = rows * columns * spec.decoding.bits // 8
        side = rows * groups * (spec.scale_bytes + spec.zero_bytes)
        factors = 4 * rows if self.format.has("sub") else 0
        table = 2 * max(1 << self.format.code_bits, 8) if spec.table_entries else 0
        return codes + side + factors + table

    def pack(self, weight: QuantizedTensor) -> npt.NDArray[np.uint8]:
        """The packed matrix."""
        packed = pack_gemm(self.spec, weight)
        assert packed.nbytes == self.nbytes(weight.shape), self.name
        return packed
