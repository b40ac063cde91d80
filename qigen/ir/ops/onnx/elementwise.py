"""Elementwise operators of any type: one row an operator.

The kernels are functors of ``templates/tensor/elementwise.h`` under the name of the row; f32 chains
are fused into vector loops by a pass, so these serve the other types and what cannot be fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qigen.errors import BadInput, Unsupported
from qigen.ir.dims import Sym, call
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
    element,
    kernel,
    shape,
)

FLOATS = ("f32", "f64", "f16", "bf16")
SIGNED = ("i8", "i16", "i32", "i64")
UNSIGNED = ("u8", "u16", "u32", "u64")
INTEGERS = (*SIGNED, *UNSIGNED)
NUMBERS = (*FLOATS, *INTEGERS)
BOOLS = ("bool",)


@dataclass(frozen=True)
class Row:
    """``functor`` is the name in elementwise.h, ``types`` the element types of the operands,
    ``result`` the type of the result ('': that of the operands), ``attrs`` the numbers that the
    functor is made with, in order. ``known`` computes with sizes (int or Sym)."""

    op: str
    operands: int
    functor: str
    types: tuple[str, ...]
    result: str = ""
    attrs: tuple[Attr, ...] = ()
    variadic: bool = False
    known: Callable[..., Any] | None = None


def _f(name: str, default: float) -> Attr:
    return Attr(name, float, default)


def _truncated(a: Any, b: Any) -> Any:
    if isinstance(a, Sym) or isinstance(b, Sym):
        return a // b  # sizes are not negative
    return int(a / b) if b else 0


def _equal(a: Any, b: Any) -> Any:
    if isinstance(a, Sym) != isinstance(b, Sym):
        return False if (a == -1 or b == -1) else None
    return a == b if not isinstance(a, Sym) or a == b else None


ROWS: tuple[Row, ...] = (
    Row("Add", 2, "Add", NUMBERS, known=lambda a, b: a + b),
    Row("Sub", 2, "Sub", NUMBERS, known=lambda a, b: a - b),
    Row("Mul", 2, "Mul", NUMBERS, known=lambda a, b: a * b),
    Row("Div", 2, "Div", NUMBERS, known=_truncated),
    Row("Max", 2, "Max", NUMBERS, variadic=True, known=lambda a, b: call("max", a, b)),
    Row("Min", 2, "Min", NUMBERS, variadic=True, known=lambda a, b: call("min", a, b)),
    Row("Equal", 2, "Equal", (*NUMBERS, *BOOLS), "bool", known=_equal),
    Row("Relu", 1, "Relu", (*FLOATS, *SIGNED)),
    Row("Sqrt", 1, "Sqrt", FLOATS),
    Row("LeakyRelu", 1, "LeakyRelu", FLOATS, attrs=(_f("alpha", 0.01),)),
)


class _Elementwise(TensorOp):
    row: Row

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        row = self.row
        check_inputs(node, 1 if row.variadic else row.operands,
                     len(node.inputs) if row.variadic else row.operands)
        kinds = [element(node, graph, i).name for i in range(len(node.inputs))]
        if len(set(kinds)) != 1:
            raise BadInput(f"{row.op} of {' and '.join(kinds)}: the types must be equal", node.name)
        if kinds[0] not in row.types:
            raise Unsupported(
                f"{row.op} of {kinds[0]} has no kernel; there are kernels for "
                f"{', '.join(row.types)}", node.name
            )
        shapes = [shape(node, graph, i) for i in range(len(node.inputs))]
        return [(broadcast(node, *shapes), row.result or kinds[0])]

    def values(self, node: Node, graph: Graph, inputs: Sequence[Known | None]) -> list[Known | None]:
        row = self.row
        if row.known is None or len(inputs) != row.operands or any(i is None for i in inputs):
            return [None]
        if element(node, graph, 0).floating:
            return [None]
        result = np.asarray(np.frompyfunc(row.known, row.operands, 1)(*inputs), object)
        return [None if any(v is None for v in result.reshape(-1)) else result]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        row = self.row
        result = graph.values[node.outputs[0]].dtype
        functor = f"functor::{row.functor}"
        attrs = Floats(tuple(float(node.attrs[a.name]) for a in row.attrs))
        kind = element(node, graph, 0).name
        wrong = Problem("shapes cannot be broadcast together")
        if row.variadic and len(node.inputs) != 2:
            refs = Refs(tuple(node.inputs))
            return Call("elementwise.h", "fold", (functor, kind),
                        (Ref(node.outputs[0]), refs, wrong))
        function = ("map", "zip", "zip3")[row.operands - 1]
        return kernel(node, "elementwise.h", function, (functor, result, kind), attrs, wrong)


for _row in ROWS:
    register(
        type(
            _row.op,
            (_Elementwise,),
            {
                "name": f"onnx.{_row.op}",
                "inputs": ", ".join("abc"[: _row.operands]) + (", .." if _row.variadic else ""),
                "attrs": _row.attrs,
                "row": _row,
                "__doc__": f"ONNX {_row.op}, number by number, with broadcasting.",
            },
        )
    )
