"""Random numbers: a function of the node's seed and the element's number, so that runs repeat.

A node without a seed gets one from its name: two such nodes make different numbers, and every run
of a model makes the same ones.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from qigen.errors import BadInput
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.ops.onnx.cast import target
from qigen.ir.ops.onnx.elementwise import BOOLS, FLOATS, FLOATS8, NUMBERS
from qigen.ir.schema import Attr, register
from qigen.ir.tensor import (
    Alias,
    Call,
    Problem,
    Ref,
    TensorOp,
    check_inputs,
    constant,
    element,
    given,
    kernel,
    require_type,
    shape,
)

_SEED = Attr("seed", float, None)


def _key(node: Node) -> int:
    """Where the sequence of a node begins: 64 bits."""
    seed = node.attrs["seed"]
    data = f"node {node.name}".encode() if seed is None else struct.pack("<d", float(seed))
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _result(node: Node, graph: Graph, allowed: tuple[str, ...]) -> str:
    """The type in ``dtype``, or that of the input; BadInput if it cannot be the result's."""
    number = node.attrs["dtype"]
    kind = element(node, graph, 0).name if number is None else target(node, "dtype").name
    if kind not in allowed:
        raise BadInput(f"{node.op} cannot make {kind}; give dtype", node.name)
    return kind


@dataclass(frozen=True)
class Distribution:
    """A function of random.h, and the attributes that are its parameters, in order."""

    function: str
    parameters: tuple[tuple[str, float], ...]


UNIFORM = Distribution("random_uniform", (("low", 0.0), ("high", 1.0)))
NORMAL = Distribution("random_normal", (("mean", 0.0), ("scale", 1.0)))


class _Random(TensorOp):
    distribution: Distribution
    like: bool
    fold = False
    minimum = 0

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1 if self.like else 0)
        size: Shape = shape(node, graph, 0) if self.like else tuple(node.attrs["shape"])
        return [(size, _result(node, graph, FLOATS))]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        numbers = [float(node.attrs[name]) for name, _ in self.distribution.parameters]
        kind = graph.values[node.outputs[0]].dtype
        return kernel(node, "random.h", self.distribution.function, (kind,), *numbers, _key(node),
                      inputs=())


for _name, _distribution in (("RandomUniform", UNIFORM), ("RandomNormal", NORMAL)):
    _attrs = (*(Attr(n, float, d) for n, d in _distribution.parameters), _SEED)
    for _like in (False, True):
        register(
            type(
                f"{_name}Like" if _like else _name,
                (_Random,),
                {
                    "name": f"onnx.{_name}{'Like' if _like else ''}",
                    "inputs": "x" if _like else "",
                    "attrs": (
                        (*_attrs, Attr("dtype", int, None)) if _like
                        else (*_attrs, Attr("dtype", int, 1), Attr("shape", tuple))
                    ),
                    "distribution": _distribution,
                    "like": _like,
                    "__doc__": f"ONNX {_name}, with the "
                    f"{'shape of its input' if _like else 'shape that is given'}.",
                },
            )
        )


@register
class Bernoulli(TensorOp):
    """1 with the probability that the input gives, else 0."""

    name = "onnx.Bernoulli"
    inputs = "x"
    attrs = (Attr("dtype", int, None), _SEED)
    fold = False

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        require_type(node, graph, 0, FLOATS)
        return [(shape(node, graph, 0), _result(node, graph, (*NUMBERS, *BOOLS)))]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        kinds = (graph.values[node.outputs[0]].dtype, element(node, graph, 0).name)
        return kernel(node, "random.h", "bernoulli", kinds, _key(node))


@register
class Multinomial(TensorOp):
    """``sample_size`` classes a row, with the probabilities softmax(x)."""

    name = "onnx.Multinomial"
    inputs = "x"
    attrs = (Attr("dtype", int, 6), Attr("sample_size", int, 1, minimum=0), _SEED)
    fold = False

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        require_type(node, graph, 0, FLOATS)
        source = shape(node, graph, 0)
        if len(source) != 2 or source[1] == 0:
            raise BadInput("Multinomial needs rows of at least one class", node.name)
        return [((source[0], node.attrs["sample_size"]), _result(node, graph, ("i32", "i64")))]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        kinds = (graph.values[node.outputs[0]].dtype, element(node, graph, 0).name)
        return kernel(node, "random.h", "multinomial", kinds, _key(node))


@register
class Dropout(TensorOp):
    """The input and a mask of ones, unless ``training_mode`` is true and ``ratio`` is not 0."""

    name = "onnx.Dropout"
    inputs = "x, ratio?, training_mode?"
    attrs = (Attr("seed", int, None),)
    fold = False

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1, 3)
        size = shape(node, graph, 0)
        kinds = (*FLOATS, *FLOATS8)
        result = [(size, require_type(node, graph, 0, kinds)), (size, "bool")]
        if given(node, 1):
            require_type(node, graph, 1, kinds)
        if given(node, 2):
            require_type(node, graph, 2, BOOLS)
        return result[: len(node.outputs)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        training = given(node, 2)
        mode = constant(graph, training) if training else None
        if mode is not None and not mode.any():
            training = ""
        if not training and len(node.outputs) == 1:
            return Alias(node.inputs[0])
        kind = element(node, graph, 0).name
        ratio = element(node, graph, 1).name if given(node, 1) else kind
        outputs = [*node.outputs, ""][:2]
        names = (*outputs, node.inputs[0], given(node, 1), training)
        return Call("random.h", "dropout", (kind, ratio),
                    (*(Ref(n) for n in names), _key(node),
                     Problem("the ratio is not at least 0 and below 1")))
