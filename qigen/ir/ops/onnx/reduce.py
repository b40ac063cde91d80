"""Reductions over axes, and softmax and its kin: one row an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import numpy as np

from qigen.errors import BadInput
from qigen.ir import dims
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.ops.onnx.elementwise import BOOLS, FLOATS, NUMBERS
from qigen.ir.schema import Array, Attr, Evaluation, register
from qigen.ir.tensor import (
    Alias,
    Call,
    Known,
    Problem,
    Ref,
    RunInts,
    TensorOp,
    argument,
    axis_of,
    check_inputs,
    declared_rank,
    fresh_shape,
    kernel,
    parameter,
    require_type,
    shape,
)

SUMMED = (*FLOATS, "i32", "i64", "u32", "u64")


@dataclass(frozen=True)
class Row:
    """``known`` joins two sizes; ``reducer`` is the name in reduce.h."""

    op: str
    reducer: str
    types: tuple[str, ...]
    known: Callable[[Any, Any], Any] | None = None


ROWS: tuple[Row, ...] = (
    Row("ReduceSum", "Sum", SUMMED, lambda a, b: a + b),
    Row("ReduceProd", "Prod", SUMMED, lambda a, b: a * b),
    Row("ReduceMax", "Max", (*NUMBERS, *BOOLS), lambda a, b: dims.call("max", a, b)),
    Row("ReduceMin", "Min", (*NUMBERS, *BOOLS), lambda a, b: dims.call("min", a, b)),
    Row("ReduceMean", "Mean", SUMMED),
    Row("ReduceL1", "L1", SUMMED),
    Row("ReduceL2", "L2", SUMMED),
    Row("ReduceSumSquare", "SumSquare", SUMMED),
    Row("ReduceLogSum", "LogSum", SUMMED),
    Row("ReduceLogSumExp", "LogSumExp", SUMMED),
)

_AXES = Problem("axes are out of range, named twice, or not as many as the result's rank says")


class _Reduce(TensorOp):
    row: Row
    inputs = "data, axes?"
    attrs = (
        Attr("axes", tuple, None),
        Attr("keepdims", int, 1, choices=(0, 1)),
        Attr("noop_with_empty_axes", int, 0, choices=(0, 1)),
    )
    parameters: ClassVar[dict[int, str]] = {1: "axes"}

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1, 2)
        kind = require_type(node, graph, 0, self.row.types)
        source = shape(node, graph, 0)
        reduced = self._reduced(node, graph)
        keep = node.attrs["keepdims"]
        if reduced is None:
            return [(fresh_shape(node, 0, self._rank(node, graph)), kind)]
        kept = [
            1 if i in reduced else d for i, d in enumerate(source) if keep or i not in reduced
        ]
        return [(tuple(kept), kind)]

    def _reduced(self, node: Node, graph: Graph) -> set[int] | None:
        """The axes that are reduced; None if the run decides."""
        rank = len(shape(node, graph, 0))
        axes = parameter(node, graph, 1, "axes")
        if isinstance(axes, RunInts):
            return None
        if not axes:
            return set() if node.attrs["noop_with_empty_axes"] else set(range(rank))
        reduced = [axis_of(node, a, rank) for a in axes]
        if len(set(reduced)) != len(reduced):
            raise BadInput(f"axes {axes} name one axis twice", node.name)
        return set(reduced)

    def _rank(self, node: Node, graph: Graph) -> int:
        """The result's rank where the run decides the axes."""
        rank = len(shape(node, graph, 0))
        if node.attrs["keepdims"]:
            return rank
        count = graph.values[node.inputs[1]].shape
        if len(count) == 1 and isinstance(count[0], int) and 0 < count[0] <= rank:
            return rank - count[0]
        return declared_rank(node, graph)

    def values(
        self, node: Node, graph: Graph, inputs: Sequence[Known | None]
    ) -> list[Known | None]:
        row = self.row
        reduced = self._reduced(node, graph)
        data = inputs[0]
        if data is None or not data.size or row.known is None or reduced is None:
            return [None]
        rest = [i for i in range(data.ndim) if i not in reduced]
        count = dims.product(data.shape[i] for i in reduced)
        rows = data.transpose([*rest, *sorted(reduced)]).reshape(-1, count)
        out = graph.values[node.outputs[0]].shape
        result = np.empty(len(rows), object)
        result[:] = [reduce(row.known, list(r)) for r in rows]
        return [result.reshape([int(str(d)) for d in out])]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        axes = parameter(node, graph, 1, "axes")
        if not isinstance(axes, RunInts):
            return None
        return Call("reduce.h", "reduce_sizes", (),
                    (Ref(node.inputs[0]), axes, not node.attrs["noop_with_empty_axes"],
                     bool(node.attrs["keepdims"]), self._rank(node, graph), _AXES))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        kind = graph.values[node.outputs[0]].dtype
        axes = argument(parameter(node, graph, 1, "axes"))
        return kernel(node, "reduce.h", "reduce", (f"reducer::{self.row.reducer}", kind), axes,
                      not node.attrs["noop_with_empty_axes"], _AXES, inputs=(0,))


for _row in ROWS:
    register(
        type(
            _row.op,
            (_Reduce,),
            {
                "name": f"onnx.{_row.op}",
                "row": _row,
                "__doc__": f"ONNX {_row.op}: over the axes that are named, or over all.",
            },
        )
    )


class _Normalize(TensorOp):
    inputs = "x"
    attrs = (Attr("axis", int, -1), Attr("flatten", bool, False))
    normalizer: str

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        kind = require_type(node, graph, 0, FLOATS)
        self._axis(node, len(shape(node, graph, 0)))
        return [(shape(node, graph, 0), kind)]

    def _axis(self, node: Node, rank: int) -> int:
        axis: int = node.attrs["axis"]
        if node.attrs["flatten"] and axis == rank:
            return axis  # rows of one element
        return axis_of(node, axis, max(rank, 1))

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        x = inputs[0].astype(np.float64)
        axis = self._axis(node, x.ndim)
        if node.attrs["flatten"]:
            x = x.reshape(int(np.prod(x.shape[:axis])), -1)
            axis = 1
        else:
            x = x.reshape(x.shape or (1,))
        if self.normalizer == "Hardmax":
            y = np.zeros_like(x)
            np.put_along_axis(y, np.expand_dims(x.argmax(axis), axis), 1, axis)
        else:
            shifted = x - x.max(axis, keepdims=True)
            total = np.exp(shifted).sum(axis, keepdims=True)
            log = self.normalizer == "LogSoftmax"
            y = shifted - np.log(total) if log else np.exp(shifted) / total
        return [y.reshape(inputs[0].shape).astype(inputs[0].dtype)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        kind = graph.values[node.outputs[0]].dtype
        axis = self._axis(node, len(shape(node, graph, 0)))
        return kernel(node, "reduce.h", "normalize", (f"normalizer::{self.normalizer}", kind),
                      axis, bool(node.attrs["flatten"]))


for _name in ("Softmax", "LogSoftmax", "Hardmax"):
    register(
        type(
            _name,
            (_Normalize,),
            {
                "name": f"onnx.{_name}",
                "normalizer": _name,
                "__doc__": f"ONNX {_name} along ``axis``, or, with ``flatten`` (before opset 13), "
                "along all axes from it on.",
            },
        )
    )
