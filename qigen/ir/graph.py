"""The graph: values, nodes, constants and states of one model step.

A :class:`Graph` describes one *step* of a model: ``T`` tokens go in, the logits of ``R`` rows come
out. It is in static single assignment form, its nodes are stored in execution order, and dimensions
that are known only at run time are strings (``"T"``, ``"R"``). What outlives a step (the key/value
cache) is a :class:`State`.

Data types of values: those of :mod:`qigen.ir.types` for activations (language models have ``"f32"``
and ``"i32"``), ``"kv"`` for the token that orders an attention node behind the cache write it
depends on. The value of a constant has the name of its format (``"f32"``, ``"q4_k"``, ``"u4g128"``,
...) as its data type. An input or output of a node called ``""`` is absent.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput
from qigen.formats.algebra import Format
from qigen.formats.tensor import QuantizedTensor
from qigen.ir import schema, types
from qigen.ir.dims import Sym

Array: TypeAlias = npt.NDArray[Any]
_NO_IDENTIFIER = re.compile(r"\W", re.ASCII)

Dim: TypeAlias = int | str | Sym
Shape: TypeAlias = tuple[Dim, ...]


class LazyConstant(Protocol):
    """A constant that stays in its file until somebody needs it.

    ``shape`` is ``(N, K)`` (or ``(N,)`` for a vector), ``format`` the catalog row of its codes;
    ``load`` reads it and returns the same as an eager constant would be. A handle of dense float32
    data may return a plain array from ``load``.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def format(self) -> Format: ...

    def load(self) -> Array | QuantizedTensor: ...


Constant: TypeAlias = npt.NDArray[Any] | QuantizedTensor | LazyConstant


def constant_format(data: Constant) -> str:
    """Name of the format of a constant; for a plain array the name of its numpy type."""
    if isinstance(data, np.ndarray):
        return types.of_array(data).name
    return data.format.name


def constant_shape(data: Constant) -> tuple[int, ...]:
    """Shape of a constant, in weights."""
    return tuple(int(d) for d in data.shape)


def constant_bytes(data: Constant) -> int:
    """Bytes of a constant in its own codes, without padding of rows or lanes."""
    if isinstance(data, np.ndarray):
        return int(data.nbytes)
    shape = constant_shape(data)
    blocks = -(-shape[-1] // data.format.block)
    for n in shape[:-1]:
        blocks *= n
    return blocks * data.format.block_bytes


@dataclass(frozen=True)
class Value:
    """An edge of the graph: the result of one node, a graph input, or a constant."""

    name: str
    shape: Shape
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{','.join(str(d) for d in self.shape)}]"


@dataclass(frozen=True)
class State:
    """Memory that outlives a step. ``kind`` is ``"kv"``: the cache of one attention layer.

    A position of it holds a key and a value, each ``n_kv_heads * head_dim`` numbers.
    """

    name: str
    kind: str = "kv"
    n_kv_heads: int = 0
    head_dim: int = 0


@dataclass
class Node:
    """One operation. ``layer`` is the transformer layer it belongs to, None outside of them."""

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any] = field(default_factory=dict)
    layer: int | None = None

    @property
    def output(self) -> str:
        """The only output; an error if there are several."""
        if len(self.outputs) != 1:
            raise BadInput(f"{self.op} has {len(self.outputs)} outputs, not one", self.name)
        return self.outputs[0]


@dataclass
class Graph:
    """One step of a model. ``nodes`` is the execution order; see the module docstring."""

    name: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    known: dict[str, Array] = field(default_factory=dict)
    """Integers of small tensors that follow from sizes: object arrays of int and Sym."""
    declared: dict[str, Shape] = field(default_factory=dict)
    """Shapes that a model declares for values, sizes that it leaves open as -1."""

    # -- building ---------------------------------------------------------------------------------

    def _add_value(self, value: Value) -> None:
        if value.name in self.values:
            raise BadInput("the name is taken; every value needs its own", value.name)
        self.values[value.name] = value

    def add_input(self, name: str, shape: Sequence[Dim], dtype: str) -> str:
        """Declare a graph input and return its name."""
        self._add_value(Value(name, tuple(shape), dtype))
        self.inputs.append(name)
        return name

    def add_constant(self, name: str, data: Constant) -> str:
        """Add a constant and return its name. Its value's data type is the format's name."""
        self._add_value(Value(name, constant_shape(data), constant_format(data)))
        self.constants[name] = data
        return name

    def add_state(self, state: State) -> str:
        """Add a state and return its name."""
        if state.name in self.states:
            raise BadInput("the state exists already", state.name)
        self.states[state.name] = state
        return state.name

    def add_node(
        self,
        op: str,
        inputs: Sequence[str],
        attrs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        layer: int | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Node:
        """Append a node: attributes get their defaults, output shapes are inferred.

        ``name`` defaults to ``<op>_<index>``; an only output has the node's name unless
        ``outputs`` says otherwise, several are ``<name>.0``, ``<name>.1``, ... Returns the node;
        ``add`` is the shorter form for operators with one output. Raises BadInput for wrong inputs
        or attributes and Unsupported for an unknown operator.
        """
        operator = schema.operator(op, where=name or "")
        node = Node(op, name or f"{op.lower()}_{len(self.nodes)}", list(inputs), [], {}, layer)
        node.attrs = operator.complete(node, attrs or {})
        count = operator.n_outputs(node)
        if outputs is not None:
            node.outputs = list(outputs)
        elif count == 1:
            node.outputs = [node.name]
        else:
            node.outputs = [f"{node.name}.{i}" for i in range(count)]
        for value in schema.infer(node, self):
            if value.name:
                self._add_value(value)
        self.nodes.append(node)
        return node

    def add(
        self,
        op: str,
        *inputs: str,
        name: str | None = None,
        layer: int | None = None,
        **attrs: Any,
    ) -> str:
        """Append a node with one output and return the name of that output."""
        return self.add_node(op, inputs, attrs, name=name, layer=layer).output

    # -- reading ----------------------------------------------------------------------------------

    def value(self, name: str, where: str = "") -> Value:
        """The value called ``name``; BadInput if there is none."""
        found = self.values.get(name)
        if found is None:
            raise BadInput(f"value '{name}' does not exist", where)
        return found

    def is_constant(self, name: str) -> bool:
        """Whether ``name`` is a constant."""
        return name in self.constants

    def producers(self) -> dict[str, Node]:
        """Value name -> the node that makes it (graph inputs and constants have none)."""
        return {out: node for node in self.nodes for out in node.outputs}

    def consumers(self) -> dict[str, list[Node]]:
        """Value name -> the nodes that read it, once per use; every value has an entry."""
        uses: dict[str, list[Node]] = {name: [] for name in self.values}
        for node in self.nodes:
            for name in node.inputs:
                if name:
                    uses.setdefault(name, []).append(node)
        return uses

    def constant_bytes(self, name: str) -> int:
        """Bytes of one constant in its own codes."""
        return constant_bytes(self.constants[name])

    def weight_bytes(self) -> int:
        """Bytes of all constants together."""
        return sum(constant_bytes(data) for data in self.constants.values())

    def parameters(self) -> int:
        """Number of weights in all constants together."""
        return sum(int(np.prod(constant_shape(data))) for data in self.constants.values())

    def kv_elements_per_position(self) -> int:
        """Numbers a position takes in all key/value caches together (keys and values)."""
        return sum(2 * s.n_kv_heads * s.head_dim for s in self.states.values())

    # -- transforming -----------------------------------------------------------------------------

    def copy(self) -> Graph:
        """A copy whose nodes, values and maps may be changed; the constants' data are shared."""
        return Graph(
            self.name,
            list(self.inputs),
            list(self.outputs),
            dict(self.values),
            dict(self.constants),
            dict(self.states),
            [
                dataclasses.replace(
                    n, inputs=list(n.inputs), outputs=list(n.outputs), attrs=dict(n.attrs)
                )
                for n in self.nodes
            ],
            dict(self.meta),
            dict(self.known),
            dict(self.declared),
        )

    def rebuilt(self, nodes: Iterable[Node]) -> Graph:
        """A graph of ``nodes``, in that order, with this one's inputs, outputs and constants.

        All result values are inferred anew, nodes whose results nobody needs are dropped, and so
        are constants and states that no node names. The passes end with it.
        """
        kept: list[Node] = []
        needed = set(self.outputs)
        sizes: set[str] = set()  # names of sizes that what is kept has
        for node in reversed(list(nodes)):
            if (
                needed.intersection(filter(None, node.outputs))
                or schema.operator(node.op, node.name).effect
                or sizes.intersection(self._measured(node))
            ):
                kept.append(node)
                needed.update(node.inputs)
                sizes |= self._sizes(node)
        result = Graph(
            self.name,
            list(self.inputs),
            list(self.outputs),
            meta=dict(self.meta),
            known=dict(self.known),
            declared=dict(self.declared),
        )
        for name in self.inputs:
            result.values[name] = self.values[name]
        for name, data in self.constants.items():
            if name in needed:
                result.values[name] = self.values[name]
                result.constants[name] = data
        states = {n.attrs["state"] for n in kept if "state" in n.attrs}
        result.states = {name: s for name, s in self.states.items() if name in states}
        for node in reversed(kept):
            for value in schema.infer(node, result):
                if value.name:
                    result._add_value(value)
            result.nodes.append(node)
        return result

    def _sizes(self, node: Node) -> set[str]:
        """The names in the shapes of a node's values and in its attributes."""
        shapes = [self.values[n].shape for n in (*node.inputs, *node.outputs) if n in self.values]
        shapes += [a for a in node.attrs.values() if isinstance(a, tuple)]
        return {name for shape in shapes for d in shape if isinstance(d, Sym) for name in d.names()}

    def _measured(self, node: Node) -> set[str]:
        """The run-time sizes that a node finds out (qigen.ir.tensor.fresh)."""
        return {
            name
            for out in node.outputs
            if out in self.values
            for d in self.values[out].shape
            if isinstance(d, Sym)
            for name in d.names()
            if name.startswith(f"run_{re.sub(_NO_IDENTIFIER, '_', out)}_")
        }

    # -- showing ----------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A readable dump (no weights) that ``json.dumps`` accepts."""

        def show(name: str) -> str:
            v = self.values[name]
            return f"{v.dtype}[{','.join(str(d) for d in v.shape)}]"

        return {
            "name": self.name,
            "inputs": {name: show(name) for name in self.inputs},
            "outputs": {name: show(name) for name in self.outputs},
            "states": {s.name: dataclasses.asdict(s) for s in self.states.values()},
            "constants": {
                name: {
                    "shape": list(constant_shape(data)),
                    "format": constant_format(data),
                    "bytes": constant_bytes(data),
                }
                for name, data in self.constants.items()
            },
            "nodes": [
                {
                    "name": node.name,
                    "op": node.op,
                    "layer": node.layer,
                    "inputs": list(node.inputs),
                    "outputs": {name: show(name) for name in node.outputs if name},
                    "attrs": {k: _plain(v) for k, v in node.attrs.items()},
                }
                for node in self.nodes
            ],
            "meta": _plain(self.meta),
        }

    def __str__(self) -> str:
        lines = [f"graph {self.name}({', '.join(str(self.values[n]) for n in self.inputs)})"]
        for node in self.nodes:
            results = ", ".join(str(self.values[n]) for n in node.outputs if n)
            attrs = " ".join(f"{k}={v}" for k, v in node.attrs.items())
            layer = "" if node.layer is None else f"  # layer {node.layer}"
            lines.append(f"  {results} = {node.op}({', '.join(node.inputs)}) {attrs}{layer}")
        lines.append(f"  return {', '.join(self.outputs)}")
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: tuples as lists, dataclasses as objects, other things by repr."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return repr(value)


def load_constant(data: Constant) -> Array | QuantizedTensor:
    """The data of a constant: read from its file if it is lazy, else itself."""
    if isinstance(data, (np.ndarray, QuantizedTensor)):
        return data
    return data.load()
