"""Operators that are functions of others: by the ONNX standard, or by contrib.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from qigen.frontends.onnx import contrib
from qigen.ir import types
from qigen.ir.graph import Value


@dataclass(frozen=True)
class Body:
    """What a call of a function stands for: attributes put in, absent inputs named ''."""

    nodes: list[onnx.NodeProto]
    inputs: Sequence[str]
    outputs: Sequence[str]
    opsets: Mapping[str, int]


def exists(proto: onnx.NodeProto, version: int) -> bool:
    """Whether the operator of a node is such a function."""
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    if domain == contrib.DOMAIN:
        return proto.op_type in contrib.BUILDERS
    try:
        found = onnx.defs.get_schema(proto.op_type, version, domain)
    except onnx.defs.SchemaError:
        return False
    facts: Any = found  # its type information lags behind
    return bool(facts.has_function or facts.has_context_dependent_function)


def body_of(proto: onnx.NodeProto, version: int, values: Sequence[Value | None]) -> Body | None:
    """The function behind a node with these inputs (None: absent); None where there is none."""
    if not exists(proto, version):
        return None
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    body: onnx.FunctionProto | None
    if domain == contrib.DOMAIN:
        defaults: list[onnx.AttributeProto] = []
        kinds = [None if v is None else (v.dtype, len(v.shape)) for v in values]
        body = contrib.function(proto, kinds)
    else:
        found = onnx.defs.get_schema(proto.op_type, version, domain)
        defaults = [a.default_value for a in found.attributes.values()]
        body = _standard(found, proto, version, values)
    if body is None:
        return None
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
    opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in body.opset_import}
    return Body(nodes, body.input, body.output, opsets)


def _standard(
    found: Any, proto: onnx.NodeProto, version: int, values: Sequence[Value | None]
) -> onnx.FunctionProto | None:
    """The body that the standard gives, for these inputs where it depends on them."""
    if found.has_context_dependent_function:
        kinds = []
        for v in values:
            if v is None:
                kinds.append(onnx.TypeProto().SerializeToString())
                continue
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
    body = onnx.FunctionProto()
    body.ParseFromString(text if isinstance(text, bytes) else text.SerializeToString())
    return body


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
