"""What one ONNX node becomes: names, constants, attributes, and what is computed at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from qigen.errors import BadInput, QigenError, Unsupported
from qigen.ir import ops, schema, types  # noqa: F401  (importing ops registers the operators)
from qigen.ir.dims import Sym, product, whole
from qigen.ir.graph import Array, Graph, Node
from qigen.ir.tensor import MAX_FOLDED_BYTES, Known, TensorOp, known

CODES = ("i8", "u8", "i4", "u4", "i2", "u2")
"""Weights in these types are kept as they are: what turns them into floats is not computed."""


@dataclass
class Scope:
    """Names of one (sub)graph: ONNX value name -> name of the value in our graph."""

    names: dict[str, str]
    prefix: str = ""
    opsets: Mapping[str, int] = field(default_factory=dict)


class Builder:
    """A graph of ours that grows by one node of ONNX after the other.

    ``scope`` of the methods says what the names of the (sub)graph at hand stand for.
    """

    def __init__(self, name: str) -> None:
        self.graph = Graph(name)
        self.taken: set[str] = set()
        self.node_names: set[str] = set()

    # -- names and constants ----------------------------------------------------------------------

    def name(self, name: str, taken: set[str] | None = None) -> str:
        """``name``, or with a number behind it if it is taken (default: by a value)."""
        taken = self.taken if taken is None else taken
        own, n = name, 1
        while own in taken:
            own, n = f"{name}_{n}", n + 1
        taken.add(own)
        return own

    def operand(self, scope: Scope, name: str, proto: onnx.NodeProto) -> str:
        if not name:
            return ""
        if name not in scope.names:
            raise BadInput(f"input '{name}' is defined nowhere before it", label(proto))
        return scope.names[name]

    def initializer(self, scope: Scope, tensor: onnx.TensorProto) -> None:
        self.constant(scope, tensor.name, self.array(tensor, f"tensor {tensor.name}"))

    def array(self, tensor: onnx.TensorProto, where: str) -> Array:
        types.of_onnx(tensor.data_type, where)
        try:
            return np.asarray(numpy_helper.to_array(tensor))
        except Exception as error:  # ValueError, TypeError, struct.error: whatever is damaged
            raise BadInput(f"its data does not fit its shape or type ({error})", where) from None

    def constant(self, scope: Scope, name: str, data: Array) -> str:
        own = self.name(scope.prefix + name)
        self.graph.add_constant(own, np.ascontiguousarray(data).reshape(data.shape))
        scope.names[name] = own
        return own

    def attributes(self, proto: onnx.NodeProto) -> dict[str, Any]:
        attrs: dict[str, Any] = {}
        for attribute in proto.attribute:
            kind = attribute.type
            A = onnx.AttributeProto
            if kind in (A.FLOAT, A.INT):
                attrs[attribute.name] = onnx.helper.get_attribute_value(attribute)
            elif kind == A.STRING:
                attrs[attribute.name] = attribute.s.decode("utf-8", "replace")
            elif kind in (A.INTS, A.FLOATS):
                attrs[attribute.name] = tuple(onnx.helper.get_attribute_value(attribute))
            elif kind == A.STRINGS:
                attrs[attribute.name] = tuple(
                    s.decode("utf-8", "replace") for s in attribute.strings
                )
            elif kind == A.TENSOR:
                attrs[attribute.name] = self.array(attribute.t, label(proto))
            else:
                raise Unsupported(
                    f"{proto.op_type} with the attribute {attribute.name} "
                    f"(a {A.AttributeType.Name(kind)}) is not supported",
                    label(proto),
                )
        return attrs

    def constant_node(self, scope: Scope, proto: onnx.NodeProto) -> None:
        if len(proto.attribute) != 1 or len(proto.output) != 1:
            raise BadInput("a Constant has one attribute and one output", label(proto))
        attribute = proto.attribute[0]
        name = attribute.name
        if name == "value":
            data = self.array(attribute.t, label(proto))
        elif name in ("value_int", "value_ints"):
            data = np.array(onnx.helper.get_attribute_value(attribute), np.int64)
        elif name in ("value_float", "value_floats"):
            data = np.array(onnx.helper.get_attribute_value(attribute), np.float32)
        elif name == "sparse_value":
            data = dense(attribute.sparse_tensor, label(proto))
        else:
            raise Unsupported("constants of strings are not supported", label(proto))
        self.constant(scope, proto.output[0], data)

    # -- nodes ------------------------------------------------------------------------------------

    def add(
        self,
        scope: Scope,
        operator: TensorOp,
        proto: onnx.NodeProto,
        inputs: list[str],
        outputs: list[str],
        attrs: dict[str, Any],
    ) -> None:
        graph = self.graph
        label = proto.name or (outputs[0] if outputs else proto.op_type)
        for index, attr in operator.parameters.items():
            name = inputs[index] if index < len(inputs) else ""
            integers = known(graph, name)
            if integers is not None:
                attrs[attr] = tuple(integers.reshape(-1).tolist())
                inputs[index] = ""
        while inputs and not inputs[-1]:
            inputs.pop()
        own = [self.name(scope.prefix + name) if name else "" for name in outputs]
        own += [""] * (operator.results - len(own))
        for i in range(operator.results):
            own[i] = own[i] or self.name(f"{scope.prefix}{label}/result{i}")
        outputs = outputs + [""] * (len(own) - len(outputs))
        node = Node(operator.name, self.name(scope.prefix + label, self.node_names), inputs, own)
        node.attrs = operator.complete(node, attrs)
        scope.names.update({n: o for n, o in zip(outputs, own, strict=True) if n})
        for name, o in zip(outputs, own, strict=True):
            if name in graph.declared and o != name:
                graph.declared[o] = graph.declared[name]
        folded = self._folded(operator, node)
        if folded is not None:
            for name, array in zip(own, folded, strict=True):
                if name:
                    graph.add_constant(name, array)
            return
        results = schema.infer(node, graph)
        for value in results:
            if value.name:
                graph._add_value(value)
        graph.nodes.append(node)
        given = [known(graph, name) for name in node.inputs]
        for name, found in zip(own, operator.values(node, graph, given), strict=False):
            if name and found is not None:
                self._record(node, name, np.asarray(found, object))

    def add_raw(self, op: str, inputs: list[str], attrs: dict[str, Any], stem: str) -> str:
        """The result of a node of ours."""
        operator = schema.operator(op)
        assert isinstance(operator, TensorOp)
        inner = Scope({})
        self.add(inner, operator, onnx.helper.make_node(op, [], [stem]), inputs, [stem], attrs)
        return inner.names[stem]

    def _record(self, node: Node, name: str, found: Known) -> None:
        """Remember the integers of a value; if all are numbers, it becomes a constant."""
        graph = self.graph
        value = graph.values[name]
        if any(isinstance(v, Sym) for v in found.reshape(-1)):
            graph.known[name] = found
            return
        if len([o for o in node.outputs if o]) != 1:
            graph.known[name] = found
            return
        graph.nodes.remove(node)
        del graph.values[name]
        graph.add_constant(name, found.astype(types.TYPES[value.dtype].numpy))

    def _folded(self, operator: TensorOp, node: Node) -> list[Array] | None:
        """The results of a node whose inputs are constants; None if it must run."""
        graph = self.graph
        names = [name for name in node.inputs if name]
        arrays = [graph.constants.get(name) for name in names]
        if not operator.fold or any(not isinstance(a, np.ndarray) for a in arrays):
            return None
        if operator.name == "onnx.DequantizeLinear":
            return None  # weights keep their codes until the passes have seen them
        if not names and not node.attrs:
            return None
        if any(isinstance(v, Sym) for a in node.attrs.values() if isinstance(a, tuple) for v in a):
            return None
        plain = [a for a in arrays if isinstance(a, np.ndarray)]
        if any(types.of_array(a).name in CODES and a.size > 256 for a in plain):
            return None  # weights keep their codes
        if sum(a.nbytes for a in plain) > MAX_FOLDED_BYTES:
            return None
        trial = schema.infer(node, graph)
        shapes = [v.shape for v in trial]
        if any(isinstance(d, Sym) for s in shapes for d in s):
            return None
        size = sum(whole(product(s)) for s in shapes)
        if 8 * size > MAX_FOLDED_BYTES:
            return None
        by_name = dict(zip(names, plain, strict=True))
        inputs = [by_name[n] if n else np.zeros(0) for n in node.inputs]
        try:
            with np.errstate(all="ignore"):
                results = operator.reference(node, inputs, _NoEvaluation())
        except QigenError:
            raise
        except Exception:
            return None  # the reference does not know this case: the kernel decides
        out: list[Array] = []
        for value, array in zip(trial, results, strict=False):
            if not value.name:
                out.append(np.zeros(0))
                continue
            array = np.asarray(array, types.TYPES[value.dtype].numpy)
            if array.shape != value.shape:
                return None
            out.append(np.ascontiguousarray(array).reshape(array.shape))
        return out


class _NoEvaluation:
    """Tensor operators ask nothing of an interpreter."""

    dtype = np.dtype(np.float32)

    def matmul(self, x: Array, weight: str) -> Array:
        raise Unsupported("there is no interpreter")

    def gather(self, table: str, rows: Array) -> Array:
        raise Unsupported("there is no interpreter")

    def vector(self, name: str) -> Array:
        raise Unsupported("there is no interpreter")

    def kv(self, state: str) -> Any:
        raise Unsupported("there is no interpreter")


def label(proto: onnx.NodeProto) -> str:
    """How errors name a node."""
    name = proto.name or (proto.output[0] if proto.output else "")
    return f"node {name} ({proto.op_type})"


def dense(sparse: onnx.SparseTensorProto, where: str) -> Array:
    """A sparse tensor as an array."""
    element = types.of_onnx(sparse.values.data_type, where)
    shape = tuple(int(size) for size in sparse.dims)
    if any(size < 0 for size in shape):
        raise BadInput("it has a negative size", where)
    if math.prod(shape) * element.bytes > MAX_FOLDED_BYTES:
        raise Unsupported(f"a sparse tensor of {math.prod(shape)} elements is not supported", where)
    try:
        values = numpy_helper.to_array(sparse.values)
        indices = numpy_helper.to_array(sparse.indices)
        out = np.zeros(shape, values.dtype)
        if (indices < 0).any():
            raise ValueError("negative indices")
        if indices.ndim == 1:
            out.reshape(-1)[indices] = values
        else:
            out[tuple(indices.T)] = values
    except Exception as error:  # ValueError, IndexError: whatever is damaged
        raise BadInput(f"its values do not fit its shape or indices ({error})", where) from None
    return out
