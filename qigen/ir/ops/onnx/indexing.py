"""Operators that read or write at indices that are data: Gather, Scatter and their kin.

Indices are checked at run time; kernels in ``templates/tensor/indexing.h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from qigen.errors import BadInput, Unsupported
from qigen.ir import dims
from qigen.ir.dims import Sym
from qigen.ir.graph import Dim, Graph, Node, Shape
from qigen.ir.ops.onnx.elementwise import BOOLS, FLOATS, NUMBERS
from qigen.ir.ops.onnx.movement import (
    MAX_KNOWN,
    Result,
    Values,
    bits,
    fresh_axes,
    length_of,
    same_type,
    sizes_of,
)
from qigen.ir.schema import Attr, register
from qigen.ir.tensor import (
    Alias,
    Call,
    Ints,
    Known,
    Problem,
    Ref,
    RunInts,
    TensorOp,
    argument,
    axis_of,
    check_inputs,
    constant,
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

INDICES = ("i64", "i32")
OUTSIDE = Problem("an index is out of range")


# -- reading --------------------------------------------------------------------------------------


@register
class Gather(TensorOp):
    """Slices of ``data`` at ``indices`` of ``axis``."""

    name = "onnx.Gather"
    inputs = "data, indices"
    attrs = (Attr("axis", int, 0),)

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 2)
        source, indices = sizes_of(node, graph, 0), sizes_of(node, graph, 1)
        require_type(node, graph, 1, INDICES)
        if not source:
            raise BadInput("Gather from a scalar", node.name)
        axis = axis_of(node, node.attrs["axis"], len(source))
        data, d = constant(graph, node.inputs[1]), source[axis]
        if data is not None and isinstance(d, int) and ((data >= d) | (data < -d)).any():
            raise BadInput(f"an index is out of range for axis {axis} of {show(source)}", node.name)
        return [((*source[:axis], *indices, *source[axis + 1 :]), element(node, graph, 0).name)]

    def values(self, node: Node, graph: Graph, inputs: Sequence[Known | None]) -> Values:
        data, indices = inputs
        if data is None or indices is None or indices.size > MAX_KNOWN:
            return [None]
        axis = node.attrs["axis"]
        places = indices.reshape(-1)
        n = data.shape[axis]
        if any(isinstance(i, Sym) or not -n <= i < n for i in places):
            return [None]
        taken = np.take(data, [int(i) for i in places], axis=axis)
        axis %= data.ndim
        return [taken.reshape((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]))]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        axis = axis_of(node, node.attrs["axis"], len(sizes_of(node, graph, 0)))
        kinds = (bits(node, graph, 0), element(node, graph, 1).name)
        return kernel(node, "indexing.h", "gather", kinds, axis, OUTSIDE)


def _lesser(node: Node, source: Shape, indices: Shape, axis: int) -> None:
    """BadInput unless ``indices`` may be used with ``source`` element by element."""
    if len(source) != len(indices) or not source:
        raise BadInput(f"indices {show(indices)} do not fit data {show(source)}", node.name)
    for i, (a, b) in enumerate(zip(source, indices, strict=True)):
        if i != axis and isinstance(a, int) and isinstance(b, int) and b > a:
            raise BadInput(f"indices {show(indices)} do not fit data {show(source)}", node.name)


@register
class GatherElements(TensorOp):
    """Elements from the same place of ``data``, but for the index of ``axis``."""

    name = "onnx.GatherElements"
    inputs = "data, indices"
    attrs = (Attr("axis", int, 0),)

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 2)
        source, indices = sizes_of(node, graph, 0), sizes_of(node, graph, 1)
        require_type(node, graph, 1, INDICES)
        _lesser(node, source, indices, axis_of(node, node.attrs["axis"], len(source)))
        return [(indices, element(node, graph, 0).name)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        axis = axis_of(node, node.attrs["axis"], len(sizes_of(node, graph, 0)))
        kinds = (bits(node, graph, 0), element(node, graph, 1).name)
        return kernel(node, "indexing.h", "gather_elements", kinds, axis, OUTSIDE)


def _tuple_length(node: Node, graph: Graph, left: int) -> int:
    """How many axes a tuple of indices (the last axis of input 1) picks, at most ``left``."""
    indices = sizes_of(node, graph, 1)
    if not indices:
        raise BadInput("the indices are a scalar", node.name)
    if isinstance(indices[-1], Sym):
        raise Unsupported("the last axis of its indices must have a constant size", node.name)
    if indices[-1] > left:
        raise BadInput(f"{indices[-1]} indices for {left} axes", node.name)
    return int(indices[-1])


@register
class GatherND(TensorOp):
    """Slices of ``data`` at tuples of indices."""

    name = "onnx.GatherND"
    inputs = "data, indices"
    attrs = (Attr("batch_dims", int, 0, minimum=0),)

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 2)
        require_type(node, graph, 1, ("i64",))
        source, indices = sizes_of(node, graph, 0), sizes_of(node, graph, 1)
        batch = node.attrs["batch_dims"]
        if batch >= min(len(source), len(indices)):
            raise BadInput(f"{batch} axes of batches are too many", node.name)
        k = _tuple_length(node, graph, len(source) - batch)
        return [((*indices[:-1], *source[batch + k :]), element(node, graph, 0).name)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "indexing.h", "gather_nd", (bits(node, graph, 0),),
                      node.attrs["batch_dims"], OUTSIDE)


# -- writing --------------------------------------------------------------------------------------

_REDUCTIONS = {"none": "Replace", "add": "Add", "mul": "Mul", "max": "Max", "min": "Min"}


class _Scattered(TensorOp):
    """``data`` with ``updates`` at ``indices``; a reduction joins the new values to the old."""

    inputs = "data, indices, updates"

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 3)
        same_type(node, graph, (0, 2))
        if node.attrs["reduction"] != "none":
            require_type(node, graph, 0, NUMBERS)
        self.check(node, graph)
        return [(sizes_of(node, graph, 0), element(node, graph, 0).name)]

    def check(self, node: Node, graph: Graph) -> None:
        """BadInput where the shapes do not fit."""

    def kinds(self, node: Node, graph: Graph) -> tuple[str, str]:
        """The functor and the element type."""
        reduction = node.attrs["reduction"]
        kind = bits(node, graph, 0) if reduction == "none" else element(node, graph, 0).name
        return f"merge::{_REDUCTIONS[reduction]}", kind


@register
class ScatterElements(_Scattered):
    """Every update goes to its own place, but for its index of ``axis``."""

    name = "onnx.ScatterElements"
    attrs = (Attr("axis", int, 0), Attr("reduction", str, "none", choices=tuple(_REDUCTIONS)))

    def check(self, node: Node, graph: Graph) -> None:
        source = sizes_of(node, graph, 0)
        require_type(node, graph, 1, INDICES)
        indices = sizes_of(node, graph, 1)
        _lesser(node, source, indices, axis_of(node, node.attrs["axis"], len(source)))
        _lesser(node, sizes_of(node, graph, 2), indices, -1)

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        axis = axis_of(node, node.attrs["axis"], len(sizes_of(node, graph, 0)))
        kinds = (*self.kinds(node, graph), element(node, graph, 1).name)
        return kernel(node, "indexing.h", "scatter_elements", kinds, axis,
                      Problem("an index is out of range, or the shapes do not fit"))


@register
class ScatterND(_Scattered):
    """Every update is a slice that goes to a tuple of indices."""

    name = "onnx.ScatterND"
    attrs = (Attr("reduction", str, "none", choices=tuple(_REDUCTIONS)),)

    def check(self, node: Node, graph: Graph) -> None:
        require_type(node, graph, 1, ("i64",))
        source, indices, updates = (sizes_of(node, graph, i) for i in range(3))
        k = _tuple_length(node, graph, len(source))
        wanted = (*indices[:-1], *source[k:])
        if len(updates) != len(wanted) or any(
            isinstance(a, int) and isinstance(b, int) and a != b
            for a, b in zip(updates, wanted, strict=True)
        ):
            raise BadInput(f"updates are {show(updates)}; they must be {show(wanted)}", node.name)

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "indexing.h", "scatter_nd", self.kinds(node, graph),
                      Problem("an index is out of range, or the shapes do not fit"))


@register
class TensorScatter(TensorOp):
    """A cache with ``update`` from ``write_indices`` (one a batch, default 0) on along ``axis``."""

    name = "onnx.TensorScatter"
    inputs = "past_cache, update, write_indices?"
    attrs = (
        Attr("axis", int, -2), Attr("mode", str, "linear", choices=("linear", "circular")),
    )

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 2, 3)
        kind = same_type(node, graph, (0, 1))
        source = sizes_of(node, graph, 0)
        axis = axis_of(node, node.attrs["axis"], len(source))
        if axis == 0 or len(sizes_of(node, graph, 1)) != len(source):
            raise BadInput("the update and its axis do not fit the cache", node.name)
        if given(node, 2):
            require_type(node, graph, 2, ("i64",))
        return [(source, kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        axis = axis_of(node, node.attrs["axis"], len(sizes_of(node, graph, 0)))
        return kernel(
            node, "indexing.h", "tensor_scatter", (), axis, node.attrs["mode"] == "circular",
            element(node, graph, 0).bytes, Problem("the update does not fit into the cache"),
            inputs=(0, 1, 2),
        )


# -- chosen by values -----------------------------------------------------------------------------


@register
class NonZero(TensorOp):
    """The indices of all elements that are not 0, a row an axis."""

    name = "onnx.NonZero"
    inputs = "x"

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 1)
        require_type(node, graph, 0, (*NUMBERS, *BOOLS))
        rank = max(1, len(sizes_of(node, graph, 0)))
        return [((rank, fresh(node, 0, 1)), "i64")]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        return Call("indexing.h", "nonzero_sizes", (element(node, graph, 0).name,),
                    (Ref(node.inputs[0]),))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "indexing.h", "nonzero", (element(node, graph, 0).name,))


@register
class Compress(TensorOp):
    """The slices of ``axis`` (without one: the elements) for which the condition holds."""

    name = "onnx.Compress"
    inputs = "x, condition"
    attrs = (Attr("axis", int, None),)

    def _axis(self, node: Node, graph: Graph) -> int:
        axis = node.attrs["axis"]
        return -1 if axis is None else axis_of(node, axis, len(sizes_of(node, graph, 0)))

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 2)
        require_type(node, graph, 1, BOOLS)
        source, axis = sizes_of(node, graph, 0), self._axis(node, graph)
        kind = element(node, graph, 0).name
        if axis < 0:
            return [((fresh(node, 0, 0),), kind)]
        return [((*source[:axis], fresh(node, 0, axis), *source[axis + 1 :]), kind)]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        wrong = Problem("its condition is longer than the axis")
        return Call("indexing.h", "compress_sizes", (),
                    (*map(Ref, node.inputs), self._axis(node, graph), wrong))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "indexing.h", "compress", (), self._axis(node, graph),
                      element(node, graph, 0).bytes)


@register
class OneHot(TensorOp):
    """A new axis of ``depth``, with values[1] at the index and values[0] elsewhere."""

    name = "onnx.OneHot"
    inputs = "indices, depth, values"
    attrs = (Attr("axis", int, -1),)

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 3)
        require_type(node, graph, 0, NUMBERS)
        require_type(node, graph, 1, NUMBERS)
        indices, values = sizes_of(node, graph, 0), sizes_of(node, graph, 2)
        if dims.product(values) != 2:
            raise BadInput("OneHot needs two values: off and on", node.name)
        axis = axis_of(node, node.attrs["axis"], len(indices) + 1)
        size: Dim = fresh(node, 0, axis)
        found, data = known(graph, node.inputs[1]), constant(graph, node.inputs[1])
        if found is not None and found.size == 1:
            size = found.reshape(-1)[0]
        elif data is not None and data.size == 1:
            size = int(data.reshape(-1)[0])
        if isinstance(size, (int, np.integer)) and size < 0:
            raise BadInput(f"the depth is {size}", node.name)
        return [((*indices[:axis], size, *indices[axis:]), element(node, graph, 2).name)]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        return Call("indexing.h", "one_hot_sizes", (element(node, graph, 1).name,),
                    (Ref(node.inputs[1]), Problem("its depth is no size")))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        axis = axis_of(node, node.attrs["axis"], len(sizes_of(node, graph, 0)) + 1)
        kinds = (bits(node, graph, 2), element(node, graph, 0).name)
        return kernel(node, "indexing.h", "one_hot", kinds, axis, inputs=(0, 2))


# -- windows --------------------------------------------------------------------------------------


@register
class MaxUnpool(TensorOp):
    """Elements at the places in ``indices`` that a MaxPool found them at, zeros elsewhere."""

    name = "onnx.MaxUnpool"
    inputs = "x, indices, output_shape?"
    attrs = (
        Attr("kernel_shape", tuple), Attr("pads", tuple, ()), Attr("strides", tuple, ()),
        Attr("output_shape", tuple, None),
    )
    parameters: ClassVar[dict[int, str]] = {2: "output_shape"}

    def _window(self, node: Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        window = tuple(int(k) for k in node.attrs["kernel_shape"])
        n = len(window)
        return window, node.attrs["pads"] or (0,) * 2 * n, node.attrs["strides"] or (1,) * n

    def infer(self, node: Node, graph: Graph) -> Result:
        source = sizes_of(node, graph, 0)
        require_type(node, graph, 1, ("i64",))
        window, pads, strides = self._window(node)
        n = len(window)
        if len(source) != n + 2 or len(pads) != 2 * n or len(strides) != n:
            raise BadInput(f"the window does not fit shape {show(source)}", node.name)
        asked = parameter(node, graph, 2, "output_shape")
        kind = element(node, graph, 0).name
        if isinstance(asked, RunInts):
            return [(fresh_shape(node, 0, len(source)), kind)]
        if asked is not None:
            if len(asked) != len(source):
                raise BadInput(f"output_shape {show(asked)} does not fit {show(source)}", node.name)
            return [(asked, kind)]
        sizes = tuple(
            (source[2 + i] - 1) * strides[i] - pads[i] - pads[n + i] + window[i] for i in range(n)
        )
        return [((*source[:2], *sizes), kind)]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        asked = argument(parameter(node, graph, 2, "output_shape"))
        wrong = Problem("output_shape is no shape")
        return Call("indexing.h", "max_unpool_sizes", (), (Ref(node.inputs[0]), asked, wrong))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        wrong = Problem("an index is out of range, or the output is too small")
        return kernel(node, "indexing.h", "max_unpool", (bits(node, graph, 0),),
                      *map(Ints, self._window(node)), wrong, inputs=(0, 1))


@register
class Col2Im(TensorOp):
    """Columns of windows to the image that they are of; where they overlap they are summed up."""

    name = "onnx.Col2Im"
    inputs = "x, image_shape, block_shape"
    attrs = (
        Attr("image_shape", tuple, None), Attr("block_shape", tuple, None),
        Attr("dilations", tuple, ()), Attr("pads", tuple, ()), Attr("strides", tuple, ()),
    )
    parameters: ClassVar[dict[int, str]] = {1: "image_shape", 2: "block_shape"}

    def _window(self, node: Node, n: int) -> tuple[Any, ...]:
        a = node.attrs
        window = (a["dilations"] or (1,) * n, a["pads"] or (0,) * 2 * n, a["strides"] or (1,) * n)
        if [len(w) for w in window] != [n, 2 * n, n] or min(window[0]) < 1 or min(window[2]) < 1:
            raise BadInput("its dilations, pads and strides do not fit the image", node.name)
        return window

    def infer(self, node: Node, graph: Graph) -> Result:
        source = sizes_of(node, graph, 0)
        kind = require_type(node, graph, 0, FLOATS)
        image = parameter(node, graph, 1, "image_shape")
        block = parameter(node, graph, 2, "block_shape")
        n = length_of(node, graph, image)
        if not n or len(source) != 3 or block is None:
            raise BadInput(f"Col2Im of {show(source)} needs the shapes of image and block",
                           node.name)
        self._window(node, n)
        if isinstance(block, RunInts):
            channels: Dim = fresh(node, 0, 1)
        else:
            channels = dims.floordiv(source[1], dims.product(block))
        if isinstance(image, RunInts):
            image = tuple(fresh(node, 0, 2 + i) for i in range(n))
        assert image is not None
        return [((source[0], channels, *image), kind)]

    def _shapes(self, node: Node, graph: Graph) -> tuple[Any, Any]:
        image, block = (parameter(node, graph, i, self.parameters[i]) for i in (1, 2))
        return argument(image), argument(block)

    def measure(self, node: Node, graph: Graph) -> Call | None:
        return Call("indexing.h", "col2im_sizes", (), (
            Ref(node.inputs[0]), *self._shapes(node, graph), fresh_axes(node, graph),
            Problem("the shapes of its image and block make no sense"),
        ))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        window = self._window(node, len(graph.values[node.outputs[0]].shape) - 2)
        return kernel(
            node, "indexing.h", "col2im", (element(node, graph, 0).name,),
            self._shapes(node, graph)[1], *map(Ints, window),
            Problem("the columns are not those of the image"), inputs=(0,),
        )
