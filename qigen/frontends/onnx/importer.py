"""ONNX graphs to ours: names, types, sizes; constants and known sizes are computed on the way."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from qigen.errors import BadInput, QigenError, Unsupported, UsageError
from qigen.frontends.onnx import contrib, opsets
from qigen.frontends.onnx.reader import opsets as model_opsets
from qigen.ir import ops, schema, types  # noqa: F401  (importing ops registers the operators)
from qigen.ir.dims import Sym, product, whole
from qigen.ir.graph import Array, Dim, Graph, Node
from qigen.ir.tensor import MAX_FOLDED_BYTES, Known, TensorOp, known

MAX_UNROLLED = 1024
"""Iterations of a loop that are written out, at most."""

MAX_UNROLLED_IN_ALL = 4 * MAX_UNROLLED
"""The same of all loops together: they may lie in each other."""

MAX_MESSAGE = 600

CODES = ("i8", "u8", "i4", "u4", "i2", "u2")
"""Weights in these types are kept as they are: what turns them into floats is not computed."""


@dataclass(frozen=True)
class Size:
    """A dimension as --shape gives it: a number, or a name with an upper limit."""

    value: int | str
    limit: int = 0


Shapes = Mapping[str, Sequence[Size]]


@dataclass
class _Scope:
    """Names of one (sub)graph: ONNX value name -> name of the value in our graph."""

    names: dict[str, str]
    prefix: str = ""
    opsets: Mapping[str, int] = field(default_factory=dict)


def import_model(model: onnx.ModelProto, where: str, shapes: Shapes | None = None) -> Graph:
    """The tensor graph of a checked model.

    ``shapes`` fixes or bounds the inputs' dimensions by name. Raises BadInput for contradictions
    and Unsupported for operators, attributes and types without a kernel; both name the node.
    """
    return _Importer(model, where, shapes or {}).run()


class _Importer:
    def __init__(self, model: onnx.ModelProto, where: str, shapes: Shapes) -> None:
        self.model = model
        self.where = where
        self.shapes = shapes
        self.graph = Graph(re.sub(r"[^\w.+ -]", "_", model.graph.name) or "model")
        self.symbols: dict[str, str] = {}  # dim_param -> our name
        self.limits: dict[str, int] = {}
        self.fixed: dict[str, int] = {}  # dim_param -> number that --shape gave it
        self.taken: set[str] = set()
        self.node_names: set[str] = set()
        self.unrolled = 0  # iterations

    def run(self) -> Graph:
        graph, source = self.graph, self.model.graph
        self._check_shapes()
        scope = _Scope({}, opsets=model_opsets(self.model))
        self._declare(source)
        for initializer in source.initializer:
            self._initializer(scope, initializer)
        for sparse in source.sparse_initializer:
            name = sparse.values.name
            self._constant(scope, name, _dense(sparse, f"tensor {name}"))
        for info in source.input:
            if info.name not in scope.names:
                self._input(scope, info)
        self._nodes(scope, source.node)
        for info in source.output:
            graph.outputs.append(self._output(scope, info.name))
        graph.meta["limits"] = dict(self.limits)
        return graph.rebuilt(graph.nodes)

    # -- inputs and outputs -----------------------------------------------------------------------

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

    def _input(self, scope: _Scope, info: onnx.ValueInfoProto) -> None:
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
            shape.append(self._dimension(info.name, axis, d, asked[axis] if asked else None))
        scope.names[info.name] = self.graph.add_input(self._name(info.name), shape, element.name)

    def _dimension(
        self, name: str, axis: int, d: onnx.TensorShapeProto.Dimension | None, asked: Size | None
    ) -> Dim:
        at = f"dimension {axis} of input {name}"
        if d is not None and d.HasField("dim_value") and d.dim_value >= 0:
            if asked is not None and isinstance(asked.value, int) and asked.value != d.dim_value:
                raise UsageError(
                    f"--shape makes {at} {asked.value}; the model fixes it to {d.dim_value}",
                    self.where,
                )
            return int(d.dim_value)
        # "?" and the like stand for sizes that have nothing to do with each other
        named = d is not None and re.search(r"\w", d.dim_param)
        parameter = d.dim_param if d is not None and named else f"{name}_{axis}"
        if asked is not None:
            if isinstance(asked.value, int):
                before = self.fixed.setdefault(parameter, asked.value)
                if before != asked.value:
                    raise UsageError(
                        f"--shape makes {at} ({parameter}) {asked.value}, and {before} elsewhere",
                        self.where,
                    )
                return asked.value
            if asked.limit:
                self.limits[self._symbol(parameter)] = asked.limit
        if parameter in self.fixed:
            return self.fixed[parameter]
        return Sym.named(self._symbol(parameter))

    def _symbol(self, parameter: str) -> str:
        if parameter not in self.symbols:
            base = re.sub(r"\W", "_", parameter, flags=re.ASCII)
            base = f"d_{base}" if not base or base[0].isdigit() or base in _RESERVED else base
            name, n = base, 1
            while name in self.symbols.values():
                name, n = f"{base}_{n}", n + 1
            self.symbols[parameter] = name
        return self.symbols[parameter]

    def _output(self, scope: _Scope, name: str) -> str:
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
            copy = self._name(name) if value != name else self._name(f"{name}_out")
            # the interface shows the model's own name
            graph.meta.setdefault("output_names", {})[copy] = name
            graph.add_node(
                "onnx.Identity", [value], name=self._name(f"{name}_copy"), outputs=[copy]
            )
            return copy
        return value

    # -- constants --------------------------------------------------------------------------------

    def _initializer(self, scope: _Scope, tensor: onnx.TensorProto) -> None:
        self._constant(scope, tensor.name, self._array(tensor, f"tensor {tensor.name}"))

    def _array(self, tensor: onnx.TensorProto, where: str) -> Array:
        types.of_onnx(tensor.data_type, where)
        try:
            return np.asarray(numpy_helper.to_array(tensor))
        except Exception as error:  # ValueError, TypeError, struct.error: whatever is damaged
            raise BadInput(f"its data does not fit its shape or type ({error})", where) from None

    def _constant(self, scope: _Scope, name: str, data: Array) -> str:
        own = self._name(scope.prefix + name)
        self.graph.add_constant(own, np.ascontiguousarray(data).reshape(data.shape))
        scope.names[name] = own
        return own

    def _name(self, name: str, taken: set[str] | None = None) -> str:
        """``name``, or with a number behind it if it is taken (default: by a value)."""
        taken = self.taken if taken is None else taken
        own, n = name, 1
        while own in taken:
            own, n = f"{name}_{n}", n + 1
        taken.add(own)
        return own

    # -- nodes ------------------------------------------------------------------------------------

    def _nodes(self, scope: _Scope, nodes: Sequence[onnx.NodeProto]) -> None:
        for node in nodes:
            try:
                self._node(scope, node)
            except QigenError as error:
                if not error.where:
                    error.where = _label(node)
                if len(error.message) > MAX_MESSAGE:  # of long lists of numbers
                    error.message = error.message[:MAX_MESSAGE] + " ..."
                raise

    def _node(self, scope: _Scope, proto: onnx.NodeProto) -> None:
        if proto.op_type == "Constant" and proto.domain in ("", "ai.onnx"):
            self._constant_node(scope, proto)
            return
        if proto.op_type in ("If", "Loop", "Scan") and proto.domain in ("", "ai.onnx"):
            self._control(scope, proto)
            return
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        version = scope.opsets.get(domain, 1)
        inputs = [self._operand(scope, name, proto) for name in proto.input]
        attrs = self._attributes(proto)

        def add(array: Any) -> str:
            name = self._name(f"{scope.prefix}{proto.name or proto.output[0]}_attr")
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
                    _label(proto),
                )
        while inputs and not inputs[-1]:
            inputs.pop()
        outputs = list(proto.output)
        while outputs and not outputs[-1]:
            outputs.pop()
        try:
            self._add(scope, operator, proto, inputs, outputs, attrs)
        except Unsupported:
            if not self._has_function(proto, version):
                raise
            self._expand(scope, proto, version)

    def _add(
        self,
        scope: _Scope,
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
        own = [self._name(scope.prefix + name) if name else "" for name in outputs]
        own += [""] * (operator.results - len(own))
        for i in range(operator.results):
            own[i] = own[i] or self._name(f"{scope.prefix}{label}/result{i}")
        outputs = outputs + [""] * (len(own) - len(outputs))
        node = Node(operator.name, self._name(scope.prefix + label, self.node_names), inputs, own)
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
        trial = graph_values(graph, node)
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

    def _operand(self, scope: _Scope, name: str, proto: onnx.NodeProto) -> str:
        if not name:
            return ""
        if name not in scope.names:
            raise BadInput(f"input '{name}' is defined nowhere before it", _label(proto))
        return scope.names[name]

    def _attributes(self, proto: onnx.NodeProto) -> dict[str, Any]:
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
                attrs[attribute.name] = self._array(attribute.t, _label(proto))
            else:
                raise Unsupported(
                    f"{proto.op_type} with the attribute {attribute.name} "
                    f"(a {A.AttributeType.Name(kind)}) is not supported",
                    _label(proto),
                )
        return attrs

    def _constant_node(self, scope: _Scope, proto: onnx.NodeProto) -> None:
        if len(proto.attribute) != 1 or len(proto.output) != 1:
            raise BadInput("a Constant has one attribute and one output", _label(proto))
        attribute = proto.attribute[0]
        name = attribute.name
        if name == "value":
            data = self._array(attribute.t, _label(proto))
        elif name in ("value_int", "value_ints"):
            data = np.array(onnx.helper.get_attribute_value(attribute), np.int64)
        elif name in ("value_float", "value_floats"):
            data = np.array(onnx.helper.get_attribute_value(attribute), np.float32)
        elif name == "sparse_value":
            data = _dense(attribute.sparse_tensor, _label(proto))
        else:
            raise Unsupported("constants of strings are not supported", _label(proto))
        self._constant(scope, proto.output[0], data)

    # -- functions and control flow ---------------------------------------------------------------

    def _has_function(self, proto: onnx.NodeProto, version: int) -> bool:
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        if domain == contrib.DOMAIN:
            return proto.op_type in contrib.BUILDERS
        try:
            found = onnx.defs.get_schema(proto.op_type, version, domain)
        except onnx.defs.SchemaError:
            return False
        facts: Any = found  # its type information lags behind
        return bool(facts.has_function or facts.has_context_dependent_function)

    def _expand(self, scope: _Scope, proto: onnx.NodeProto, version: int) -> None:
        """Replace a node by the function that the ONNX standard defines it with."""
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        refused = Unsupported(
            f"operator {domain + '.' if domain else ''}{proto.op_type} (opset {version}) is not "
            "supported",
            _label(proto),
        )
        if not self._has_function(proto, version):
            raise refused
        body: onnx.FunctionProto | None
        if domain == contrib.DOMAIN:
            defaults: list[onnx.AttributeProto] = []
            body = contrib.function(proto, self._kinds(scope, proto))
        else:
            found = onnx.defs.get_schema(proto.op_type, version, domain)
            defaults = [a.default_value for a in found.attributes.values()]
            body = self._function_body(scope, found, proto, version)
        if body is None:
            raise refused
        inner = _Scope(
            {},
            f"{scope.prefix}{proto.name or proto.output[0]}/",
            {"" if o.domain == "ai.onnx" else o.domain: o.version for o in body.opset_import},
        )
        for formal, actual in zip(body.input, proto.input, strict=False):
            if actual:
                inner.names[formal] = self._operand(scope, actual, proto)
        attributes = {a.name: a for a in proto.attribute}
        for default in defaults:
            if default.name not in attributes and default.type:
                attributes[default.name] = default
        nodes = [_bound(n, attributes) for n in body.node]
        absent = set(body.input[len(proto.input) :]) | {
            f for f, a in zip(body.input, proto.input, strict=False) if not a
        }
        for node in nodes:
            for i, name in enumerate(node.input):
                if name in absent:
                    node.input[i] = ""
        self._nodes(inner, nodes)
        for formal, actual in zip(body.output, proto.output, strict=False):
            if actual:
                if formal not in inner.names:
                    raise refused
                scope.names[actual] = inner.names[formal]

    def _kinds(self, scope: _Scope, proto: onnx.NodeProto) -> list[tuple[str, int] | None]:
        """Type and rank of a node's inputs; None where one is absent."""
        values = [
            self.graph.values[self._operand(scope, name, proto)] if name else None
            for name in proto.input
        ]
        return [None if v is None else (v.dtype, len(v.shape)) for v in values]

    def _function_body(
        self, scope: _Scope, found: Any, proto: onnx.NodeProto, version: int
    ) -> onnx.FunctionProto | None:
        body = onnx.FunctionProto()
        if found.has_context_dependent_function:
            kinds = []
            for name in proto.input:
                if not name:
                    kinds.append(onnx.TypeProto().SerializeToString())
                    continue
                v = self.graph.values[self._operand(scope, name, proto)]
                shape = [d if isinstance(d, int) else str(d) for d in v.shape]
                kind = onnx.helper.make_tensor_type_proto(types.TYPES[v.dtype].onnx, shape)
                kinds.append(kind.SerializeToString())
            versions = [v for v in found.context_dependent_function_opset_versions if v <= version]
            if not versions:
                versions = list(found.context_dependent_function_opset_versions)
            text = found.get_context_dependent_function_with_opset_version(
                max(versions), proto.SerializeToString(), kinds
            )
        else:
            versions = [v for v in found.function_opset_versions if v <= version]
            text = (
                found.get_function_with_opset_version(max(versions))
                if versions
                else found.function_body.SerializeToString()
            )
        if not text:
            return None
        body.ParseFromString(text if isinstance(text, bytes) else text.SerializeToString())
        return body

    def _control(self, scope: _Scope, proto: onnx.NodeProto) -> None:
        graphs = {a.name: a.g for a in proto.attribute if a.type == onnx.AttributeProto.GRAPH}
        if proto.op_type == "If":
            condition = known(self.graph, self._operand(scope, proto.input[0], proto))
            if condition is None or condition.size != 1 or isinstance(condition.item(), Sym):
                raise Unsupported(
                    "If whose condition is only known at run time is not supported; fix the sizes "
                    "it depends on with --shape",
                    _label(proto),
                )
            branch = graphs.get("then_branch" if condition.reshape(-1)[0] else "else_branch")
            if branch is None or len(branch.output) != len(proto.output):
                raise BadInput("a branch is missing or has other outputs", _label(proto))
            results = self._inline(scope, branch, {}, proto, 0)
            scope.names.update(
                {name: own for name, own in zip(proto.output, results, strict=True) if name}
            )
            return
        if proto.op_type == "Loop":
            if "body" not in graphs:
                raise BadInput("the body is missing", _label(proto))
            self._loop(scope, proto, graphs["body"])
            return
        if "body" not in graphs:
            raise BadInput("the body is missing", _label(proto))
        self._scan(scope, proto, graphs["body"])

    def _scan(self, scope: _Scope, proto: onnx.NodeProto, body: onnx.GraphProto) -> None:
        """A scan over axes of known size is written out."""
        a = {x.name: x for x in proto.attribute}
        count = a["num_scan_inputs"].i if "num_scan_inputs" in a else 0
        operands = [self._operand(scope, name, proto) for name in proto.input]
        if scope.opsets.get("", 9) < 9 or any(not name for name in operands):
            raise Unsupported("Scan of opset 8 is not supported; export a newer one", _label(proto))
        n_states = len(operands) - count
        n_scans = len(body.output) - n_states
        if not 0 < count <= len(operands) or n_scans < 0 or len(body.input) != len(operands):
            raise BadInput("the body has not as many inputs and outputs as the scan", _label(proto))

        def list_of(name: str, length: int) -> list[int]:
            return list(a[name].ints) if name in a and a[name].ints else [0] * length

        state, sources = operands[:n_states], operands[n_states:]
        lengths = set()
        for source, axis in zip(sources, list_of("scan_input_axes", count), strict=True):
            shape = self.graph.values[source].shape
            if not -len(shape) <= axis < len(shape):
                raise BadInput(f"scan axis {axis} is out of range", _label(proto))
            lengths.add(shape[axis])
        length = lengths.pop()
        if lengths or not isinstance(length, int) or length > MAX_UNROLLED:
            raise Unsupported(
                "a Scan whose length is only known at run time, or is long, is not supported; fix "
                "sizes with --shape",
                _label(proto),
            )
        rows: list[list[str]] = [[] for _ in range(n_scans)]
        for i in range(length):
            if self.unrolled >= MAX_UNROLLED_IN_ALL:
                raise Unsupported("its loops are too long to be written out", _label(proto))
            self.unrolled += 1
            slices = []
            for source, axis, backwards in zip(
                sources,
                list_of("scan_input_axes", count),
                list_of("scan_input_directions", count),
                strict=True,
            ):
                at = length - 1 - i if backwards else i
                index = self.graph.add_constant(
                    self._name(f"{source}/at{at}"), np.array(at, np.int64)
                )
                part = self._add_raw("onnx.Gather", [source, index], {"axis": axis},
                                     f"{source}/part{at}")
                slices.append(part)
            feeds = dict(zip((x.name for x in body.input), (*state, *slices), strict=True))
            results = self._inline(scope, body, feeds, proto, i)
            state = results[:n_states]
            for collected, name in zip(rows, results[n_states:], strict=True):
                collected.append(name)
        axes = list_of("scan_output_axes", n_scans)
        directions = list_of("scan_output_directions", n_scans)
        stacked = [
            self._stacked(names[::-1] if backwards else names, axis, proto)
            for names, axis, backwards in zip(rows, axes, directions, strict=True)
        ]
        for name, own in zip(proto.output, (*state, *stacked), strict=False):
            if name:
                scope.names[name] = own

    def _stacked(self, rows: list[str], axis: int, proto: onnx.NodeProto) -> str:
        """What the iterations of a loop made, along a new axis."""
        if not rows:
            raise Unsupported("a loop without iterations makes nothing to collect", _label(proto))
        parts = [
            self._add_raw("onnx.Unsqueeze", [row], {"axes": (axis,)}, f"{row}/row") for row in rows
        ]
        return self._add_raw("onnx.Concat", parts, {"axis": axis}, f"{rows[0]}/scan")

    def _loop(self, scope: _Scope, proto: onnx.NodeProto, body: onnx.GraphProto) -> None:
        """A loop whose number of iterations is known is written out."""
        refused = Unsupported(
            "a Loop whose number of iterations is only known at run time is not supported; export "
            "the model with its loops unrolled, or fix sizes with --shape",
            _label(proto),
        )

        def number(name: str) -> Any:
            found = known(self.graph, name) if name else None
            one = None if found is None or found.size != 1 else found.reshape(-1)[0]
            return None if isinstance(one, Sym) else one

        operands = [self._operand(scope, name, proto) for name in proto.input]
        trips = number(operands[0]) if operands[0] else MAX_UNROLLED + 1
        state = operands[2:]
        condition = operands[1] if len(operands) > 1 else ""
        n_scans = len(body.output) - 1 - len(state)
        if n_scans < 0 or len(body.input) != 2 + len(state):
            raise BadInput("the body has not as many inputs and outputs as the loop", _label(proto))
        scans: list[list[str]] = [[] for _ in range(n_scans)]
        iteration = 0
        while True:
            go = True if not condition else number(condition)
            if go is None or trips is None:
                raise refused
            if not go or iteration >= int(trips):
                break
            if iteration >= MAX_UNROLLED or self.unrolled >= MAX_UNROLLED_IN_ALL:
                raise refused
            self.unrolled += 1
            index = self.graph.add_constant(
                self._name(f"{scope.prefix}{_label(proto)}/i{iteration}"),
                np.array(iteration, np.int64),
            )
            true = self.graph.add_constant(
                self._name(f"{scope.prefix}{_label(proto)}/c{iteration}"), np.array(True)
            )
            feeds = dict(zip((i.name for i in body.input), (index, true, *state), strict=False))
            results = self._inline(scope, body, feeds, proto, iteration)
            condition, state = results[0], results[1 : 1 + len(state)]
            for rows, name in zip(scans, results[1 + len(state) :], strict=True):
                rows.append(name)
            iteration += 1
        collected = [self._stacked(rows, 0, proto) for rows in scans]
        for name, own in zip(proto.output, (*state, *collected), strict=False):
            if name:
                scope.names[name] = own

    def _add_raw(self, op: str, inputs: list[str], attrs: dict[str, Any], stem: str) -> str:
        """The result of a node of ours."""
        operator = schema.operator(op)
        assert isinstance(operator, TensorOp)
        inner = _Scope({})
        self._add(inner, operator, onnx.helper.make_node(op, [], [stem]), inputs, [stem], attrs)
        return inner.names[stem]

    def _inline(
        self,
        scope: _Scope,
        body: onnx.GraphProto,
        feeds: Mapping[str, str],
        proto: onnx.NodeProto,
        round_: int,
    ) -> list[str]:
        """Nodes of a subgraph in place; the names of its outputs."""
        inner = _Scope(
            {**scope.names, **feeds},
            f"{scope.prefix}{proto.name or proto.output[0]}/{round_}/",
            scope.opsets,
        )
        self._declare_inner(inner, body)
        for initializer in body.initializer:
            self._initializer(inner, initializer)
        self._nodes(inner, body.node)
        return [self._operand(inner, info.name, proto) for info in body.output]

    def _declare_inner(self, scope: _Scope, body: onnx.GraphProto) -> None:
        for info in (*body.value_info, *body.output):
            tensor = info.type.tensor_type
            if info.type.HasField("tensor_type") and tensor.HasField("shape"):
                self.graph.declared.setdefault(
                    scope.prefix + info.name,
                    tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim),
                )


_RESERVED = {
    "int",
    "long",
    "float",
    "double",
    "auto",
    "new",
    "delete",
    "class",
    "struct",
    "c",
    "s",
    "step",
    "thread",
    "threads",
    "barrier",
    "min",
    "max",
    "mod",
    "floordiv",
    "default",
    "register",
    "this",
    "if",
    "else",
    "for",
    "while",
    "do",
    "return",
    "true",
    "false",
    "half",
    "bool",
    "char",
    "short",
    "template",
    "operator",
    "union",
    "signed",
    "unsigned",
}


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


def graph_values(graph: Graph, node: Node) -> list[Any]:
    """The values that a node would make."""
    return schema.infer(node, graph)


def _label(proto: onnx.NodeProto) -> str:
    """How errors name a node."""
    name = proto.name or (proto.output[0] if proto.output else "")
    return f"node {name} ({proto.op_type})"


def _bound(node: onnx.NodeProto, attributes: Mapping[str, onnx.AttributeProto]) -> onnx.NodeProto:
    """A node of a function with the attributes of the call in place of references to them."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    del copy.attribute[:]
    for a in node.attribute:
        if a.ref_attr_name:
            given = attributes.get(a.ref_attr_name)
            if given is not None:
                new = copy.attribute.add()
                new.CopyFrom(given)
                new.name = a.name
        elif a.type == onnx.AttributeProto.GRAPH:
            new = copy.attribute.add()
            new.CopyFrom(a)
            inner = [_bound(n, attributes) for n in a.g.node]
            del new.g.node[:]
            new.g.node.extend(inner)
        else:
            copy.attribute.add().CopyFrom(a)
    return copy


def _dense(sparse: onnx.SparseTensorProto, where: str) -> Array:
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
