"""Operators that change or tell shapes and move no data: Reshape and its kin, Shape, Size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from qigen.errors import BadInput, Unsupported
from qigen.ir import dims
from qigen.ir.dims import Sym
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.schema import Array, Attr, Evaluation, register
from qigen.ir.tensor import (
    Alias,
    Call,
    Known,
    Problem,
    Ref,
    RunInts,
    TensorOp,
    axis_of,
    check_inputs,
    declared_rank,
    element,
    fresh_shape,
    kernel,
    parameter,
    shape,
    show,
)


class _View(TensorOp):
    """A result that is the input's memory with another shape."""

    def values(
        self, node: Node, graph: Graph, inputs: Sequence[Known | None]
    ) -> list[Known | None]:
        new = graph.values[node.outputs[0]].shape
        if inputs[0] is None or not dims.is_static(new):
            return [None]
        return [inputs[0].reshape(tuple(int(str(d)) for d in new))]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return Alias(node.inputs[0])


@register
class Reshape(_View):
    """``data`` with the shape ``shape``: -1 is what is left, 0 the input's size (unless
    allowzero)."""

    name = "onnx.Reshape"
    inputs = "data, shape"
    attrs = (Attr("shape", tuple, None), Attr("allowzero", int, 0, choices=(0, 1)))
    parameters: ClassVar[dict[int, str]] = {1: "shape"}

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        source = shape(node, graph, 0)
        asked = parameter(node, graph, 1, "shape")
        kind = element(node, graph, 0).name
        if asked is None:
            raise BadInput("Reshape needs a shape", node.name)
        if isinstance(asked, RunInts):
            count = graph.values[asked.name].shape
            rank = count[0] if len(count) == 1 and isinstance(count[0], int) else None
            if rank is None:
                rank = declared_rank(node, graph)
            return [(fresh_shape(node, 0, rank), kind)]
        return [(self._resolve(node, source, asked), kind)]

    def _resolve(self, node: Node, source: Shape, asked: Sequence[Any]) -> Shape:
        sizes: list[Any] = []
        for axis, d in enumerate(asked):
            if not isinstance(d, Sym) and d == 0 and not node.attrs["allowzero"]:
                if axis >= len(source):
                    raise BadInput(
                        f"shape {show(tuple(asked))} copies axis {axis} of a tensor of "
                        f"rank {len(source)}",
                        node.name,
                    )
                d = source[axis]
            sizes.append(d)
        rest = [i for i, d in enumerate(sizes) if not isinstance(d, Sym) and d == -1]
        if len(rest) > 1 or any(not isinstance(d, Sym) and d < -1 for d in sizes):
            raise BadInput(f"shape {show(tuple(asked))} makes no sense", node.name)
        total = dims.product(source)
        others = dims.product(d for d in sizes if isinstance(d, Sym) or d != -1)
        if rest:
            if (
                not isinstance(total, Sym)
                and not isinstance(others, Sym)
                and (others == 0 or total % others)
            ):
                raise BadInput(
                    f"a tensor of shape {show(source)} cannot become {show(tuple(asked))}",
                    node.name,
                )
            sizes[rest[0]] = dims.floordiv(total, others)
        elif not isinstance(total, Sym) and not isinstance(others, Sym) and total != others:
            raise BadInput(
                f"a tensor of shape {show(source)} cannot become {show(tuple(asked))}", node.name
            )
        return tuple(sizes)

    def measure(self, node: Node, graph: Graph) -> Call | None:
        asked = parameter(node, graph, 1, "shape")
        if not isinstance(asked, RunInts):
            return None
        wrong = Problem("the data does not fit the shape")
        return Call(
            "shape.h",
            "reshape_sizes",
            (),
            (Ref(node.inputs[0]), asked, bool(node.attrs["allowzero"]), wrong),
        )


@register
class Flatten(_View):
    """Two axes: the product of those before ``axis``, and of the rest."""

    name = "onnx.Flatten"
    inputs = "data"
    attrs = (Attr("axis", int, 1),)

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        source = shape(node, graph, 0)
        axis = node.attrs["axis"]
        axis = axis if axis == len(source) else axis_of(node, axis, max(len(source), 1))
        return [
            (
                (dims.product(source[:axis]), dims.product(source[axis:])),
                element(node, graph, 0).name,
            )
        ]


@register
class Squeeze(_View):
    """Without axes of size 1: those in ``axes``, or all."""

    name = "onnx.Squeeze"
    inputs = "data, axes?"
    attrs = (Attr("axes", tuple, None),)
    parameters: ClassVar[dict[int, str]] = {1: "axes"}

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        source = shape(node, graph, 0)
        kind = element(node, graph, 0).name
        axes = parameter(node, graph, 1, "axes")
        if isinstance(axes, RunInts):
            return [(fresh_shape(node, 0, declared_rank(node, graph)), kind)]
        if axes is None:
            if any(
                isinstance(d, Sym) and any(n.startswith("run_") for n in d.names()) for d in source
            ):
                raise Unsupported(
                    "which axes have the size 1 is only known at run time; name them", node.name
                )
            return [(tuple(d for d in source if d != 1), kind)]
        dropped = {axis_of(node, a, len(source)) for a in axes}
        for axis in dropped:
            if isinstance(source[axis], int) and source[axis] != 1:
                raise BadInput(f"axis {axis} of {show(source)} has not the size 1", node.name)
        return [(tuple(d for i, d in enumerate(source) if i not in dropped), kind)]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        axes = parameter(node, graph, 1, "axes")
        if not isinstance(axes, RunInts):
            return None
        return Call("shape.h", "squeeze_sizes", (), (Ref(node.inputs[0]), axes))


@register
class Unsqueeze(_View):
    """With axes of size 1 at the places ``axes`` of the result."""

    name = "onnx.Unsqueeze"
    inputs = "data, axes"
    attrs = (Attr("axes", tuple, None),)
    parameters: ClassVar[dict[int, str]] = {1: "axes"}

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        source = shape(node, graph, 0)
        kind = element(node, graph, 0).name
        axes = parameter(node, graph, 1, "axes")
        if axes is None:
            raise BadInput("Unsqueeze needs axes", node.name)
        if isinstance(axes, RunInts):
            return [(fresh_shape(node, 0, declared_rank(node, graph)), kind)]
        rank = len(source) + len(axes)
        places = [axis_of(node, a, rank) for a in axes]
        if len(set(places)) != len(places):
            raise BadInput(f"axes {axes} name one axis twice", node.name)
        rest = iter(source)
        return [(tuple(1 if i in places else next(rest) for i in range(rank)), kind)]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        axes = parameter(node, graph, 1, "axes")
        if not isinstance(axes, RunInts):
            return None
        return Call("shape.h", "unsqueeze_sizes", (), (Ref(node.inputs[0]), axes))


@register
class Identity(_View):
    """The input."""

    name = "onnx.Identity"
    inputs = "x"

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        return [(shape(node, graph, 0), element(node, graph, 0).name)]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        return [inputs[0]]

    def values(
        self, node: Node, graph: Graph, inputs: Sequence[Known | None]
    ) -> list[Known | None]:
        return [inputs[0]]


@register
class ShapeOf(TensorOp):
    """The sizes of axes ``start`` to ``end`` as i64."""

    name = "onnx.Shape"
    inputs = "data"
    attrs = (Attr("start", int, 0), Attr("end", int, None))
    fold = False

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        return [((len(self._sizes(node, graph)),), "i64")]

    def _sizes(self, node: Node, graph: Graph) -> Shape:
        source = shape(node, graph, 0)
        return source[slice(node.attrs["start"], node.attrs["end"])]

    def values(
        self, node: Node, graph: Graph, inputs: Sequence[Known | None]
    ) -> list[Known | None]:
        return [np.array(self._sizes(node, graph), object)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        start, end, _ = slice(node.attrs["start"], node.attrs["end"]).indices(
            len(shape(node, graph, 0))
        )
        return kernel(node, "shape.h", "shape_of", (), start, max(start, end))


@register
class Size(TensorOp):
    """The number of elements as an i64 scalar."""

    name = "onnx.Size"
    inputs = "data"
    fold = False

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        return [((), "i64")]

    def values(
        self, node: Node, graph: Graph, inputs: Sequence[Known | None]
    ) -> list[Known | None]:
        return [np.array(dims.product(shape(node, graph, 0)), object)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "shape.h", "size_of")
