"""Elementwise operators of any type: one row an operator.

The kernels are functors of ``templates/tensor/elementwise.h`` under the name of the row; f32 chains
are fused into vector loops by a pass, so these serve the other types and what cannot be fused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import fmod
from typing import Any

import numpy as np

from qigen.errors import BadInput
from qigen.ir import dims
from qigen.ir.dims import Sym
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.schema import Attr, register
from qigen.ir.tensor import (
    Alias,
    Call,
    Floats,
    Known,
    Problem,
    Ref,
    Refs,
    TensorOp,
    broadcast,
    check_inputs,
    constant,
    element,
    given,
    kernel,
    require_type,
    shape,
    show,
)

FLOATS = ("f32", "f64", "f16", "bf16")
FLOATS8 = ("f8e4m3fn", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz")
SIGNED = ("i8", "i16", "i32", "i64")
UNSIGNED = ("u8", "u16", "u32", "u64")
INTEGERS = (*SIGNED, *UNSIGNED)
NUMBERS = (*FLOATS, *INTEGERS)
BOOLS = ("bool",)

SIZE_TYPES = ("i64", "i32", "bool", "f32", "f64")
"""Types in which sizes are computed exactly."""


@dataclass(frozen=True)
class Row:
    """``functor`` is the name in elementwise.h, ``types`` the element types of the operands,
    ``result`` the type of the result ('': that of the operands), ``attrs`` the numbers that the
    functor is made with, in order. ``choice`` is an attribute that decides which functor it is.
    ``exponents`` are the types of a second operand that may be of another type. ``known`` computes
    with sizes (int or Sym; None: not known)."""

    op: str
    operands: int
    functor: str
    types: tuple[str, ...]
    result: str = ""
    attrs: tuple[Attr, ...] = ()
    choice: Attr | None = None
    functors: Mapping[Any, str] = field(default_factory=dict)
    exponents: tuple[str, ...] = ()
    variadic: bool = False
    known: Callable[..., Any] | None = None


def _f(name: str, default: float) -> Attr:
    return Attr(name, float, float(np.float32(default)))


def _flag(name: str, default: int) -> Attr:
    return Attr(name, int, default, choices=(0, 1))


# -- what is known of sizes -----------------------------------------------------------------------


def _quotient(a: Any, b: Any) -> Any:
    if isinstance(a, Sym) or isinstance(b, Sym):
        return a // b  # sizes are not negative
    if not b:
        return None
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _exact_quotient(a: Any, b: Any) -> Any:
    """Of floats: only what has no fraction."""
    if isinstance(a, Sym):
        return a.divided(b) if isinstance(b, Sym) or b else None
    return a // b if not isinstance(b, Sym) and b and a % b == 0 else None


def _remainder(a: Any, b: Any) -> Any:
    if isinstance(a, Sym) or isinstance(b, Sym) or b:
        return a % b
    return None


def _fmod(a: Any, b: Any) -> Any:
    if isinstance(a, Sym) or isinstance(b, Sym):
        return a % b  # sizes are not negative
    return int(fmod(a, b)) if b and max(abs(a), abs(b)) < 2**53 else None


def _equal(a: Any, b: Any) -> Any:
    if isinstance(a, Sym) != isinstance(b, Sym):
        return False if (a == -1 or b == -1) else None
    return a == b if not isinstance(a, Sym) or a == b else None


def _less(a: Any, b: Any) -> Any:
    difference = a - b
    return None if isinstance(difference, Sym) else bool(difference < 0)


def _not(a: Any) -> Any:
    return None if a is None else not a


def _same(x: Any) -> Any:
    return x


ROWS: tuple[Row, ...] = (
    Row("Add", 2, "Add", NUMBERS, known=lambda a, b: a + b),
    Row("Sub", 2, "Sub", NUMBERS, known=lambda a, b: a - b),
    Row("Mul", 2, "Mul", NUMBERS, known=lambda a, b: a * b),
    Row("Div", 2, "Div", NUMBERS, known=_quotient),
    Row("Mod", 2, "Mod", NUMBERS, known=_remainder,
        choice=_flag("fmod", 0), functors={0: "Mod", 1: "Fmod"}),
    Row("Pow", 2, "Pow", (*FLOATS, "i32", "i64"), exponents=NUMBERS),
    Row("PRelu", 2, "PRelu", (*FLOATS, "i32", "i64", "u32", "u64")),
    Row("Max", 2, "Max", NUMBERS, variadic=True, known=lambda a, b: dims.call("max", a, b)),
    Row("Min", 2, "Min", NUMBERS, variadic=True, known=lambda a, b: dims.call("min", a, b)),
    Row("Sum", 2, "Add", FLOATS, variadic=True),
    Row("Mean", 2, "Mean", FLOATS, variadic=True),
    Row("Equal", 2, "Equal", (*NUMBERS, *BOOLS), "bool", known=_equal),
    Row("Less", 2, "Less", NUMBERS, "bool", known=_less),
    Row("LessOrEqual", 2, "LessOrEqual", NUMBERS, "bool", known=lambda a, b: _not(_less(b, a))),
    Row("Greater", 2, "Greater", NUMBERS, "bool", known=lambda a, b: _less(b, a)),
    Row("GreaterOrEqual", 2, "GreaterOrEqual", NUMBERS, "bool",
        known=lambda a, b: _not(_less(a, b))),
    Row("And", 2, "BitwiseAnd", BOOLS, known=lambda a, b: a and b),
    Row("Or", 2, "BitwiseOr", BOOLS, known=lambda a, b: a or b),
    Row("Xor", 2, "Xor", BOOLS, known=lambda a, b: a != b),
    Row("Not", 1, "Not", BOOLS, known=_not),
    Row("BitwiseAnd", 2, "BitwiseAnd", INTEGERS),
    Row("BitwiseOr", 2, "BitwiseOr", INTEGERS),
    Row("BitwiseXor", 2, "BitwiseXor", INTEGERS),
    Row("BitwiseNot", 1, "BitwiseNot", INTEGERS),
    Row("BitShift", 2, "", INTEGERS, choice=Attr("direction", str, choices=("LEFT", "RIGHT")),
        functors={"LEFT": "ShiftLeft", "RIGHT": "ShiftRight"}),
    Row("Abs", 1, "Abs", NUMBERS),
    Row("Neg", 1, "Neg", (*FLOATS, *SIGNED), known=lambda a: -a),
    Row("Sign", 1, "Sign", NUMBERS),
    Row("Reciprocal", 1, "Reciprocal", FLOATS),
    Row("IsNaN", 1, "IsNaN", (*FLOATS, *FLOATS8), "bool"),
    Row("IsInf", 1, "IsInf", (*FLOATS, *FLOATS8), "bool",
        attrs=(_flag("detect_negative", 1), _flag("detect_positive", 1))),
    Row("Floor", 1, "Floor", FLOATS, known=_same),
    Row("Ceil", 1, "Ceil", FLOATS, known=_same),
    Row("Round", 1, "Round", FLOATS, known=_same),
    *(Row(op, 1, op, FLOATS) for op in (
        "Sqrt", "Exp", "Log", "Erf", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh",
        "Tanh", "Asinh", "Acosh", "Atanh", "Sigmoid", "HardSwish", "Softplus", "Softsign", "Mish",
    )),
    Row("Relu", 1, "Relu", (*FLOATS, *SIGNED), known=lambda a: dims.call("max", a, 0)),
    Row("LeakyRelu", 1, "LeakyRelu", FLOATS, attrs=(_f("alpha", 0.01),)),
    Row("ThresholdedRelu", 1, "ThresholdedRelu", FLOATS, attrs=(_f("alpha", 1.0),)),
    Row("HardSigmoid", 1, "HardSigmoid", FLOATS, attrs=(_f("alpha", 0.2), _f("beta", 0.5))),
    Row("Elu", 1, "Elu", FLOATS, attrs=(_f("alpha", 1.0),)),
    Row("Selu", 1, "Selu", FLOATS,
        attrs=(_f("alpha", 1.6732631921768188), _f("gamma", 1.0507010221481323))),
    Row("Celu", 1, "Celu", FLOATS, attrs=(_f("alpha", 1.0),)),
    Row("Swish", 1, "Swish", FLOATS, attrs=(_f("alpha", 1.0),)),
    Row("Gelu", 1, "", FLOATS, choice=Attr("approximate", str, "none", choices=("none", "tanh")),
        functors={"none": "Gelu", "tanh": "GeluTanh"}),
    Row("Shrink", 1, "Shrink", NUMBERS, attrs=(_f("bias", 0.0), _f("lambd", 0.5))),
)


def known_numbers(
    node: Node, graph: Graph, inputs: Sequence[Known | None]
) -> list[Known] | None:
    """The operands as far as they are integers that are known when compiling; floats too.

    None if one is unknown, or of a type that sizes are not computed in.
    """
    result: list[Known] = []
    for index, found in enumerate(inputs):
        if element(node, graph, index).name not in SIZE_TYPES:
            return None
        if found is None:
            data = constant(graph, given(node, index))
            if data is None or data.dtype.kind != "f" or data.size > 64:
                return None
            if not np.all(np.isfinite(data)) or np.any(data != np.trunc(data)):
                return None
            found = np.array([int(v) for v in data.reshape(-1)], object).reshape(data.shape)
        result.append(found)
    return result


class _Elementwise(TensorOp):
    row: Row

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        row = self.row
        check_inputs(node, 1 if row.variadic else row.operands,
                     len(node.inputs) if row.variadic else row.operands)
        first = require_type(node, graph, 0, row.types)
        for index in range(1, len(node.inputs)):
            if row.exponents:
                require_type(node, graph, index, row.exponents)
            elif element(node, graph, index).name != first:
                raise BadInput(f"{row.op} of {first} and {element(node, graph, index).name}: the "
                               "types must be equal", node.name)
        shapes = [shape(node, graph, i) for i in range(len(node.inputs))]
        return [(broadcast(node, *shapes), row.result or first)]

    def values(
        self, node: Node, graph: Graph, inputs: Sequence[Known | None]
    ) -> list[Known | None]:
        row = self.row
        if row.known is None or not inputs:
            return [None]
        operands = known_numbers(node, graph, inputs)
        if operands is None:
            return [None]
        rule = row.known
        if row.choice is not None and row.choice.name == "fmod" and node.attrs["fmod"]:
            rule = _fmod
        if rule is _quotient and element(node, graph, 0).floating:
            rule = _exact_quotient
        function = np.frompyfunc(
            lambda *xs: None if any(x is None for x in xs) else rule(*xs), row.operands, 1
        )
        result = np.asarray(
            function(*operands) if row.operands == 1 else reduce(function, operands), object
        )
        return [None if any(v is None for v in result.reshape(-1)) else result]

    def functor(self, node: Node) -> str:
        """The functor's name in C++."""
        row = self.row
        name = row.functors[node.attrs[row.choice.name]] if row.choice else row.functor
        return f"functor::{name}"

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        row = self.row
        kinds = [element(node, graph, i).name for i in range(len(node.inputs))]
        wrong = Problem("shapes cannot be broadcast together")
        if row.variadic:
            return Call("elementwise.h", "fold", (self.functor(node), kinds[0]),
                        (Ref(node.outputs[0]), Refs(tuple(node.inputs)), wrong))
        result = graph.values[node.outputs[0]].dtype
        attrs = Floats(tuple(float(node.attrs[a.name]) for a in row.attrs))
        function = ("map", "zip")[row.operands - 1]
        return kernel(node, "elementwise.h", function, (self.functor(node), result, *kinds), attrs,
                      wrong)


for _row in ROWS:
    register(
        type(
            _row.op,
            (_Elementwise,),
            {
                "name": f"onnx.{_row.op}",
                "inputs": ", ".join("ab"[: _row.operands]) + (", .." if _row.variadic else ""),
                "attrs": (*_row.attrs, *((_row.choice,) if _row.choice else ())),
                "row": _row,
                "__doc__": f"ONNX {_row.op}, number by number, with broadcasting.",
            },
        )
    )


@register
class Clip(TensorOp):
    """``x`` between the scalars ``min`` and ``max``; either may be absent. ``max`` wins."""

    name = "onnx.Clip"
    inputs = "x, min?, max?"

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1, 3)
        kind = require_type(node, graph, 0, NUMBERS)
        for index in (1, 2):
            if not given(node, index):
                continue
            bound = element(node, graph, index).name
            # bounds that were attributes are f32
            if bound != kind and bound != "f32":
                raise BadInput(f"Clip of {kind} has bounds of {bound}", node.name)
            if any(d != 1 for d in shape(node, graph, index)):
                raise BadInput(f"a bound of Clip has the shape {show(shape(node, graph, index))}; "
                               "it must be a scalar", node.name)
        return [(shape(node, graph, 0), kind)]

    def values(
        self, node: Node, graph: Graph, inputs: Sequence[Known | None]
    ) -> list[Known | None]:
        present = Node(node.op, node.name, [n for n in node.inputs if n], node.outputs)
        found = known_numbers(
            present, graph, [i for i, n in zip(inputs, node.inputs, strict=True) if n]
        )
        if found is None:
            return [None]
        result = found[0].reshape(-1)
        names = [("x", "max", "min")[i] for i, n in enumerate(node.inputs) if n]
        for function, bound in zip(names[1:], found[1:], strict=True):
            limit = bound.reshape(-1)[0]
            result = np.array([dims.call(function, v, limit) for v in result], object)
        return [result.reshape(found[0].shape)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        kind = element(node, graph, 0).name
        bounds = [element(node, graph, i).name for i in (1, 2) if given(node, i)]
        return kernel(node, "elementwise.h", "clip", (kind, (bounds or [kind])[0]),
                      inputs=(0, 1, 2))
