"""Rounding of a model's matrices to one format on the way in (``--weights FORMAT``)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qigen.formats.algebra import Format, QuantizedTensor
from qigen.ir.graph import Constant, Graph, Value, constant_shape, load_constant
from qigen.quantize.rtn import quantize_rtn


@dataclass(frozen=True)
class Rounded:
    """A matrix that is dequantized and rounded to ``format`` when it is loaded."""

    origin: Constant
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        return constant_shape(self.origin)

    def load(self) -> QuantizedTensor:
        """The matrix in the new format."""
        data = load_constant(self.origin)
        dense = data.dequantize() if isinstance(data, QuantizedTensor) else data
        return quantize_rtn(dense, self.format)


def requantized(graph: Graph, fmt: Format) -> Graph:
    """The graph with every matrix rounded to nearest in ``fmt``; vectors stay as they are."""
    result = graph.copy()
    for name, data in graph.constants.items():
        if len(constant_shape(data)) == 2 and graph.values[name].dtype != fmt.name:
            result.constants[name] = Rounded(data, fmt)
            result.values[name] = replace(graph.values[name], dtype=fmt.name)
    return result


__all__ = ["Rounded", "Value", "requantized"]
