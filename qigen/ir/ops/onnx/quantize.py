"""Quantization: floats to codes and back, with scales by tensor, axis or block."""

from __future__ import annotations

from typing import Any

from qigen.errors import BadInput
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.ops.onnx.cast import target
from qigen.ir.ops.onnx.elementwise import FLOATS8
from qigen.ir.schema import Attr, register
from qigen.ir.tensor import (
    Alias,
    Call,
    Problem,
    TensorOp,
    axis_of,
    check_inputs,
    element,
    given,
    kernel,
    require_type,
    shape,
    show,
)

CODES = ("i8", "u8", "i16", "u16", "i4", "u4", "i2", "u2", "f4e2m1", *FLOATS8)
RESULTS = ("f32", "f16", "bf16")

_WRONG = Problem("scale or zero point does not fit the data")


class _Quantization(TensorOp):
    """What both directions share: ``scale`` and ``zero`` have one shape, which decides how fine the
    quantization is."""

    def _axis(self, node: Node, graph: Graph) -> tuple[int, int]:
        """Axis and block size (0: no blocks); BadInput if the scales do not fit."""
        data, scale = shape(node, graph, 0), shape(node, graph, 1)
        zero = shape(node, graph, 2) if given(node, 2) else scale
        single = ((), (1,))
        if len(zero) != len(scale) and not (zero in single and scale in single):
            raise BadInput(f"the zero point has the shape {show(zero)}, the scale {show(scale)}",
                           node.name)
        block: int = node.attrs["block_size"]
        if not block and scale in single:
            return 0, 0
        axis = axis_of(node, node.attrs["axis"], len(data))
        if not data or len(scale) != (len(data) if block else 1):
            raise BadInput(f"a scale of shape {show(scale)} does not fit data of shape "
                           f"{show(data)}" + (f" in blocks of {block}" if block else ""), node.name)
        if not block:
            self._check(node, data[axis], scale[0], data, scale)
            return axis, 0
        for i, (d, s) in enumerate(zip(data, scale, strict=True)):
            wanted: Any = -(-d // block) if i == axis and isinstance(d, int) else d
            if i != axis or isinstance(d, int):
                self._check(node, wanted, s, data, scale)
        return axis, block

    def _check(self, node: Node, wanted: Any, size: Any, data: Shape, scale: Shape) -> None:
        if isinstance(wanted, int) and isinstance(size, int) and wanted != size:
            raise BadInput(f"a scale of shape {show(scale)} does not fit data of shape "
                           f"{show(data)}", node.name)


@register
class QuantizeLinear(_Quantization):
    """``saturate(x / scale + zero)`` to nearest even, in the type of ``zero``."""

    name = "onnx.QuantizeLinear"
    inputs = "x, scale, zero?"
    attrs = (
        Attr("axis", int, 1),
        Attr("saturate", int, 1, choices=(0, 1)),
        Attr("block_size", int, 0, minimum=0),
        Attr("output_dtype", int, 0),
        Attr("precision", int, 0),
    )

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 2, 3)
        require_type(node, graph, 0, (*RESULTS, "i32"))
        require_type(node, graph, 1, (*RESULTS, "i32", "f8e8m0"))
        kind = "u8"
        if given(node, 2):
            kind = require_type(node, graph, 2, CODES)
        elif node.attrs["output_dtype"]:
            kind = target(node, "output_dtype").name
        if node.attrs["output_dtype"] and target(node, "output_dtype").name != kind:
            raise BadInput(f"the zero point is {kind}, output_dtype "
                           f"{target(node, 'output_dtype').name}", node.name)
        self._axis(node, graph)
        return [(shape(node, graph, 0), kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        kind = graph.values[node.outputs[0]].dtype
        source, scale = (element(node, graph, i).name for i in (0, 1))
        # whole numbers and powers of two are divided as floats
        precision = {"i32": "f64", "f8e8m0": "f32"}.get(scale, scale)
        if node.attrs["precision"]:
            precision = target(node, "precision").name
        axis, block = self._axis(node, graph)
        return kernel(node, "quantize.h", "quantize_linear", (kind, source, scale, precision),
                      axis, block, bool(node.attrs["saturate"]), _WRONG, inputs=(0, 1, 2))


@register
class DequantizeLinear(_Quantization):
    """``(x - zero) * scale``."""

    name = "onnx.DequantizeLinear"
    inputs = "x, scale, zero?"
    attrs = (
        Attr("axis", int, 1),
        Attr("block_size", int, 0, minimum=0),
        Attr("output_dtype", int, 0),
    )

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 2, 3)
        source = require_type(node, graph, 0, (*CODES, "i32"))
        scale = require_type(node, graph, 1, (*RESULTS, "f8e8m0"))
        if given(node, 2) and element(node, graph, 2).name != source:
            raise BadInput(f"the data is {source}, the zero point "
                           f"{element(node, graph, 2).name}", node.name)
        kind = target(node, "output_dtype").name if node.attrs["output_dtype"] else scale
        if kind not in RESULTS:
            raise BadInput(f"the result cannot be {kind}; give output_dtype", node.name)
        self._axis(node, graph)
        return [(shape(node, graph, 0), kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        kind = graph.values[node.outputs[0]].dtype
        source, scale = (element(node, graph, i).name for i in (0, 1))
        axis, block = self._axis(node, graph)
        return kernel(node, "quantize.h", "dequantize_linear", (kind, source, scale),
                      axis, block, _WRONG, inputs=(0, 1, 2))


@register
class DynamicQuantizeLinear(TensorOp):
    """``x`` as u8, with the scale and the zero point that its range asks for."""

    name = "onnx.DynamicQuantizeLinear"
    inputs = "x"
    results = 3

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        require_type(node, graph, 0, ("f32",))
        return [(shape(node, graph, 0), "u8"), ((), "f32"), ((), "u8")]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "quantize.h", "dynamic_quantize")
