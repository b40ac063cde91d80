"""Operator schemas: inputs, attributes, shape rule and numpy reference in one class an operator.

The classes are in :mod:`qigen.ir.ops`, one file a family, and register themselves with
:func:`register`. This module is what they and the graph share.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, Unsupported
from qigen.ir import dims

if TYPE_CHECKING:
    from qigen.ir.graph import Graph, Node, Shape, Value

Array = npt.NDArray[Any]

REQUIRED: Any = object()
"""Default of an attribute that must be given."""

FLOAT_DTYPES = ("f32", "f16", "f64", "bf16")
"""Formats of constants that are used as vectors (norm weights, biases, frequency factors)."""


@dataclass(frozen=True)
class Attr:
    """An attribute: its Python type, default, and the values it may take."""

    name: str
    type: type
    default: Any = REQUIRED
    choices: tuple[Any, ...] | None = None
    minimum: float | None = None
    doc: str = ""

    def check(self, value: Any, where: str) -> Any:
        """``value`` as this attribute's type; BadInput if it is not of it or out of range."""
        number = isinstance(value, (int, float, np.integer, np.floating))
        if self.type is bool:
            fits = isinstance(value, (bool, np.bool_))
        elif self.type is int:
            fits = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        elif self.type is float:
            fits = number and not isinstance(value, bool) and math.isfinite(float(value))
        elif self.type is tuple:
            fits = isinstance(value, (tuple, list))
        else:
            fits = isinstance(value, self.type)
        if not fits:
            raise BadInput(
                f"attribute {self.name} must be a {self.type.__name__}, not {value!r}", where
            )
        value = self.type(value)
        if self.choices is not None and value not in self.choices:
            known = ", ".join(str(c) for c in self.choices)
            raise BadInput(f"attribute {self.name} is {value!r}; it can be {known}", where)
        if self.minimum is not None and value < self.minimum:
            raise BadInput(f"attribute {self.name} is {value}; the least is {self.minimum}", where)
        return value


class KvStore(Protocol):
    """The cache of one attention layer while a graph is interpreted."""

    def append(self, positions: Array, k: Array, v: Array) -> None:
        """Store keys and values ``[T, n_kv_heads * head_dim]`` at ``positions [T]``."""

    def sealed(self, positions: Array) -> Array:
        """int64 ``[T]``: blocks of the cache that a query at each position sees rounded."""

    def read(self, stop: int, sealed: int = 0) -> tuple[Array, Array]:
        """Keys and values ``[stop, n_kv_heads, head_dim]`` of the positions below ``stop``, the
        first ``sealed`` blocks rounded."""


class Evaluation(Protocol):
    """What an operator's reference may ask of the interpreter that runs it."""

    dtype: np.dtype[Any]

    def matmul(self, x: Array, weight: str) -> Array:
        """``x [M,K]`` times the transpose of the constant ``weight [N,K]``."""

    def gather(self, table: str, rows: Array) -> Array:
        """Rows of the constant ``table [V,d]``, dequantized: ``[len(rows), d]``."""

    def vector(self, name: str) -> Array:
        """The constant ``name`` as a float array in the arithmetic's type."""

    def kv(self, state: str) -> KvStore:
        """The cache of ``state``."""


class Operator(ABC):
    """Base of all operators. A subclass is a table row: it has no instances with state."""

    name: ClassVar[str]
    attrs: ClassVar[tuple[Attr, ...]] = ()
    inputs: ClassVar[str]
    """The inputs in order, for people: ``"x[T,K], W[N,K] constant, bias[N] constant?"``."""
    fused: ClassVar[bool] = False
    """Made by the passes, never by a frontend."""
    effect: ClassVar[bool] = False
    """Writes a state, so it stays even when nobody reads its result."""
    rowwise: ClassVar[bool] = False
    """Inputs are f32 matrices and constants; row i of the former decides row i of the result."""

    def complete(self, node: Node, given: Mapping[str, Any]) -> dict[str, Any]:
        """``given`` checked, with the defaults filled in, in the order of the schema."""
        known = {a.name: a for a in self.attrs}
        for name in given:
            if name not in known:
                raise BadInput(f"{self.name} has no attribute '{name}'", node.name)
        result: dict[str, Any] = {}
        for attr in self.attrs:
            if attr.name not in given and attr.default is REQUIRED:
                raise BadInput(f"{self.name} needs the attribute '{attr.name}'", node.name)
            value = given.get(attr.name, attr.default)
            # None is an attribute that is not there, where the schema allows that
            absent = value is None and attr.default is None
            result[attr.name] = None if absent else attr.check(value, node.name)
        return result

    def n_outputs(self, node: Node) -> int:
        """Number of results of a node with these attributes."""
        return 1

    @abstractmethod
    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        """Shape and data type of every output. Raises BadInput where the inputs do not fit."""

    @abstractmethod
    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        """The results by numpy.

        ``inputs`` has one array an input; that of a constant is empty, because quantized constants
        are used through ``ev.matmul``, ``ev.gather`` and ``ev.vector``.
        """


_REGISTRY: dict[str, Operator] = {}
_Class = TypeVar("_Class", bound=type[Operator])


def register(cls: _Class) -> _Class:
    """Class decorator: make an operator known under its ``name``."""
    if cls.name in _REGISTRY:
        raise ValueError(f"operator {cls.name} is registered twice")
    _REGISTRY[cls.name] = cls()
    return cls


def operators() -> dict[str, Operator]:
    """All operators by name."""
    return dict(_REGISTRY)


def operator(name: str, where: str = "") -> Operator:
    """The operator called ``name``; Unsupported with the nearest names if there is none."""
    found = _REGISTRY.get(name)
    if found is None:
        near = difflib.get_close_matches(name, _REGISTRY, n=3) or sorted(_REGISTRY)
        raise Unsupported(f"operator '{name}' is not known; did you mean {', '.join(near)}?", where)
    return found


def infer(node: Node, graph: Graph) -> list[Value]:
    """The output values of ``node``, named after ``node.outputs``."""
    from qigen.ir.graph import Value

    op = operator(node.op, node.name)
    count = op.n_outputs(node)
    if len(node.outputs) != count:
        raise BadInput(f"{node.op} makes {count} outputs, not {len(node.outputs)}", node.name)
    results = op.infer(node, graph)
    return [
        Value(name, shape, dtype)
        for name, (shape, dtype) in zip(node.outputs, results, strict=True)
    ]


# -- helpers of the shape rules -------------------------------------------------------------------


def arity(node: Node, least: int, most: int | None = None) -> None:
    """BadInput unless the node has between ``least`` and ``most`` (default: the same) inputs."""
    most = least if most is None else most
    if not least <= len(node.inputs) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise BadInput(f"{node.op} takes {wanted} inputs, not {len(node.inputs)}", node.name)


def activation(node: Node, graph: Graph, index: int, rank: int, dtype: str = "f32") -> Shape:
    """Shape of an input that is no constant, of the given rank and type."""
    value = graph.value(node.inputs[index], node.name)
    if graph.is_constant(value.name):
        raise BadInput(f"input {value} is a constant; it must be computed", node.name)
    if value.dtype != dtype or len(value.shape) != rank:
        raise BadInput(f"input {value} must be {dtype} of rank {rank}", node.name)
    return value.shape


def vector(node: Node, graph: Graph, index: int, length: int) -> None:
    """BadInput unless an input is a float constant of shape ``[length]``."""
    value = graph.value(node.inputs[index], node.name)
    if not graph.is_constant(value.name) or value.dtype not in FLOAT_DTYPES:
        raise BadInput(f"input {value} must be a float constant", node.name)
    if value.shape != (length,):
        raise BadInput(f"constant {value} must have the shape [{length}]", node.name)


def matrix(node: Node, graph: Graph, index: int, columns: int | None = None) -> tuple[int, int]:
    """Shape ``(N, K)`` of an input that is a constant matrix, K equal to ``columns`` if given."""
    value = graph.value(node.inputs[index], node.name)
    if not graph.is_constant(value.name) or len(value.shape) != 2:
        raise BadInput(f"input {value} must be a constant matrix", node.name)
    n, k = (dims.whole(d) for d in value.shape)
    if columns is not None and k != columns:
        raise BadInput(f"constant {value} must have {columns} columns", node.name)
    return n, k


def width(node: Node, shape: Shape) -> int:
    """The last dimension, which has to be a number."""
    if not isinstance(shape[-1], int):
        raise BadInput(f"the last dimension of an input is symbolic ({shape[-1]})", node.name)
    return shape[-1]
