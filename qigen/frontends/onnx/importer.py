"""ONNX graphs to ours: names, types, sizes; constants and known sizes are computed on the way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from qigen.errors import BadInput, QigenError, Unsupported, UsageError
from qigen.frontends.onnx import functions, opsets
from qigen.frontends.onnx.builder import Builder, Scope, dense, label
from qigen.frontends.onnx.control import OPERATORS as CONTROL
from qigen.frontends.onnx.control import Control
from qigen.frontends.onnx.dimensions import Dimensions, Shapes
from qigen.frontends.onnx.reader import opsets as model_opsets
from qigen.ir import schema, types
from qigen.ir.graph import Dim, Graph
from qigen.ir.tensor import TensorOp

MAX_MESSAGE = 600


def import_model(model: onnx.ModelProto, where: str, shapes: Shapes | None = None) -> Graph:
    """The tensor graph of a checked model.

    ``shapes`` fixes or bounds the inputs' dimensions by name. Raises BadInput for contradictions
    and Unsupported for operators, attributes and types without a kernel; both name the node.
    """
    return _Importer(model, where, shapes or {}).run()


class _Importer(Builder):
    def __init__(self, model: onnx.ModelProto, where: str, shapes: Shapes) -> None:
        super().__init__(re.sub(r"[^\w.+ -]", "_", model.graph.name) or "model")
        self.model = model
        self.where = where
        self.shapes = shapes
        self.dimensions = Dimensions(where)
        self.control = Control(self, self._inline)

    def run(self) -> Graph:
        graph, source = self.graph, self.model.graph
        self._check_shapes()
        scope = Scope({}, opsets=model_opsets(self.model))
        self._declare(source)
        for initializer in source.initializer:
            self.initializer(scope, initializer)
        for sparse in source.sparse_initializer:
            name = sparse.values.name
            self.constant(scope, name, dense(sparse, f"tensor {name}"))
        for info in source.input:
            if info.name not in scope.names:
                self._input(scope, info)
        self._nodes(scope, source.node)
        for info in source.output:
            graph.outputs.append(self._output(scope, info.name))
        graph.meta["limits"] = dict(self.dimensions.limits)
        return graph.rebuilt(graph.nodes)

    def _check_shapes(self) -> None:
        initial = {i.name for i in self.model.graph.initializer}
        names = [i.name for i in self.model.graph.input if i.name not in initial]
        for name in self.shapes:
            if name not in names:
                raise UsageError(
                    f"--shape names the input {name}; the model has {', '.join(names)}", self.where
                )

    def _declare(self, graph: onnx.GraphProto) -> None:
        for info in (*graph.value_info, *graph.output):
            tensor = info.type.tensor_type
            if info.type.HasField("tensor_type") and tensor.HasField("shape"):
                self.graph.declared[info.name] = tuple(
                    d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim
                )

    def _input(self, scope: Scope, info: onnx.ValueInfoProto) -> None:
        kind = info.type.WhichOneof("value")
        if kind != "tensor_type":
            raise Unsupported(f"input {info.name} is a {kind}; inputs must be tensors", self.where)
        tensor = info.type.tensor_type
        element = types.of_onnx(tensor.elem_type, f"input {info.name}")
        asked = self.shapes.get(info.name)
        if not tensor.HasField("shape") and asked is None:
            raise Unsupported(
                f"input {info.name} has no shape in the model; give it with --shape", self.where
            )
        declared = list(tensor.shape.dim) if tensor.HasField("shape") else [None] * len(asked or ())
        if asked is not None and len(asked) != len(declared):
            raise UsageError(
                f"--shape gives {info.name} {len(asked)} dimensions; it has {len(declared)}",
                self.where,
            )
        if len(declared) > 8:
            raise Unsupported(
                f"input {info.name} has {len(declared)} dimensions; 8 are the most", self.where
            )
        shape: list[Dim] = []
        for axis, d in enumerate(declared):
            shape.append(self.dimensions.of(info.name, axis, d, asked[axis] if asked else None))
        scope.names[info.name] = self.graph.add_input(self.name(info.name), shape, element.name)

    def _output(self, scope: Scope, name: str) -> str:
        """The value of a graph output: computed, under its own name, and listed once."""
        value = scope.names.get(name)
        if value is None:
            raise BadInput(f"output {name} is computed by no node", self.where)
        graph = self.graph
        if (
            value in graph.inputs
            or value in graph.constants
            or value in graph.outputs
            or value != name
        ):
            copy = self.name(name) if value != name else self.name(f"{name}_out")
            # the interface shows the model's own name
            graph.meta.setdefault("output_names", {})[copy] = name
            graph.add_node("onnx.Identity", [value], name=self.name(f"{name}_copy"), outputs=[copy])
            return copy
        return value

    def _nodes(self, scope: Scope, nodes: Sequence[onnx.NodeProto]) -> None:
        for node in nodes:
            try:
                self._node(scope, node)
            except QigenError as error:
                if not error.where:
                    error.where = label(node)
                if len(error.message) > MAX_MESSAGE:  # of long lists of numbers
                    error.message = error.message[:MAX_MESSAGE] + " ..."
                raise

    def _node(self, scope: Scope, proto: onnx.NodeProto) -> None:
        if proto.op_type == "Constant" and proto.domain in ("", "ai.onnx"):
            self.constant_node(scope, proto)
            return
        if proto.op_type in CONTROL and proto.domain in ("", "ai.onnx"):
            self.control.write_out(scope, proto)
            return
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        version = scope.opsets.get(domain, 1)
        inputs = [self.operand(scope, name, proto) for name in proto.input]
        attrs = self.attributes(proto)

        def add(array: Any) -> str:
            name = self.name(f"{scope.prefix}{proto.name or proto.output[0]}_attr")
            return self.graph.add_constant(name, np.asarray(array))

        op_type = proto.op_type
        if domain == "":
            op_type = opsets.upgrade(op_type, version, attrs, inputs, add)
        prefix = {"": "onnx", "com.microsoft": "ms"}.get(domain, domain)
        operator = schema.operators().get(f"{prefix}.{op_type}")
        if operator is None:
            self._expand(scope, proto, version)
            return
        assert isinstance(operator, TensorOp)
        known_attrs = {a.name for a in operator.attrs}
        for name in attrs:
            if name not in known_attrs:
                raise Unsupported(
                    f"{op_type} (opset {version}) with the attribute {name} is not supported",
                    label(proto),
                )
        while inputs and not inputs[-1]:
            inputs.pop()
        outputs = list(proto.output)
        while outputs and not outputs[-1]:
            outputs.pop()
        try:
            self.add(scope, operator, proto, inputs, outputs, attrs)
        except Unsupported:
            if not functions.exists(proto, version):
                raise
            self._expand(scope, proto, version)

    # -- subgraphs --------------------------------------------------------------------------------

    def _expand(self, scope: Scope, proto: onnx.NodeProto, version: int) -> None:
        """Replace a node by the function that the ONNX standard defines it with."""
        values = [
            self.graph.values[self.operand(scope, name, proto)] if name else None
            for name in proto.input
        ]
        body = functions.body_of(proto, version, values)
        domain = "" if proto.domain == "ai.onnx" else f"{proto.domain}."
        refused = Unsupported(
            f"operator {domain}{proto.op_type} (opset {version}) is not supported", label(proto)
        )
        if body is None:
            raise refused
        inner = Scope({}, f"{scope.prefix}{proto.name or proto.output[0]}/", body.opsets)
        for formal, actual in zip(body.inputs, proto.input, strict=False):
            if actual:
                inner.names[formal] = self.operand(scope, actual, proto)
        self._nodes(inner, body.nodes)
        for formal, actual in zip(body.outputs, proto.output, strict=False):
            if actual:
                if formal not in inner.names:
                    raise refused
                scope.names[actual] = inner.names[formal]

    def _inline(
        self,
        scope: Scope,
        body: onnx.GraphProto,
        feeds: Mapping[str, str],
        proto: onnx.NodeProto,
        round_: int,
    ) -> list[str]:
        """Nodes of a subgraph in place; the names of its outputs."""
        inner = Scope(
            {**scope.names, **feeds},
            f"{scope.prefix}{proto.name or proto.output[0]}/{round_}/",
            scope.opsets,
        )
        self._declare_inner(inner, body)
        for initializer in body.initializer:
            self.initializer(inner, initializer)
        self._nodes(inner, body.node)
        return [self.operand(inner, info.name, proto) for info in body.output]

    def _declare_inner(self, scope: Scope, body: onnx.GraphProto) -> None:
        for info in (*body.value_info, *body.output):
            tensor = info.type.tensor_type
            if info.type.HasField("tensor_type") and tensor.HasField("shape"):
                self.graph.declared.setdefault(
                    scope.prefix + info.name,
                    tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim),
                )
