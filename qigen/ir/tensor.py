"""Operators on tensors of any rank and type: what ONNX graphs consist of.

A :class:`TensorOp` adds to the schema what such graphs need: sizes that are computed in the graph
itself (:meth:`TensorOp.values`), sizes that only the run decides (:meth:`TensorOp.measure`), and
the call of the C++ function that computes the node (:meth:`TensorOp.call`). The functions are
templates in ``templates/tensor/``; which arguments they take is data here, so the code generator
needs to know no operator.

Names: ``onnx.Conv`` is the operator of the default ONNX domain in its newest version, ``ms.*``
those of ``com.microsoft``. Names without a prefix are made by passes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, Unsupported
from qigen.ir import dims
from qigen.ir.dims import Sym
from qigen.ir.schema import Array, Evaluation, Operator
from qigen.ir.types import TYPES, ElementType

if TYPE_CHECKING:
    from qigen.ir.graph import Dim, Graph, Node, Shape, Value

Known: TypeAlias = npt.NDArray[Any]
"""Integers of a small tensor that are known when compiling: an object array of int and Sym."""

MAX_RANK = 8

MAX_FOLDED_BYTES = 256 << 20
"""Larger results of constants are left to the run."""


# -- the call of a kernel as data -----------------------------------------------------------------


@dataclass(frozen=True)
class Ref:
    """A tensor argument; an empty name is an absent tensor."""

    name: str


@dataclass(frozen=True)
class Refs:
    """A list of tensors: ``const Tensor (&xs)[N]`` in C++."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Ints:
    """A list of integers, at most 16."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Floats:
    """A list of numbers, at most 16."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class RunInts:
    """The integers that the tensor ``name`` holds at run time, at most 16; of any integer type."""

    name: str


@dataclass(frozen=True)
class Epilogue:
    """What a product reads besides x and its weights: ``Epilogue`` of call_gemm.h."""

    tensors: tuple[str, ...]  # bias, scale, zero, x_scale, x_zero
    chain: tuple[str, ...]  # at most 4
    full: tuple[int, ...]
    y_scale: float
    y_zero: int


@dataclass(frozen=True)
class Word:
    """An identifier or constant of C++, for instance an enumerator."""

    text: str


@dataclass(frozen=True)
class Problem:
    """What to report if the kernel meets bad data; the node is named before it."""

    text: str


Argument: TypeAlias = (
    Ref | Refs | Ints | Floats | RunInts | Word | Epilogue | Problem | Sym | int | float | bool
)


@dataclass(frozen=True)
class Call:
    """``function<types...>(c, args...)``; ``header`` in templates/tensor/ declares it.

    ``types`` are element types by their names here, or C++ identifiers.
    """

    header: str
    function: str
    types: tuple[str, ...]
    args: tuple[Argument, ...]


@dataclass(frozen=True)
class Alias:
    """The result is the input's memory seen with another shape."""

    source: str


# -- operators ------------------------------------------------------------------------------------


class TensorOp(Operator):
    """An operator of a tensor graph."""

    parameters: ClassVar[dict[int, str]] = {}
    """Inputs that hold integers such as axes or sizes -> the attribute that takes them once they
    are known when compiling (a tuple; the input is then absent). Use :func:`parameter` to read
    them."""
    minimum: ClassVar[int] = 1
    maximum: ClassVar[int] = 1
    """How many inputs there may be."""
    results: ClassVar[int] = 0
    """The first results that exist even if the model does not name them: the kernel needs their
    memory."""
    fold: ClassVar[bool] = True
    """Whether a node of constants may be computed when compiling."""

    def n_outputs(self, node: Node) -> int:
        """As many as the node names."""
        return max(1, len(node.outputs))

    def values(
        self, node: Node, graph: Graph, inputs: Sequence[Known | None]
    ) -> list[Known | None]:
        """Results as far as they follow from known integers; ``inputs`` has what is known."""
        return [None] * len(node.outputs)

    def measure(self, node: Node, graph: Graph) -> Call | None:
        """The call that finds the run-time sizes of the results.

        Its function takes ``int64_t* sizes`` after the context, and thread 0 alone calls it. The
        order is that of :func:`fresh_names`. None where all sizes follow from other sizes.
        """
        return None

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        """The call that computes the node."""
        raise Unsupported(f"{node.op} has no kernel", node.name)

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        """By the reference implementation that the onnx package has of the operator."""
        return onnx_reference(node, inputs)


def onnx_reference(node: Node, inputs: Sequence[Array]) -> list[Array]:
    """Run a node of the default domain by onnx.reference; parameters become inputs again."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    from qigen.ir import schema

    operator = schema.operator(node.op, node.name)
    assert isinstance(operator, TensorOp)
    domain, _, op_type = node.op.rpartition(".")
    names = [f"i{i}" if name else "" for i, name in enumerate(node.inputs)]
    pairs = zip(node.inputs, inputs, strict=False)
    feeds = {f"i{i}": a for i, (name, a) in enumerate(pairs) if name}
    attrs = dict(node.attrs)
    for index, attr in operator.parameters.items():
        given = attrs.pop(attr)
        if given is not None and (index >= len(names) or not names[index]):
            names += [""] * (index + 1 - len(names))
            names[index] = f"i{index}"
            feeds[f"i{index}"] = np.array(given, np.int64)
    attrs = {k: v for k, v in attrs.items() if v is not None and v != ()}
    outputs = [f"o{i}" if name else "" for i, name in enumerate(node.outputs)]
    proto = onnx.helper.make_node(
        op_type, names, outputs, domain={"onnx": "", "ms": "com.microsoft"}[domain], **attrs
    )
    evaluator = ReferenceEvaluator(proto, opsets={"": onnx.defs.onnx_opset_version()})
    results = iter(evaluator.run(None, feeds))
    return [np.asarray(next(results)) if name else np.zeros(0) for name in outputs]


# -- helpers of the shape rules -------------------------------------------------------------------


def check_inputs(node: Node, least: int, most: int | None = None) -> None:
    """BadInput unless the node has at least ``least`` and at most ``most`` inputs."""
    most = least if most is None else most
    given = len(node.inputs)
    absent = [i for i in range(least) if i >= given or not node.inputs[i]]
    if absent or given > most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise BadInput(f"{node.op} takes {wanted} inputs, not {given}", node.name)


def given(node: Node, index: int) -> str:
    """Name of input number ``index``; '' if it is absent."""
    return node.inputs[index] if index < len(node.inputs) else ""


def value(node: Node, graph: Graph, index: int) -> Value:
    """The value of input number ``index``; BadInput if it is absent."""
    name = given(node, index)
    if not name:
        raise BadInput(f"{node.op} needs input number {index}", node.name)
    return graph.value(name, node.name)


def shape(node: Node, graph: Graph, index: int) -> Shape:
    """The shape of input number ``index``."""
    return value(node, graph, index).shape


def element(node: Node, graph: Graph, index: int) -> ElementType:
    """The element type of input number ``index``; Unsupported for packed formats."""
    v = value(node, graph, index)
    if v.dtype not in TYPES:
        raise Unsupported(f"{node.op} cannot read {v}", node.name)
    return TYPES[v.dtype]


def require_type(node: Node, graph: Graph, index: int, allowed: Sequence[str]) -> str:
    """The type of an input by name; Unsupported if it is not one of ``allowed``."""
    t = element(node, graph, index).name
    if t not in allowed:
        raise Unsupported(
            f"{node.op} of {t} has no kernel; there are kernels for {', '.join(allowed)}", node.name
        )
    return t


def axis_of(node: Node, axis: Dim, rank: int, name: str = "axis") -> int:
    """``axis`` counted from the front; BadInput if it is out of range."""
    if not isinstance(axis, (int, np.integer)):
        raise Unsupported(f"{name} {axis} depends on the sizes of inputs", node.name)
    axis = int(axis)
    if not -rank <= axis < rank:
        raise BadInput(f"{name} {axis} is out of range for rank {rank}", node.name)
    return axis % rank if rank else 0


def constant(graph: Graph, name: str) -> Array | None:
    """The array of a plain constant, else None."""
    data = graph.constants.get(name)
    return data if isinstance(data, np.ndarray) else None


def known(graph: Graph, name: str) -> Known | None:
    """The integers of a value as far as they are known: int or Sym, as an object array."""
    if not name:
        return None
    found = graph.known.get(name)
    if found is not None:
        return found
    data = constant(graph, name)
    if data is not None and data.dtype.kind in "iub" and data.size <= 4096:
        return np.array(data, object)
    return None


def parameter(node: Node, graph: Graph, index: int, attr: str) -> tuple[Any, ...] | RunInts | None:
    """The integers of a parameter: known ones, those of a tensor at run time, or None (absent)."""
    if node.attrs.get(attr) is not None:
        return tuple(node.attrs[attr])
    name = given(node, index)
    return RunInts(name) if name else None


def argument(value: tuple[Any, ...] | RunInts | None) -> Argument:
    """A parameter as an argument of a call; an absent one is an empty list."""
    return value if isinstance(value, RunInts) else Ints(tuple(value or ()))


def broadcast(node: Node, *shapes: Shape) -> Shape:
    """The shape of operands that are broadcast to each other; BadInput if they do not fit."""
    rank = max(len(s) for s in shapes)
    result: list[Dim] = []
    for axis in range(rank):
        size: Dim = 1
        for s in shapes:
            at = axis - rank + len(s)
            d = s[at] if at >= 0 else 1
            if d == size or d == 1:
                continue
            if size == 1:
                size = d
            elif isinstance(d, Sym) or isinstance(size, Sym):
                # a size that is known and not 1 must be the result's
                size = (
                    d if isinstance(d, int) else size if isinstance(size, int) else _larger(size, d)
                )
            else:
                text = ", ".join(show(s) for s in shapes)
                raise BadInput(f"shapes {text} cannot be broadcast together", node.name)
        result.append(size)
    return tuple(result)


def _larger(a: Any, b: Any) -> Dim:
    result: Dim = dims.call("max", a, b)
    return result


def show(shape: Shape) -> str:
    """E.g. ``[1, 3, height, 640]``."""
    return f"[{', '.join(str(d) for d in shape)}]"


def fresh(node: Node, output: int, axis: int) -> Sym:
    """The symbol of a size that only the run decides."""
    name = re.sub(r"\W", "_", node.outputs[output], flags=re.ASCII)
    return Sym.named(f"run_{name}_{axis}")


def fresh_shape(node: Node, output: int, rank: int) -> Shape:
    """A shape of which the run decides every size."""
    return tuple(fresh(node, output, axis) for axis in range(rank))


def fresh_names(node: Node, graph: Graph) -> list[str]:
    """The run-time sizes of a node's results, in the order in which ``measure`` finds them."""
    names: list[str] = []
    for output, name in enumerate(node.outputs):
        if name:
            for axis, d in enumerate(graph.values[name].shape):
                symbol = fresh(node, output, axis)
                if isinstance(d, Sym) and str(symbol) in d.names():
                    names.append(str(symbol))
    return names


def declared_rank(node: Node, graph: Graph, output: int = 0) -> int:
    """The rank that the model declares for a result whose rank the run would decide."""
    shape = graph.declared.get(node.outputs[output])
    if shape is None:
        raise Unsupported(
            f"the rank of its output depends on data; give {node.op} constant parameters, or "
            "declare the output's shape in the model",
            node.name,
        )
    return len(shape)


def kernel(
    node: Node,
    header: str,
    function: str,
    types: Sequence[str] = (),
    *attributes: Argument,
    inputs: Sequence[int] | None = None,
) -> Call:
    """The usual call: outputs, inputs (those in ``inputs``, else all), then attributes."""
    chosen = range(len(node.inputs)) if inputs is None else inputs
    tensors = [Ref(name) for name in node.outputs] + [Ref(given(node, i)) for i in chosen]
    return Call(header, function, tuple(types), (*tensors, *attributes))
