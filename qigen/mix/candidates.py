"""What a matrix may become, and what that costs in bytes and in time on the machine."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qigen.backends.base import Isa
from qigen.errors import QigenError, Unsupported, UsageError
from qigen.formats.algebra import Format
from qigen.formats.catalog import by_name
from qigen.ir.graph import Graph, constant_shape
from qigen.planner import Measured, Product, activations_for, call_times, packed_bytes
from qigen.quantize import methods
from qigen.quantize.rtn import check_rounding
from qigen.targets import Machine

KEEP = "keep"
"""The candidate that leaves a matrix in the format that it comes in."""

CANDIDATES: tuple[str, ...] = (
    KEEP,
    "u2g32", "u2g64", "u3g32", "u3g64", "u3g128", "u4g32", "u4g64", "u4g128", "u5g64", "u6g64",
    "u8g64", "s2g32", "s3g32", "s3g64", "s4g32", "s4g64", "s4g128", "s5g64", "s6g64", "s8g64",
    "nf3g64", "nf4g64", "nf3g64_t8", "nf4g64_t8", "lut3_channel", "lut4_channel",
)  # fmt: skip
"""The formats that are tried, unless the user names others: the families whose kernels are fast,
with the group sizes that are worth their scales."""

SLOWEST = 1.5
"""A candidate that is slower than that times a format with at least as many bits is left out: of
the same bytes the kernel makes too little."""


@dataclass(frozen=True)
class Matrix:
    """A matrix to choose for. ``uses``: how often a token is multiplied by it. ``table``: rows of
    it are looked up. ``own``: the name of the format that it comes in. ``rows``: of a model that
    has no tokens, the rows that a run multiplies by it."""

    name: str
    n: int
    k: int
    uses: int
    table: bool
    own: str
    rows: int = 1


@dataclass(frozen=True)
class Cost:
    """What a matrix costs in a format: bytes as packed, microseconds of a token (or run)."""

    bytes: int
    us: float


def matrices_of(graph: Graph) -> dict[str, Matrix]:
    """The matrices of a flat graph, in the order of their use."""
    uses: dict[str, int] = {}
    tables = set()
    for node in graph.nodes:
        for name in node.inputs:
            if name in graph.constants and len(constant_shape(graph.constants[name])) == 2:
                uses[name] = uses.get(name, 0) + (node.op == "MatMul")
                if node.op == "Embedding":
                    tables.add(name)
    return {
        name: Matrix(name, *_sizes(graph, name), count, name in tables, graph.values[name].dtype)
        for name, count in uses.items()
    }


def _sizes(graph: Graph, name: str) -> tuple[int, int]:
    n, k = constant_shape(graph.constants[name])
    return n, k


def named(names: Sequence[str]) -> tuple[str, ...]:
    """Candidates as a user names them: formats of the catalog, ``keep``, or patterns of the
    table's names (``u*``). Raises Unsupported for what is neither, UsageError for none at all."""
    found: dict[str, None] = {}
    for name in names:
        if any(c in name for c in "*?["):
            hits = [c for c in CANDIDATES if fnmatchcase(c, name)]
            if not hits:
                near = difflib.get_close_matches(name, CANDIDATES, n=2)
                raise UsageError(f"no candidate fits {name}; there are "
                                 f"{', '.join(near or CANDIDATES[1:4])} ...")
            found.update(dict.fromkeys(hits))
        else:
            found[name if name == KEEP else by_name(name).name] = None
    if not found:
        raise UsageError("there are no candidates to choose from; name some formats")
    return tuple(found)


def costs(
    matrices: Mapping[str, Matrix],
    candidates: Sequence[str],
    kept: Sequence[str],
    *,
    isa: Isa,
    machine: Machine,
    activations: str,
    threads: int,
    measured: Callable[[Sequence[Product]], Measured] | None = None,
    own: Callable[[Matrix], Cost] | None = None,
) -> dict[str, dict[str, Cost]]:
    """By matrix and candidate what it costs; matrices ``kept`` have the candidate 'keep' alone.

    ``measured`` says what is known of products better than by prediction, ``own`` what a matrix
    that is kept costs, if that is not what its format says. A format that cannot hold a matrix is
    no candidate of it; Unsupported if none is left.
    """
    result: dict[str, dict[str, Cost]] = {name: {} for name in matrices}
    rows = {m.rows for m in matrices.values()}
    shapes: dict[tuple[int, int], int] = {}
    for m in matrices.values():
        shapes[m.n, m.k] = shapes.get((m.n, m.k), 0) + m.uses

    def price(names: Sequence[str], fmt: Format, label: str) -> None:
        some = {(matrices[name].n, matrices[name].k) for name in names}
        products = [Product(fmt, n, k, uses) for (n, k), uses in shapes.items() if (n, k) in some]
        known = measured(products) if measured else None
        times = call_times(products, rows, isa, machine, activations, threads, known)
        for name in names:
            m = matrices[name]
            product = Product(fmt, m.n, m.k, m.uses)
            result[name][label] = Cost(packed_bytes(product), m.uses * times[product.key, m.rows])

    for candidate in dict.fromkeys(c for c in candidates if c != KEEP):
        fmt = by_name(candidate)
        try:
            activations_for(fmt, activations)
            fitting = [n for n in matrices if n not in kept and _holds(fmt, matrices[n])]
            price(fitting, fmt, candidate)
        except Unsupported:
            continue  # no kernel for this arithmetic
    stays = [n for n in matrices if n in kept or KEEP in candidates]
    if own is not None:
        for name in stays:
            result[name][KEEP] = own(matrices[name])
    else:
        for fmt_name in dict.fromkeys(matrices[n].own for n in stays):
            price([n for n in stays if matrices[n].own == fmt_name], by_name(fmt_name), KEEP)
    for name, options in result.items():
        if not options:
            raise Unsupported("none of the candidates can hold this matrix; name others", name)
        result[name] = _fast(options)
    return result


def method_of(text: str) -> methods.Method:
    """The method that brings single matrices to formats. Raises as
    :func:`qigen.quantize.methods.parse` does, and Unsupported for methods that change the whole
    model first: formats are chosen for the matrices as they are."""
    steps = methods.parse(text)
    row = methods.by_name(steps[-1][0])
    if len(steps) > 1 or row.prepare is not None:
        raise Unsupported(f"formats cannot be chosen together with what {text} does to the whole "
                          "model first; take rtn, clip or gptq")
    return row


def _holds(fmt: Format, m: Matrix) -> bool:
    try:
        check_rounding(fmt, m.k)
    except QigenError:
        return False
    return True


def _fast(options: dict[str, Cost]) -> dict[str, Cost]:
    """Without those whose kernels are slow for their bytes."""
    return {
        label: cost for label, cost in options.items() if label == KEEP or not any(
            other.bytes >= cost.bytes and other.us * SLOWEST < cost.us
            for name, other in options.items() if name != KEEP)
    }
