"""Rounding of a model's matrices to one format on the way in (``--weights FORMAT``), and of their
tables to bytes (``--activations int8``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np

from qigen.errors import BadInput, QigenError, Unsupported, UsageError
from qigen.formats.algebra import Format
from qigen.formats.catalog import by_name, with_byte_table
from qigen.formats.tensor import QuantizedTensor
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


@dataclass(frozen=True)
class Relabelled:
    """The matrix ``origin`` in a row whose fields are those of its own: only values differ."""

    origin: Constant
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        return constant_shape(self.origin)

    def load(self) -> QuantizedTensor:
        """The matrix in the new row, its codes and scales as they were."""
        data = load_constant(self.origin)
        assert isinstance(data, QuantizedTensor)
        return QuantizedTensor(self.format, data.shape, data.fields)


def with_byte_tables(graph: Graph, activations: str | None) -> tuple[Graph, tuple[str, ...]]:
    """The graph for the ``activations`` that were asked for by name, and what the user is told.

    Where int8 or int4 was asked for, matrices with tables of floats get tables of bytes, which
    integer kernels look up (:func:`qigen.formats.with_byte_table`); without an asking (None) they
    keep their values and have float kernels.
    """
    if not (activations or "").startswith(("int8", "int4")):
        return graph, ()
    result, notes = graph.copy(), []
    for name, data in graph.constants.items():
        if len(constant_shape(data)) != 2:
            continue
        own = by_name(graph.values[name].dtype)
        if own.values is None:
            continue
        fmt = with_byte_table(own)
        result.constants[name] = Relabelled(data, fmt)
        result.values[name] = replace(graph.values[name], dtype=fmt.name)
        miss = np.abs(np.float32(fmt.scale_factor) * fmt.levels - own.levels).max()
        share = miss / np.abs(own.levels).max()
        note = (f"--activations {activations} rounds the table of {own.name} to bytes "
                f"({fmt.name}): entries are off by up to {share:.2%} of the greatest")
        if note not in notes:
            notes.append(note)
    return result, tuple(notes)


def chosen(graph: Graph, fmt: Format, keep: Sequence[str] = (),
           again: bool = False) -> list[str]:
    """The matrices of a graph that come to ``fmt``: all that are not in it (``again``: also those)
    and whose names none of the patterns ``keep`` (as of shells) fits. Routers stay as they are:
    they are small, and what they get wrong sends a token to another expert. UsageError for a
    pattern that fits no matrix."""
    routers = _routers(graph)
    names = [name for name, data in graph.constants.items()
             if len(constant_shape(data)) == 2 and name not in routers]
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:3])
            raise UsageError(f"no matrix is called {pattern}; there are {shown} ...")
    return [name for name in names if (again or graph.values[name].dtype != fmt.name)
            and not any(fnmatchcase(name, pattern) for pattern in keep)]


def _routers(graph: Graph) -> set[str]:
    """The matrices whose products choose experts."""
    producers = graph.producers()
    products = [producers.get(n.inputs[0]) for n in graph.nodes if n.op == "Router"]
    return {p.inputs[1] for p in products if p is not None and p.op == "MatMul"}


def requantized(graph: Graph, fmt: Format, keep: Sequence[str] = ()) -> Graph:
    """The graph with every matrix rounded to nearest in ``fmt``; vectors stay as they are, and
    matrices with a name that a pattern of ``keep`` fits.

    Raises Unsupported, naming the first matrix, if it cannot be brought to the format.
    """
    result = graph.copy()
    for name in chosen(graph, fmt, keep):
        data = graph.constants[name]
        try:
            check_rounding(fmt, constant_shape(data)[1])
        except QigenError as error:
            raise Unsupported(f"{fmt.name}: {error.message}", name) from None
        result.constants[name] = Rounded(name, data, fmt)
        result.values[name] = replace(graph.values[name], dtype=fmt.name)
    return result
