"""The verifier: what must hold of every graph. It runs on the frontend's and after every pass."""

from __future__ import annotations

import numpy as np

from qigen.errors import BadInput
from qigen.formats.tensor import QuantizedTensor, check_columns
from qigen.ir import schema
from qigen.ir.graph import Graph, Node, State, constant_format, constant_shape
from qigen.ir.types import TYPES

_DTYPES = (*TYPES, "kv")


def verify(graph: Graph) -> list[str]:
    """Check a graph; return the names of dead values (results and constants that nobody reads).

    Raises BadInput or Unsupported, naming the node, value or state, unless: every value is defined
    once and before it is used; every operator is known and has the attributes of its schema in
    their types; shapes and data types are those that the shape rules give; constants have the
    shapes that their formats allow; and every state is written once, before its attention reads it.
    """
    _check_boundary(graph)
    _check_constants(graph)
    _check_nodes(graph)
    _check_states(graph)
    read = {name for node in graph.nodes for name in node.inputs} | set(graph.outputs)
    defined = [*graph.constants, *(out for node in graph.nodes for out in node.outputs if out)]
    return [name for name in defined if name not in read]


def _check_boundary(graph: Graph) -> None:
    for name, value in graph.values.items():
        if value.name != name:
            raise BadInput(f"the table of values knows it as '{name}'", value.name)
        if any((d < 0) if isinstance(d, int) else not d for d in value.shape):
            raise BadInput(f"{value} has an impossible dimension", name)
    for name in graph.inputs:
        value = graph.value(name, graph.name)
        if value.dtype not in _DTYPES:
            raise BadInput(f"graph input {value} must be one of {', '.join(_DTYPES)}", name)
    if len(set(graph.inputs)) != len(graph.inputs):
        raise BadInput("a graph input is listed twice", graph.name)
    if not graph.outputs:
        raise BadInput("the graph has no output", graph.name)
    if len(set(graph.outputs)) != len(graph.outputs):
        raise BadInput("a graph output is listed twice", graph.name)


def _check_constants(graph: Graph) -> None:
    for name, data in graph.constants.items():
        value = graph.value(name, graph.name)
        shape = constant_shape(data)
        if value.shape != shape or value.dtype != constant_format(data):
            raise BadInput(
                f"constant {value} does not say what it is: {constant_format(data)}{list(shape)}",
                name,
            )
        if isinstance(data, np.ndarray):
            continue
        if 0 in shape or len(shape) not in (1, 2):
            raise BadInput(f"a constant has 1 or 2 dimensions, not the shape {list(shape)}", name)
        try:
            check_columns(data.format, shape[-1])
        except BadInput as error:
            raise BadInput(error.message, name) from error
        if not isinstance(data, QuantizedTensor):
            continue
        blocks = -(-shape[1] // data.format.block)
        for field in data.format.fields:
            array = data.fields.get(field.name)
            wanted = field.shape(shape[0], blocks)
            if array is None or array.shape != wanted:
                raise BadInput(
                    f"field '{field.name}' of {value} must have the shape {list(wanted)}", name
                )


def _check_nodes(graph: Graph) -> None:
    defined = {*graph.inputs, *graph.constants}
    if len(defined) != len(graph.inputs) + len(graph.constants):
        raise BadInput("a graph input and a constant share a name", graph.name)
    names: set[str] = set()
    for node in graph.nodes:
        if node.name in names:
            raise BadInput("two nodes have this name", node.name)
        names.add(node.name)
        operator = schema.operator(node.op, node.name)
        for name in node.inputs:
            if name and name not in defined:
                raise BadInput(f"input '{name}' is not defined before it is used", node.name)
        complete = operator.complete(node, node.attrs)
        for attr in operator.attrs:
            given, wanted = node.attrs.get(attr.name), complete[attr.name]
            if type(given) is not type(wanted) or given != wanted:
                raise BadInput(
                    f"attribute {attr.name} is {given!r}; its schema asks for {wanted!r}", node.name
                )
        for result in schema.infer(node, graph):
            if not result.name:
                continue
            if result.name in defined:
                raise BadInput(f"output '{result.name}' is defined a second time", node.name)
            stored = graph.value(result.name, node.name)
            if stored != result:
                raise BadInput(f"output {stored} should be {result}", node.name)
            defined.add(result.name)
    for name in graph.outputs:
        if name not in defined or name in graph.constants:
            raise BadInput(f"graph output '{name}' is not computed", graph.name)
    for name in graph.values:
        if name not in defined:
            raise BadInput("no node makes this value", name)


def _check_states(graph: Graph) -> None:
    writers: dict[str, list[Node]] = {name: [] for name in graph.states}
    readers: dict[str, list[Node]] = {name: [] for name in graph.states}
    producers = graph.producers()
    for node in graph.nodes:
        name = node.attrs.get("state")
        if name is None:
            continue
        if schema.operator(node.op, node.name).effect:
            writers[name].append(node)
        if node.op != "KVAppend":
            readers[name].append(node)
        if node.op == "Attention":
            writer = producers.get(node.inputs[1])
            if writer is None or writer.attrs.get("state") != name:
                raise BadInput(f"its cache input does not write state '{name}'", node.name)
    for name, state in graph.states.items():
        _check_state(name, state)
        if len(writers[name]) != 1 or not readers[name]:
            found = ", ".join(n.name for n in writers[name]) or "none"
            raise BadInput(
                f"a state needs one node that writes it and one that reads it; writers: {found}",
                name,
            )


def _check_state(name: str, state: State) -> None:
    if state.name != name or state.kind != "kv" or state.n_kv_heads < 1 or state.head_dim < 1:
        raise BadInput(f"{state} is no key/value cache of at least one head", name)
