"""Operators that order elements or accumulate along an axis: TopK, ArgMax, Unique, CumSum, ...

Kernels in ``templates/tensor/selection.h``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from qigen.errors import BadInput
from qigen.ir import dims
from qigen.ir.dims import Sym
from qigen.ir.graph import Dim, Graph, Node
from qigen.ir.ops.onnx.elementwise import BOOLS, NUMBERS
from qigen.ir.ops.onnx.movement import Result, sizes_of
from qigen.ir.schema import Attr, register
from qigen.ir.tensor import (
    Alias,
    Call,
    Problem,
    Ref,
    RunInts,
    TensorOp,
    argument,
    axis_of,
    check_inputs,
    element,
    fresh,
    given,
    kernel,
    parameter,
    require_type,
    show,
)


@register
class TopK(TensorOp):
    """The ``k`` largest (or smallest) of an axis in order, and where they are."""

    name = "onnx.TopK"
    inputs = "x, k"
    attrs = (
        Attr("k", tuple, None), Attr("axis", int, -1), Attr("largest", int, 1, choices=(0, 1)),
        Attr("sorted", int, 1, choices=(0, 1)),
    )
    parameters: ClassVar[dict[int, str]] = {1: "k"}
    results = 2  # the kernel's heap is in the indices

    def infer(self, node: Node, graph: Graph) -> Result:
        source = sizes_of(node, graph, 0)
        kind = require_type(node, graph, 0, NUMBERS)
        if not source:
            raise BadInput("TopK of a scalar", node.name)
        axis = axis_of(node, node.attrs["axis"], len(source))
        asked = parameter(node, graph, 1, "k")
        if asked is None or (not isinstance(asked, RunInts) and len(asked) != 1):
            raise BadInput("TopK needs one k", node.name)
        k: Any = fresh(node, 0, axis) if isinstance(asked, RunInts) else asked[0]
        d = source[axis]
        if not isinstance(k, Sym) and (k < 0 or (isinstance(d, int) and k > d)):
            raise BadInput(f"k is {k} for axis {axis} of {show(source)}", node.name)
        size = (*source[:axis], k, *source[axis + 1 :])
        return [(size, kind), (size, "i64")]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        axis = axis_of(node, node.attrs["axis"], len(sizes_of(node, graph, 0)))
        k = argument(parameter(node, graph, 1, "k"))
        return Call("selection.h", "top_k_sizes", (),
                    (Ref(node.inputs[0]), k, axis, Problem("k is out of range")))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        axis = axis_of(node, node.attrs["axis"], len(sizes_of(node, graph, 0)))
        return kernel(node, "selection.h", "top_k", (element(node, graph, 0).name,), axis,
                      bool(node.attrs["largest"]), Problem("k is out of range"), inputs=(0,))


class _ArgExtreme(TensorOp):
    """The place of the largest or smallest element of an axis."""

    inputs = "x"
    attrs = (
        Attr("axis", int, 0), Attr("keepdims", int, 1, choices=(0, 1)),
        Attr("select_last_index", int, 0, choices=(0, 1)),
    )

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 1)
        source = sizes_of(node, graph, 0)
        require_type(node, graph, 0, NUMBERS)
        axis = axis_of(node, node.attrs["axis"], max(1, len(source)))
        kept = (1,) if node.attrs["keepdims"] and source else ()
        return [((*source[:axis], *kept, *source[axis + 1 :]), "i64")]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        axis = axis_of(node, node.attrs["axis"], max(1, len(sizes_of(node, graph, 0))))
        return kernel(
            node, "selection.h", "arg_extreme", (element(node, graph, 0).name,), axis,
            node.op == "onnx.ArgMax", bool(node.attrs["select_last_index"]),
            Problem("the axis has no elements"),
        )


class _Cumulated(TensorOp):
    """Sums or products of what is before every element of an axis."""

    inputs = "x, axis"
    attrs = (
        Attr("axis", tuple, None), Attr("exclusive", int, 0, choices=(0, 1)),
        Attr("reverse", int, 0, choices=(0, 1)),
    )
    parameters: ClassVar[dict[int, str]] = {1: "axis"}
    fold = False  # the reference wants the axis as a scalar

    def infer(self, node: Node, graph: Graph) -> Result:
        kind = require_type(node, graph, 0, NUMBERS)
        source = sizes_of(node, graph, 0)
        axis = parameter(node, graph, 1, "axis")
        if axis is None or (not isinstance(axis, RunInts) and len(axis) != 1):
            raise BadInput(f"{node.op} needs one axis", node.name)
        if not isinstance(axis, RunInts):
            axis_of(node, axis[0], len(source))
        return [(source, kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        functor = "scan::Sum" if node.op == "onnx.CumSum" else "scan::Product"
        return kernel(
            node, "selection.h", "cumulate", (functor, element(node, graph, 0).name),
            argument(parameter(node, graph, 1, "axis")), bool(node.attrs["exclusive"]),
            bool(node.attrs["reverse"]), Problem("its axis is out of range"), inputs=(0,),
        )


for _op, _base, _doc in (
    ("ArgMax", _ArgExtreme, "Where the largest element of an axis is."),
    ("ArgMin", _ArgExtreme, "Where the smallest element of an axis is."),
    ("CumSum", _Cumulated, "Sums of the elements up to each one of an axis."),
    ("CumProd", _Cumulated, "Products of the elements up to each one of an axis."),
):
    register(type(_op, (_base,), {"name": f"onnx.{_op}", "__doc__": _doc}))


@register
class Unique(TensorOp):
    """The different elements, or slices of an axis; where they are first, and how often."""

    name = "onnx.Unique"
    inputs = "x"
    attrs = (Attr("axis", int, None), Attr("sorted", int, 1, choices=(0, 1)))
    fold = False
    results = 5  # the last is memory to sort in, and the kernel needs the inverse indices

    def _axis(self, node: Node, graph: Graph) -> int:
        axis = node.attrs["axis"]
        return -1 if axis is None else axis_of(node, axis, len(sizes_of(node, graph, 0)))

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 1)
        kind = require_type(node, graph, 0, (*NUMBERS, *BOOLS))
        source, axis = sizes_of(node, graph, 0), self._axis(node, graph)
        if axis < 0:
            n, count = dims.product(source), fresh(node, 0, 0)
            size: tuple[Dim, ...] = (count,)
        else:
            n, count = source[axis], fresh(node, 0, axis)
            size = (*source[:axis], count, *source[axis + 1 :])
        return [(size, kind), ((count,), "i64"), ((n,), "i64"), ((count,), "i64"), ((n,), "i64")]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        return Call("selection.h", "unique_sizes", (element(node, graph, 0).name,), (
            Ref(node.outputs[4]), Ref(node.outputs[2]), Ref(node.inputs[0]),
            self._axis(node, graph), bool(node.attrs["sorted"]),
        ))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "selection.h", "unique", (), self._axis(node, graph),
                      element(node, graph, 0).bytes)


@register
class NonMaxSuppression(TensorOp):
    """Boxes by score without those that overlap a better one: rows of batch, class and box."""

    name = "onnx.NonMaxSuppression"
    inputs = "boxes, scores, max_output?, iou_threshold?, score_threshold?"
    attrs = (Attr("max_output", tuple, None), Attr("center_point_box", int, 0, choices=(0, 1)))
    parameters: ClassVar[dict[int, str]] = {2: "max_output"}
    fold = False
    results = 3  # also memory to sort in, and for what is chosen before its number is known

    def infer(self, node: Node, graph: Graph) -> Result:
        boxes, scores = sizes_of(node, graph, 0), sizes_of(node, graph, 1)
        for index in (0, 1, 3, 4):
            if index < 2 or given(node, index):
                require_type(node, graph, index, ("f32",))
        if len(boxes) != 3 or len(scores) != 3 or boxes[2] != 4:
            raise BadInput(f"boxes {show(boxes)} and scores {show(scores)} must be [batch, boxes, "
                           "4] and [batch, classes, boxes]", node.name)
        most = parameter(node, graph, 2, "max_output")
        n = scores[2]
        each: Dim = n
        if most is None:
            each = 0
        elif not isinstance(most, RunInts) and not isinstance(most[0], Sym):
            each = dims.smaller(n, max(0, int(most[0])))
        found: Dim = scores[0] * scores[1] * each
        return [((fresh(node, 0, 0), 3), "i64"), ((n,), "i64"), ((found,), "i64")]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        return Call("selection.h", "suppress_sizes", (), (
            Ref(node.outputs[1]), Ref(node.outputs[2]), Ref(node.inputs[0]), Ref(node.inputs[1]),
            argument(parameter(node, graph, 2, "max_output")), Ref(given(node, 3)),
            Ref(given(node, 4)), bool(node.attrs["center_point_box"]),
            Problem("boxes and scores do not fit together"),
        ))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return Call("selection.h", "suppress", (),
                    (Ref(node.outputs[0]), Ref(node.outputs[2]), Ref(node.inputs[1])))
