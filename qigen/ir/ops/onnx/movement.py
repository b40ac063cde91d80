"""Operators that move elements and look at none: Transpose, Slice, Concat, Pad and their kin.

Their kernels are in ``templates/tensor/movement.h`` and know only how many bytes an element has.
All that shape arithmetic is made of is computed here for sizes too (``values``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from qigen.errors import BadInput, Unsupported
from qigen.ir import dims
from qigen.ir.dims import Sym
from qigen.ir.graph import Dim, Graph, Node, Shape
from qigen.ir.schema import Array, Attr, Evaluation, register
from qigen.ir.tensor import (
    Alias,
    Call,
    Ints,
    Known,
    Problem,
    Ref,
    Refs,
    RunInts,
    TensorOp,
    Word,
    argument,
    axis_of,
    broadcast,
    check_inputs,
    declared_rank,
    element,
    fresh,
    fresh_shape,
    given,
    kernel,
    known,
    parameter,
    require_type,
    show,
)
from qigen.ir.tensor import shape as shape_of
from qigen.ir.types import TYPES, of_onnx

MAX_KNOWN = 4096
"""Elements of the largest tensor whose integers are worth knowing."""

FAR = 2**31 - 1
"""Ends of slices from here on mean the end of the axis."""

Result = list[tuple[Shape, str]]
Values = list[Known | None]


def sizes_of(node: Node, graph: Graph, index: int) -> tuple[Any, ...]:
    """The shape of an input: int or Sym, never the names that graphs of language models have."""
    return shape_of(node, graph, index)


def bits(node: Node, graph: Graph, index: int) -> str:
    """The unsigned type with the size of an input's elements: it stands for all of them."""
    return f"u{8 * element(node, graph, index).bytes}"


def fresh_axes(node: Node, graph: Graph) -> Ints:
    """The axes of the first result whose sizes ``measure`` finds."""
    result = graph.values[node.outputs[0]].shape
    return Ints(tuple(
        axis for axis, d in enumerate(result)
        if isinstance(d, Sym) and str(fresh(node, 0, axis)) in d.names()
    ))


def has_fresh(node: Node, graph: Graph) -> bool:
    """Whether only the run decides a size of the first result."""
    return bool(fresh_axes(node, graph).values)


def length_of(node: Node, graph: Graph, p: tuple[Any, ...] | RunInts | None) -> int | None:
    """How many integers a parameter has; None if the run decides that."""
    if p is None:
        return 0
    if isinstance(p, RunInts):
        count = dims.product(graph.values[p.name].shape)
        return None if isinstance(count, Sym) else count
    return len(p)


def numbers(p: Any) -> bool:
    """Whether a parameter is known and has no symbols."""
    return isinstance(p, tuple) and not any(isinstance(v, Sym) for v in p)


def same_type(node: Node, graph: Graph, indices: Sequence[int]) -> str:
    """The one type of some inputs; BadInput if they differ."""
    kinds = [element(node, graph, i).name for i in indices]
    if len(set(kinds)) > 1:
        raise BadInput(f"{node.op} of {' and '.join(kinds)}: the types must be equal", node.name)
    return kinds[0]


# -- axes in another order ------------------------------------------------------------------------


class _Rearranged(TensorOp):
    """A result that is the input, seen with ``split`` sizes, with its axes in another order."""

    def order(self, node: Node, graph: Graph) -> tuple[Shape, tuple[int, ...]]:
        """The sizes that the input is seen with, and the permutation of those axes."""
        raise NotImplementedError

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        split, perm = self.order(node, graph)
        return kernel(node, "movement.h", "rearrange", (bits(node, graph, 0),), Ints(split),
                      Ints(perm))


@register
class Transpose(_Rearranged):
    """Axis i of the result is axis ``perm[i]`` of the input; by default they are reversed."""

    name = "onnx.Transpose"
    inputs = "x"
    attrs = (Attr("perm", tuple, ()),)

    def _perm(self, node: Node, rank: int) -> tuple[int, ...]:
        perm = tuple(int(p) for p in node.attrs["perm"]) or tuple(reversed(range(rank)))
        if sorted(perm) != list(range(rank)):
            raise BadInput(f"perm {list(perm)} is no order of {rank} axes", node.name)
        return perm

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 1)
        source = sizes_of(node, graph, 0)
        perm = self._perm(node, len(source))
        return [(tuple(source[p] for p in perm), element(node, graph, 0).name)]

    def values(self, node: Node, graph: Graph, inputs: Sequence[Known | None]) -> Values:
        x = inputs[0]
        return [None if x is None else x.transpose(self._perm(node, x.ndim))]

    def order(self, node: Node, graph: Graph) -> tuple[Shape, tuple[int, ...]]:
        source = sizes_of(node, graph, 0)
        return source, self._perm(node, len(source))


class _Blocks(_Rearranged):
    """Exchange of channels and ``blocksize`` times ``blocksize`` pixels."""

    def _image(self, node: Node, graph: Graph) -> tuple[Any, Any, Any, Any]:
        check_inputs(node, 1)
        source = sizes_of(node, graph, 0)
        if len(source) != 4:
            raise BadInput(f"{node.op} of shape {show(source)}; it must have 4 axes", node.name)
        n, c, h, w = source
        return n, c, h, w


@register
class DepthToSpace(_Blocks):
    """Channels become pixels. DCR: the block is the channels' outer part, CRD: the inner one."""

    name = "onnx.DepthToSpace"
    inputs = "x"
    attrs = (Attr("blocksize", int, minimum=1), Attr("mode", str, "DCR", choices=("DCR", "CRD")))

    def infer(self, node: Node, graph: Graph) -> Result:
        n, c, h, w = self._image(node, graph)
        b = node.attrs["blocksize"]
        if isinstance(c, int) and c % (b * b):
            raise BadInput(f"{c} channels are no multiple of the block's {b * b}", node.name)
        return [((n, dims.floordiv(c, b * b), h * b, w * b), element(node, graph, 0).name)]

    def order(self, node: Node, graph: Graph) -> tuple[Shape, tuple[int, ...]]:
        n, c, h, w = self._image(node, graph)
        b = node.attrs["blocksize"]
        rest = dims.floordiv(c, b * b)
        if node.attrs["mode"] == "DCR":
            return (n, b, b, rest, h, w), (0, 3, 4, 1, 5, 2)
        return (n, rest, b, b, h, w), (0, 1, 4, 2, 5, 3)


@register
class SpaceToDepth(_Blocks):
    """Pixels become channels: the inverse of DepthToSpace."""

    name = "onnx.SpaceToDepth"
    inputs = "x"
    attrs = (Attr("blocksize", int, minimum=1), Attr("mode", str, "DCR", choices=("DCR", "CRD")))

    def infer(self, node: Node, graph: Graph) -> Result:
        n, c, h, w = self._image(node, graph)
        b = node.attrs["blocksize"]
        if any(isinstance(d, int) and d % b for d in (h, w)):
            raise BadInput(f"an image of {h} x {w} cannot be cut into blocks of {b}", node.name)
        size = (n, c * b * b, dims.floordiv(h, b), dims.floordiv(w, b))
        return [(size, element(node, graph, 0).name)]

    def order(self, node: Node, graph: Graph) -> tuple[Shape, tuple[int, ...]]:
        n, c, h, w = self._image(node, graph)
        b = node.attrs["blocksize"]
        split = (n, c, dims.floordiv(h, b), b, dims.floordiv(w, b), b)
        return split, (0, 3, 5, 1, 2, 4) if node.attrs["mode"] == "DCR" else (0, 1, 3, 5, 2, 4)


# -- joining and cutting --------------------------------------------------------------------------


@register
class Concat(TensorOp):
    """The inputs behind each other along ``axis``."""

    name = "onnx.Concat"
    inputs = "x, .."
    attrs = (Attr("axis", int),)

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 1, max(1, len(node.inputs)))
        shapes = [sizes_of(node, graph, i) for i in range(len(node.inputs))]
        kind = same_type(node, graph, range(len(shapes)))
        rank = len(shapes[0])
        axis = axis_of(node, node.attrs["axis"], max(rank, 1))
        if any(len(s) != rank for s in shapes) or rank == 0:
            raise BadInput(f"shapes {', '.join(map(show, shapes))} cannot be joined", node.name)
        result: list[Dim] = []
        for i in range(rank):
            sizes = [s[i] for s in shapes]
            if i == axis:
                result.append(sum(sizes[1:], sizes[0]))
                continue
            fixed = {d for d in sizes if not isinstance(d, Sym)}
            if len(fixed) > 1:
                raise BadInput(f"shapes {', '.join(map(show, shapes))} differ in axis {i}",
                               node.name)
            result.append(fixed.pop() if fixed else sizes[0])
        return [(tuple(result), kind)]

    def values(self, node: Node, graph: Graph, inputs: Sequence[Known | None]) -> Values:
        parts = [x for x in inputs if x is not None]
        if len(parts) != len(inputs) or sum(x.size for x in parts) > MAX_KNOWN:
            return [None]
        return [np.concatenate(parts, axis=node.attrs["axis"])]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        axis = axis_of(node, node.attrs["axis"], len(sizes_of(node, graph, 0)))
        return Call("movement.h", "concat", (), (
            Ref(node.outputs[0]), Refs(tuple(node.inputs)), axis, element(node, graph, 0).bytes,
            Problem("the shapes of its inputs do not fit together"),
        ))


@register
class Split(TensorOp):
    """Parts of ``data`` along ``axis``, of the sizes ``split`` or nearly equal ones."""

    name = "onnx.Split"
    inputs = "data, split?"
    attrs = (Attr("split", tuple, None), Attr("axis", int, 0), Attr("num_outputs", int, None))
    parameters: ClassVar[dict[int, str]] = {1: "split"}

    def _sizes(self, node: Node, graph: Graph) -> list[Dim] | None:
        """The sizes of the parts; None if the run decides them."""
        source = sizes_of(node, graph, 0)
        axis = axis_of(node, node.attrs["axis"], len(source))
        count = len(node.outputs)
        asked = parameter(node, graph, 1, "split")
        if isinstance(asked, RunInts):
            return None
        if asked is not None:
            if len(asked) != count:
                raise BadInput(f"{len(asked)} sizes for {count} results", node.name)
            total = sum(asked[1:], asked[0])
            if any(not isinstance(s, Sym) and s < 0 for s in asked) or (
                dims.is_static((total, source[axis])) and total != source[axis]
            ):
                parts_text = ", ".join(map(str, asked))
                raise BadInput(f"parts of {parts_text} do not make axis {axis} of {show(source)}",
                               node.name)
            return list(asked)
        parts = node.attrs["num_outputs"] or count
        size = dims.ceildiv(source[axis], parts)
        if parts != count:
            raise BadInput(f"num_outputs is {parts}, and there are {count} results", node.name)
        if isinstance(size, Sym):
            rest = [
                dims.larger(0, dims.smaller(size, source[axis] - size * i)) for i in range(1, parts)
            ]
            return [size, *rest]
        return [max(0, min(size, source[axis] - size * i)) for i in range(parts)]

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 1, 2)
        source = sizes_of(node, graph, 0)
        axis = axis_of(node, node.attrs["axis"], len(source))
        sizes = self._sizes(node, graph)
        if sizes is None:
            if "" in node.outputs:
                raise Unsupported("Split with absent results needs constant sizes", node.name)
            sizes = [fresh(node, i, axis) for i in range(len(node.outputs))]
        kind = element(node, graph, 0).name
        return [((*source[:axis], size, *source[axis + 1 :]), kind) for size in sizes]

    def values(self, node: Node, graph: Graph, inputs: Sequence[Known | None]) -> Values:
        sizes = self._sizes(node, graph)
        if inputs[0] is None or sizes is None or not dims.is_static(sizes):
            return [None] * len(node.outputs)
        ends = np.cumsum([int(str(s)) for s in sizes])
        return list(np.split(inputs[0], ends[:-1], axis=node.attrs["axis"]))

    def measure(self, node: Node, graph: Graph) -> Call | None:
        parts = given(node, 1)
        axis = axis_of(node, node.attrs["axis"], len(sizes_of(node, graph, 0)))
        return Call("movement.h", "split_sizes", (require_type(node, graph, 1, ("i64", "i32")),), (
            Ref(node.inputs[0]), Ref(parts), axis, len(node.outputs),
            Problem("the sizes of the parts are not those of the axis"),
        ))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        sizes = self._sizes(node, graph)
        absent: tuple[Any, ...] = ()
        if "" in node.outputs and sizes is not None:
            absent = tuple(0 if o else s for o, s in zip(node.outputs, sizes, strict=True))
        axis = axis_of(node, node.attrs["axis"], len(sizes_of(node, graph, 0)))
        return Call("movement.h", "split", (), (
            Refs(tuple(node.outputs)), Ref(node.inputs[0]), axis, element(node, graph, 0).bytes,
            Ints(absent), Problem("the sizes of the parts are not those of the axis"),
        ))


@register
class Slice(TensorOp):
    """Elements ``starts`` to ``ends`` of ``axes``, in steps. Ends count from the back below 0."""

    name = "onnx.Slice"
    inputs = "data, starts, ends, axes?, steps?"
    attrs = tuple(Attr(n, tuple, None) for n in ("starts", "ends", "axes", "steps"))
    parameters: ClassVar[dict[int, str]] = {1: "starts", 2: "ends", 3: "axes", 4: "steps"}

    def _parameters(self, node: Node, graph: Graph) -> list[tuple[Any, ...] | RunInts | None]:
        return [parameter(node, graph, i, name) for i, name in self.parameters.items()]

    def infer(self, node: Node, graph: Graph) -> Result:
        source = sizes_of(node, graph, 0)
        starts, ends, axes, steps = self._parameters(node, graph)
        kind = element(node, graph, 0).name
        if starts is None or ends is None:
            raise BadInput("Slice needs starts and ends", node.name)
        if isinstance(axes, RunInts):
            return [(fresh_shape(node, 0, len(source)), kind)]
        count = length_of(node, graph, starts) if axes is None else len(axes)
        places = axes if axes is not None else tuple(range(count or 0))
        if count is None:
            return [(fresh_shape(node, 0, len(source)), kind)]
        result = list(source)
        lists = (starts, ends, steps if steps is not None else (1,) * count)
        if any(length_of(node, graph, p) not in (None, count) for p in lists):
            raise BadInput("starts, ends, axes and steps must be equally many", node.name)
        for i, place in enumerate(places):
            axis = axis_of(node, place, len(source))
            size: Dim | None = None
            if not any(isinstance(p, RunInts) for p in lists):
                start, end, step = (p[i] for p in lists if isinstance(p, tuple))
                size = _cut(node, start, end, step, source[axis])
            result[axis] = fresh(node, 0, axis) if size is None else size
        return [(tuple(result), kind)]

    def values(self, node: Node, graph: Graph, inputs: Sequence[Known | None]) -> Values:
        starts, ends, axes, steps = self._parameters(node, graph)
        x = inputs[0]
        if x is None or not numbers(starts) or not numbers(ends):
            return [None]
        assert isinstance(starts, tuple) and isinstance(ends, tuple)
        if not numbers(axes or ()) or not numbers(steps or ()):
            return [None]
        places = axes if isinstance(axes, tuple) else range(len(starts))
        strides = steps if isinstance(steps, tuple) else (1,) * len(starts)
        for start, end, axis, step in zip(starts, ends, places, strides, strict=True):
            d = x.shape[axis]
            count = int(str(_cut(node, start, end, step, d)))
            first = _clamped(start, step, d)
            x = x.take([first + step * i for i in range(count)], axis=axis)
        return [x]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        return Call("movement.h", "slice_sizes", (), (
            Ref(node.inputs[0]), *map(argument, self._parameters(node, graph)),
            fresh_axes(node, graph), Problem("its starts, ends, axes and steps make no sense"),
        ))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(
            node, "movement.h", "slice", (bits(node, graph, 0),),
            *map(argument, self._parameters(node, graph)),
            Problem("its starts, ends, axes and steps make no sense"), inputs=(0,),
        )


def _clamped(place: Any, step: Any, d: Any) -> int:
    """A start or end of a slice of an axis of ``d``, from the front and within reach."""
    low, high = (0, d) if step > 0 else (-1, d - 1)
    return int(max(low, min(place + d if place < 0 else place, high)))


def _cut(node: Node, start: Any, end: Any, step: Any, d: Any) -> Dim | None:
    """Elements that a slice takes of an axis of ``d``; None where only the run can tell."""
    if isinstance(step, Sym):
        return None
    if step == 0:
        raise BadInput("a step of a Slice is 0", node.name)
    if not any(isinstance(v, Sym) for v in (start, end, d)):
        return int(max(0, -((_clamped(start, step, d) - _clamped(end, step, d)) // step)))
    low, high = (0, d) if step > 0 else (-1, d - 1)

    def place(v: Any) -> Any:
        if isinstance(v, Sym):
            # a size, or a difference of sizes of which nobody knows whether it counts from the back
            return dims.larger(low, dims.smaller(v, high)) if dims.natural(v) else None
        if v >= FAR:
            return high
        if v <= -FAR:
            return low
        return dims.larger(low, dims.smaller(v + d if v < 0 else v, high))

    first, stop = place(start), place(end)
    if first is None or stop is None:
        return None
    if step > 0 and not isinstance(start, Sym) and -FAR < start < 0 and stop == d:
        count = dims.smaller(d, -start)  # the last ones
    else:
        count = dims.larger(0, stop - first if step > 0 else first - stop)
    size: Dim = dims.ceildiv(count, abs(int(step)))
    return size


# -- larger tensors -------------------------------------------------------------------------------

_MODES = {"constant": "kConstant", "edge": "kEdge", "reflect": "kReflect", "wrap": "kWrap"}


@register
class Pad(TensorOp):
    """Elements around ``data``: ``pads`` has those before every axis, then those behind."""

    name = "onnx.Pad"
    inputs = "data, pads, constant_value?, axes?"
    attrs = (
        Attr("pads", tuple, None),
        Attr("axes", tuple, None),
        Attr("mode", str, "constant", choices=tuple(_MODES)),
    )
    parameters: ClassVar[dict[int, str]] = {1: "pads", 3: "axes"}

    def infer(self, node: Node, graph: Graph) -> Result:
        source = sizes_of(node, graph, 0)
        kind = element(node, graph, 0).name
        pads, axes = parameter(node, graph, 1, "pads"), parameter(node, graph, 3, "axes")
        if pads is None:
            raise BadInput("Pad needs pads", node.name)
        if given(node, 2):
            same_type(node, graph, (0, 2))
        if isinstance(axes, RunInts):
            return [(fresh_shape(node, 0, len(source)), kind)]
        places = range(len(source)) if axes is None else axes
        if length_of(node, graph, pads) not in (None, 2 * len(places)):
            raise BadInput(f"there must be two pads for each of {len(places)} axes", node.name)
        result = list(source)
        for i, place in enumerate(places):
            axis = axis_of(node, int(place), len(source))
            if isinstance(pads, RunInts):
                result[axis] = fresh(node, 0, axis)
                continue
            result[axis] = source[axis] + pads[i] + pads[len(places) + i]
            if isinstance(result[axis], int) and result[axis] < 0:
                raise BadInput(f"axis {axis} of {show(source)} would have a negative size",
                               node.name)
        return [(tuple(result), kind)]

    def _wrong(self) -> Problem:
        return Problem("its pads do not fit its input")

    def measure(self, node: Node, graph: Graph) -> Call | None:
        pads, axes = parameter(node, graph, 1, "pads"), parameter(node, graph, 3, "axes")
        return Call("movement.h", "pad_sizes", (), (
            Ref(node.inputs[0]), argument(pads), argument(axes), fresh_axes(node, graph),
            self._wrong(),
        ))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        pads, axes = parameter(node, graph, 1, "pads"), parameter(node, graph, 3, "axes")
        return kernel(
            node, "movement.h", "pad", (bits(node, graph, 0),),
            Word(f"Padding::{_MODES[node.attrs['mode']]}"), argument(pads), argument(axes),
            self._wrong(), inputs=(0, 2),
        )


@register
class Expand(TensorOp):
    """``data`` broadcast together with the shape ``shape``. ConstantOfShape is one of these."""

    name = "onnx.Expand"
    inputs = "data, shape"
    attrs = (Attr("shape", tuple, None),)
    parameters: ClassVar[dict[int, str]] = {1: "shape"}

    def infer(self, node: Node, graph: Graph) -> Result:
        source = sizes_of(node, graph, 0)
        kind = element(node, graph, 0).name
        asked = parameter(node, graph, 1, "shape")
        if asked is None:
            raise BadInput("Expand needs a shape", node.name)
        if isinstance(asked, RunInts):
            count = length_of(node, graph, asked)
            rank = declared_rank(node, graph) if count is None else max(count, len(source))
            return [(fresh_shape(node, 0, rank), kind)]
        if any(not isinstance(d, Sym) and d < 0 for d in asked):
            raise BadInput(f"shape {show(asked)} makes no sense", node.name)
        return [(broadcast(node, source, asked), kind)]

    def values(self, node: Node, graph: Graph, inputs: Sequence[Known | None]) -> Values:
        return [_spread(graph, node, inputs[0])]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        asked = tuple(int(d) for d in node.attrs["shape"])
        return [np.broadcast_to(inputs[0], np.broadcast_shapes(inputs[0].shape, asked))]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        rank = len(graph.values[node.outputs[0]].shape)
        return Call("movement.h", "expand_sizes", (), (
            Ref(node.inputs[0]), argument(parameter(node, graph, 1, "shape")),
            fresh_axes(node, graph), rank, Problem("its input cannot take the shape"),
        ))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "movement.h", "expand", (bits(node, graph, 0),),
                      Problem("its input cannot take the shape"), inputs=(0,))


def _spread(graph: Graph, node: Node, x: Known | None) -> Known | None:
    """Known integers with the shape of the node's result, if they are few."""
    size = graph.values[node.outputs[0]].shape
    if x is None or not dims.is_static(size) or int(str(dims.product(size))) > MAX_KNOWN:
        return None
    return np.broadcast_to(x, tuple(int(str(d)) for d in size))


@register
class Tile(TensorOp):
    """``data`` side by side, ``repeats`` times along every axis."""

    name = "onnx.Tile"
    inputs = "data, repeats"
    attrs = (Attr("repeats", tuple, None),)
    parameters: ClassVar[dict[int, str]] = {1: "repeats"}

    def infer(self, node: Node, graph: Graph) -> Result:
        source = sizes_of(node, graph, 0)
        kind = element(node, graph, 0).name
        repeats = parameter(node, graph, 1, "repeats")
        if repeats is None:
            raise BadInput("Tile needs repeats", node.name)
        if isinstance(repeats, RunInts):
            return [(fresh_shape(node, 0, len(source)), kind)]
        if len(repeats) != len(source) or any(not isinstance(r, Sym) and r < 0 for r in repeats):
            raise BadInput(f"repeats {show(repeats)} do not fit shape {show(source)}", node.name)
        return [(tuple(d * r for d, r in zip(source, repeats, strict=True)), kind)]

    def values(self, node: Node, graph: Graph, inputs: Sequence[Known | None]) -> Values:
        repeats = node.attrs["repeats"]
        size = dims.product(graph.values[node.outputs[0]].shape)
        if inputs[0] is None or not numbers(repeats) or isinstance(size, Sym) or size > MAX_KNOWN:
            return [None]
        return [np.tile(inputs[0], [int(r) for r in repeats])]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        return Call("movement.h", "tile_sizes", (), (
            Ref(node.inputs[0]), argument(parameter(node, graph, 1, "repeats")),
            Problem("its repeats do not fit its input"),
        ))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "movement.h", "tile", (bits(node, graph, 0),), inputs=(0,))


# -- others ---------------------------------------------------------------------------------------


@register
class Where(TensorOp):
    """``a`` where the condition holds, else ``b``, with broadcasting."""

    name = "onnx.Where"
    inputs = "condition, a, b"

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 3)
        require_type(node, graph, 0, ("bool",))
        kind = same_type(node, graph, (1, 2))
        return [(broadcast(node, *(sizes_of(node, graph, i) for i in range(3))), kind)]

    def values(self, node: Node, graph: Graph, inputs: Sequence[Known | None]) -> Values:
        condition, a, b = inputs
        if condition is None or a is None or b is None:
            return [None]
        if any(isinstance(v, Sym) for v in condition.reshape(-1)):
            return [None]
        return [np.where(condition.astype(bool), a, b)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "movement.h", "where", (bits(node, graph, 1),),
                      Problem("shapes cannot be broadcast together"))


@register
class Trilu(TensorOp):
    """The upper or lower triangle of matrices from diagonal ``k`` on; the rest is 0."""

    name = "onnx.Trilu"
    inputs = "x, k?"
    attrs = (Attr("k", tuple, None), Attr("upper", int, 1, choices=(0, 1)))
    parameters: ClassVar[dict[int, str]] = {1: "k"}

    def infer(self, node: Node, graph: Graph) -> Result:
        source = sizes_of(node, graph, 0)
        if len(source) < 2:
            raise BadInput(f"Trilu of shape {show(source)}; it takes matrices", node.name)
        return [(source, element(node, graph, 0).name)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        k = argument(parameter(node, graph, 1, "k"))
        return kernel(node, "movement.h", "triangle", (bits(node, graph, 0),), k,
                      bool(node.attrs["upper"]), inputs=(0,))


@register
class ReverseSequence(TensorOp):
    """The first ``sequence_lens`` steps of every sequence in reverse."""

    name = "onnx.ReverseSequence"
    inputs = "x, sequence_lens"
    attrs = (Attr("batch_axis", int, 1, choices=(0, 1)), Attr("time_axis", int, 0, choices=(0, 1)))

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 2)
        require_type(node, graph, 1, ("i64",))
        source = sizes_of(node, graph, 0)
        if len(source) < 2 or node.attrs["batch_axis"] == node.attrs["time_axis"]:
            raise BadInput("ReverseSequence needs an axis of batches and one of time", node.name)
        return [(source, element(node, graph, 0).name)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "movement.h", "reverse_sequence", (bits(node, graph, 0),),
                      node.attrs["batch_axis"], node.attrs["time_axis"],
                      Problem("the length of a sequence is out of range"))


_RANGES = ("f32", "f64", "f16", "bf16", "i16", "i32", "i64")


@register
class Range(TensorOp):
    """Numbers from ``start`` to before ``limit`` in steps of ``delta``."""

    name = "onnx.Range"
    inputs = "start, limit, delta"

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 3)
        same_type(node, graph, range(3))
        kind = require_type(node, graph, 0, _RANGES)
        return [((self._count(node, graph),), kind)]

    def _count(self, node: Node, graph: Graph) -> Dim:
        operands: list[Any] = []
        for name in node.inputs:
            found, data = known(graph, name), graph.constants.get(name)
            if found is None and isinstance(data, np.ndarray):
                found = data
            if found is None or found.size != 1:
                return fresh(node, 0, 0)
            operands.append(found.reshape(-1)[0])
        start, limit, delta = operands
        if not isinstance(delta, Sym) and delta == 0:
            raise BadInput("the delta of a Range is 0", node.name)
        if not any(isinstance(v, Sym) for v in operands):
            distance = (float(limit) - float(start)) / float(delta)
            if element(node, graph, 0).floating:
                return max(0, int(np.ceil(distance)))
            return max(0, -((int(start) - int(limit)) // int(delta)))
        if isinstance(delta, Sym):
            return fresh(node, 0, 0)
        start, limit = (v if isinstance(v, Sym) else int(v) for v in (start, limit))
        count = limit - start if delta > 0 else start - limit
        size: Dim = dims.ceildiv(dims.larger(0, count), abs(int(delta)))
        return size

    def values(self, node: Node, graph: Graph, inputs: Sequence[Known | None]) -> Values:
        (count,) = graph.values[node.outputs[0]].shape
        if any(x is None or x.size != 1 for x in inputs) or isinstance(count, Sym):
            return [None]
        assert isinstance(count, int)
        if count > MAX_KNOWN or element(node, graph, 0).floating:
            return [None]
        start, _, delta = (x.reshape(-1)[0] for x in inputs if x is not None)
        return [np.array([start + delta * i for i in range(count)], object)]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        return Call("movement.h", "range_sizes", (element(node, graph, 0).name,),
                    (*map(Ref, node.inputs), Problem("its limit is never reached")))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "movement.h", "range", (element(node, graph, 0).name,), inputs=(0, 2))


@register
class EyeLike(TensorOp):
    """Ones on diagonal ``k`` of a matrix of the input's size, zeros elsewhere."""

    name = "onnx.EyeLike"
    inputs = "x"
    attrs = (Attr("dtype", int, None), Attr("k", int, 0))
    kinds: ClassVar[tuple[str, ...]] = tuple(n for n in TYPES if TYPES[n].bytes > 1 or n in (
        "i8", "u8", "bool"))

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 1)
        source = sizes_of(node, graph, 0)
        asked = node.attrs["dtype"]
        kind = element(node, graph, 0).name if asked is None else of_onnx(asked, node.name).name
        if len(source) != 2:
            raise BadInput(f"EyeLike of shape {show(source)}; it takes a matrix", node.name)
        if kind not in self.kinds:
            raise Unsupported(f"EyeLike of {kind} has no kernel", node.name)
        return [(source, kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        k = max(-(2**40), min(node.attrs["k"], 2**40))
        kind = graph.values[node.outputs[0]].dtype
        return kernel(node, "movement.h", "eye", (kind,), k, inputs=())
