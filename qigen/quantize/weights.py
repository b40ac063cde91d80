"""Rounding of a model's matrices to one format on the way in (``--weights FORMAT``)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qigen.errors import BadInput, QigenError, Unsupported
from qigen.formats.algebra import Format, QuantizedTensor
from qigen.ir.graph import Constant, Graph, constant_shape, load_constant
from qigen.quantize.rtn import check_rounding, quantize_rtn


@dataclass(frozen=True)
class Rounded:
    """The matrix ``name``, dequantized and rounded to ``format`` when it is loaded."""

    name: str
    origin: Constant
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        return constant_shape(self.origin)

    def load(self) -> QuantizedTensor:
        """The matrix in the new format; BadInput, naming it, if a weight is too large for that."""
        data = load_constant(self.origin)
        dense = data.dequantize() if isinstance(data, QuantizedTensor) else data
        try:
            return quantize_rtn(dense, self.format)
        except BadInput as error:
            raise BadInput(f"{self.format.name}: {error.message}", self.name) from None


def requantized(graph: Graph, fmt: Format) -> Graph:
    """The graph with every matrix rounded to nearest in ``fmt``; vectors stay as they are.

    Raises Unsupported, naming the first matrix, if it cannot be brought to the format.
    """
    result = graph.copy()
    for name, data in graph.constants.items():
        if len(constant_shape(data)) == 2 and graph.values[name].dtype != fmt.name:
            try:
                check_rounding(fmt, constant_shape(data)[1])
            except QigenError as error:
                raise Unsupported(f"{fmt.name}: {error.message}", name) from None
            result.constants[name] = Rounded(name, data, fmt)
            result.values[name] = replace(graph.values[name], dtype=fmt.name)
    return result
