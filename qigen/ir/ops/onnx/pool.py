"""Pools over windows and over whole images."""

from __future__ import annotations

from dataclasses import dataclass

from qigen.errors import BadInput
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.ops.onnx.linear import FLOATS
from qigen.ir.ops.onnx.window import WINDOW, Window, window
from qigen.ir.schema import Attr, register
from qigen.ir.tensor import (
    Alias,
    Argument,
    Call,
    Ref,
    TensorOp,
    check_inputs,
    element,
    kernel,
    require_type,
    shape,
)

CEIL = Attr("ceil_mode", int, 0, choices=(0, 1))


class _Pool(TensorOp):
    def window(self, node: Node, graph: Graph) -> Window:
        return window(node, shape(node, graph, 0), ceil=bool(node.attrs["ceil_mode"]))

    def pooled(self, node: Node, graph: Graph) -> Shape:
        """The shape of the result."""
        return (*shape(node, graph, 0)[:2], *self.window(node, graph).out)

    def pool(self, node: Node, graph: Graph, function: str, *attributes: Argument) -> Call:
        """The call with the window behind the tensors."""
        arguments = self.window(node, graph).arguments()
        types = (element(node, graph, 0).name,)
        return kernel(node, "pool.h", function, types, *arguments, *attributes)


@register
class MaxPool(_Pool):
    """The largest number of every window; the second result tells where it is."""

    name = "onnx.MaxPool"
    inputs = "X[B, C, ..]"
    attrs = (*WINDOW, CEIL, Attr("storage_order", int, 0, choices=(0, 1)))

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        kind = require_type(node, graph, 0, (*FLOATS, "i8", "u8"))
        result = self.pooled(node, graph)
        return [(result, kind), (result, "i64")][: len(node.outputs)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        call = self.pool(node, graph, "max_pool", bool(node.attrs["storage_order"]))
        if len(node.outputs) > 1:
            return call
        return Call(call.header, call.function, call.types, (call.args[0], Ref(""), *call.args[1:]))


@register
class AveragePool(_Pool):
    """The mean of every window, of the pixels in it or (count_include_pad) with its borders."""

    name = "onnx.AveragePool"
    inputs = "X[B, C, ..]"
    attrs = (*WINDOW, CEIL, Attr("count_include_pad", int, 0, choices=(0, 1)))

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        return [(self.pooled(node, graph), require_type(node, graph, 0, FLOATS))]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return self.pool(node, graph, "average_pool", bool(node.attrs["count_include_pad"]))


@register
class LpPool(_Pool):
    """The p-norm of every window."""

    name = "onnx.LpPool"
    inputs = "X[B, C, ..]"
    attrs = (*WINDOW, CEIL, Attr("p", int, 2, minimum=1))

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        return [(self.pooled(node, graph), require_type(node, graph, 0, FLOATS))]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return self.pool(node, graph, "lp_pool", float(node.attrs["p"]))


@dataclass(frozen=True)
class _Row:
    op: str
    function: str
    attrs: tuple[Attr, ...] = ()


class _GlobalPool(TensorOp):
    row: _Row

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        kind = require_type(node, graph, 0, FLOATS)
        source = shape(node, graph, 0)
        if len(source) < 2:
            raise BadInput(f"{node.op} needs [batch, channels, ..]", node.name)
        return [((*source[:2], *(1,) * (len(source) - 2)), kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        attributes = (float(node.attrs[a.name]) for a in self.row.attrs)
        types = (element(node, graph, 0).name,)
        return kernel(node, "pool.h", self.row.function, types, *attributes)


for _row in (
    _Row("GlobalAveragePool", "global_average_pool"),
    _Row("GlobalMaxPool", "global_max_pool"),
    _Row("GlobalLpPool", "global_lp_pool", (Attr("p", int, 2, minimum=1),)),
):
    register(
        type(
            _row.op,
            (_GlobalPool,),
            {
                "name": f"onnx.{_row.op}",
                "inputs": "X[B, C, ..]",
                "attrs": _row.attrs,
                "row": _row,
                "__doc__": f"ONNX {_row.op}: a pool whose window is the whole image.",
            },
        )
    )
