"""Operators that read images between their pixels: Resize, GridSample, AffineGrid, RoiAlign.

Kernels in ``templates/tensor/resize.h``.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from qigen.errors import BadInput, Unsupported
from qigen.ir import dims
from qigen.ir.dims import Sym
from qigen.ir.graph import Dim, Graph, Node, Shape
from qigen.ir.ops.onnx.elementwise import FLOATS, NUMBERS
from qigen.ir.ops.onnx.movement import Result, fresh_axes, length_of, same_type, sizes_of
from qigen.ir.schema import Attr, register
from qigen.ir.tensor import (
    Alias,
    Call,
    Problem,
    Ref,
    RunInts,
    TensorOp,
    Word,
    argument,
    axis_of,
    check_inputs,
    constant,
    element,
    fresh,
    given,
    kernel,
    parameter,
    require_type,
    show,
)

_COORDINATES = {
    "half_pixel": "kHalfPixel",
    "half_pixel_symmetric": "kHalfPixelSymmetric",
    "pytorch_half_pixel": "kPytorchHalfPixel",
    "align_corners": "kAlignCorners",
    "asymmetric": "kAsymmetric",
    "tf_crop_and_resize": "kCrop",
    "tf_half_pixel_for_nn": "kHalfPixelForNearest",
}
_MODES = {"nearest": "kNearest", "linear": "kLinear", "cubic": "kCubic"}
_ROUNDING = {
    "round_prefer_floor": "kRoundPreferFloor", "round_prefer_ceil": "kRoundPreferCeil",
    "floor": "kFloor", "ceil": "kCeil",
}  # fmt: skip
_ASPECTS = {"stretch": "kStretch", "not_larger": "kNotLarger", "not_smaller": "kNotSmaller"}
_OUTSIDE = {"zeros": "kZeros", "border": "kBorder", "reflection": "kReflection"}


def _flag(value: bool) -> str:
    return "true" if value else "false"


@register
class Resize(TensorOp):
    """An image of another size: ``scales`` times as large, or with ``sizes``. Upsample is one."""

    name = "onnx.Resize"
    inputs = "x, roi?, scales?, sizes?"
    attrs = (
        Attr("sizes", tuple, None),
        Attr("axes", tuple, ()),
        Attr("mode", str, "nearest", choices=tuple(_MODES)),
        Attr("coordinate_transformation_mode", str, "half_pixel", choices=tuple(_COORDINATES)),
        Attr("nearest_mode", str, "round_prefer_floor", choices=tuple(_ROUNDING)),
        Attr("cubic_coeff_a", float, -0.75),
        Attr("exclude_outside", int, 0, choices=(0, 1)),
        Attr("extrapolation_value", float, 0.0),
        Attr("antialias", int, 0, choices=(0, 1)),
        Attr("keep_aspect_ratio_policy", str, "stretch", choices=tuple(_ASPECTS)),
    )
    parameters: ClassVar[dict[int, str]] = {3: "sizes"}
    fold = False  # images that are constants are rare, and the reference takes long

    def _crop(self, node: Node) -> bool:
        return bool(node.attrs["coordinate_transformation_mode"] == "tf_crop_and_resize")

    def _scaled(self, node: Node, graph: Graph) -> bool:
        """Whether scales, not sizes, count: tensors without elements are absent ones."""
        name = given(node, 2)
        return bool(name) and dims.product(graph.values[name].shape) != 0

    def infer(self, node: Node, graph: Graph) -> Result:
        source = sizes_of(node, graph, 0)
        kind = require_type(node, graph, 0, NUMBERS)
        axes = [axis_of(node, a, len(source)) for a in node.attrs["axes"]]
        axes = axes or list(range(len(source)))
        if self._crop(node):
            if not given(node, 1):
                raise BadInput("tf_crop_and_resize needs a roi", node.name)
            require_type(node, graph, 1, FLOATS)
        if node.attrs["antialias"] and node.attrs["mode"] == "nearest":
            raise BadInput("antialias does not go with the mode nearest", node.name)
        result = list(source)
        if self._scaled(node, graph):
            require_type(node, graph, 2, ("f32",))
            scales = constant(graph, node.inputs[2])
            if scales is not None and (scales.size != len(axes) or not (scales > 0).all()):
                raise BadInput(f"scales {scales.tolist()} do not fit {show(source)}", node.name)
            for i, axis in enumerate(axes):
                size = None if scales is None else _scaled(source[axis], scales.reshape(-1)[i])
                result[axis] = fresh(node, 0, axis) if size is None else size
            return [(tuple(result), kind)]
        sizes = parameter(node, graph, 3, "sizes")
        if sizes is None:
            raise BadInput("Resize needs scales or sizes", node.name)
        if isinstance(sizes, RunInts):
            for axis in axes:
                result[axis] = fresh(node, 0, axis)
            return [(tuple(result), kind)]
        if len(sizes) != len(axes):
            raise BadInput(f"sizes {show(sizes)} do not fit {show(source)}", node.name)
        policy = node.attrs["keep_aspect_ratio_policy"]
        old = [source[axis] for axis in axes]
        if policy == "stretch":
            new: list[Dim] = list(sizes)
        elif dims.is_static((*sizes, *old)) and 0 not in old:
            ratios = [int(str(a)) / int(str(b)) for a, b in zip(sizes, old, strict=True)]
            scale = min(ratios) if policy == "not_larger" else max(ratios)
            new = [int(scale * int(str(d)) + 0.5) for d in old]
        else:
            new = [fresh(node, 0, axis) for axis in axes]
        for axis, size in zip(axes, new, strict=True):
            result[axis] = size
        return [(tuple(result), kind)]

    def _arguments(self, node: Node, graph: Graph) -> tuple[Any, ...]:
        scaled = self._scaled(node, graph)
        sizes = None if scaled else parameter(node, graph, 3, "sizes")
        return (
            Ref(node.inputs[0]), Ref(given(node, 1) if self._crop(node) else ""),
            Ref(given(node, 2) if scaled else ""), argument(sizes),
            argument(tuple(node.attrs["axes"])),
            Word(f"Aspect::{_ASPECTS[node.attrs['keep_aspect_ratio_policy']]}"),
        )

    def _roi_type(self, node: Node, graph: Graph) -> str:
        return element(node, graph, 1).name if self._crop(node) else "f32"

    def measure(self, node: Node, graph: Graph) -> Call | None:
        return Call("resize.h", "resize_sizes", (self._roi_type(node, graph),), (
            *self._arguments(node, graph), self._crop(node), fresh_axes(node, graph),
            Problem("its scales, sizes or roi make no sense"),
        ))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        a = node.attrs
        how = ", ".join((
            f"Resampling::{_MODES[a['mode']]}",
            f"Coordinates::{_COORDINATES[a['coordinate_transformation_mode']]}",
            f"Rounding::{_ROUNDING[a['nearest_mode']]}",
            repr(float(a["cubic_coeff_a"])),
            _flag(a["exclude_outside"]),
            _flag(a["antialias"]),
        ))
        kinds = (element(node, graph, 0).name, self._roi_type(node, graph))
        return Call("resize.h", "resize", kinds, (
            Ref(node.outputs[0]), *self._arguments(node, graph), Word(f"Resizing{{{how}}}"),
            float(a["extrapolation_value"]), Problem("its scales, sizes or roi make no sense"),
            Problem("an axis shrinks so much that a pixel is made of over 1000"),
        ))


def _scaled(size: Dim, scale: Any) -> Dim | None:
    """floor(size * scale); None if that cannot be said with symbols."""
    if not isinstance(size, Sym):
        return int(np.floor(float(scale) * int(size)))
    exact = Fraction(float(scale))
    if exact.numerator > 1000 or exact.denominator > 1000:
        return None  # a rounded fraction: floor() of it is decided by the rounding
    return dims.floordiv(size * exact.numerator, exact.denominator)


@register
class GridSample(TensorOp):
    """Pixels of ``x`` at the places in ``grid``, which are in -1..1, the innermost axis first."""

    name = "onnx.GridSample"
    inputs = "x, grid"
    attrs = (
        Attr("mode", str, "linear", choices=tuple(_MODES)),
        Attr("padding_mode", str, "zeros", choices=tuple(_OUTSIDE)),
        Attr("align_corners", int, 0, choices=(0, 1)),
    )
    fold = False

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 2)
        source, grid = sizes_of(node, graph, 0), sizes_of(node, graph, 1)
        kind = require_type(node, graph, 0, NUMBERS)
        require_type(node, graph, 1, FLOATS)
        n = len(source) - 2
        if n < 1 or len(grid) != n + 2 or (isinstance(grid[-1], int) and grid[-1] != n):
            raise BadInput(f"grid {show(grid)} does not fit {show(source)}", node.name)
        if n > 3:
            raise Unsupported(f"GridSample of {n} spatial axes has no kernel; 3 are the most",
                              node.name)
        return [((source[0], source[1], *grid[1:-1]), kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        kinds = (element(node, graph, 0).name, element(node, graph, 1).name)
        return kernel(
            node, "resize.h", "grid_sample", kinds,
            Word(f"Resampling::{_MODES[node.attrs['mode']]}"),
            Word(f"Outside::{_OUTSIDE[node.attrs['padding_mode']]}"),
            bool(node.attrs["align_corners"]), Problem("its grid does not fit its input"),
        )


@register
class AffineGrid(TensorOp):
    """The grid that GridSample reads at to move an image of the size ``size`` by ``theta``."""

    name = "onnx.AffineGrid"
    inputs = "theta, size"
    attrs = (Attr("size", tuple, None), Attr("align_corners", int, 0, choices=(0, 1)))
    parameters: ClassVar[dict[int, str]] = {1: "size"}

    def infer(self, node: Node, graph: Graph) -> Result:
        theta = sizes_of(node, graph, 0)
        kind = require_type(node, graph, 0, FLOATS)
        size = parameter(node, graph, 1, "size")
        count = length_of(node, graph, size)
        if count not in (4, 5) or len(theta) != 3:
            raise BadInput(f"AffineGrid of {show(theta)} and {count} sizes; it takes 4 or 5",
                           node.name)
        if isinstance(size, RunInts):
            # the batch is theta's
            size = (theta[0], 0, *(fresh(node, 0, axis) for axis in range(1, count - 1)))
        assert size is not None
        return [((theta[0], *size[2:], count - 2), kind)]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        size = argument(parameter(node, graph, 1, "size"))
        return Call("resize.h", "affine_grid_sizes", (),
                    (size, fresh_axes(node, graph), Problem("its size is none")))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "resize.h", "affine_grid", (element(node, graph, 0).name,),
                      bool(node.attrs["align_corners"]), Problem("theta does not fit the size"),
                      inputs=(0,))


@register
class RoiAlign(TensorOp):
    """Regions of images, each pooled to the same size."""

    name = "onnx.RoiAlign"
    inputs = "x, rois, batch_indices"
    attrs = (
        Attr("mode", str, "avg", choices=("avg", "max")),
        Attr("coordinate_transformation_mode", str, "half_pixel",
             choices=("half_pixel", "output_half_pixel")),
        Attr("output_height", int, 1, minimum=1),
        Attr("output_width", int, 1, minimum=1),
        Attr("sampling_ratio", int, 0, minimum=0),
        Attr("spatial_scale", float, 1.0),
    )
    fold = False

    def infer(self, node: Node, graph: Graph) -> Result:
        check_inputs(node, 3)
        source, rois, batches = (sizes_of(node, graph, i) for i in range(3))
        require_type(node, graph, 0, FLOATS)
        kind = same_type(node, graph, (0, 1))
        require_type(node, graph, 2, ("i64",))
        if len(source) != 4 or len(rois) != 2 or len(batches) != 1:
            raise BadInput(f"RoiAlign of {show(source)}, {show(rois)}, {show(batches)}", node.name)
        size: Shape = (
            batches[0], source[1], node.attrs["output_height"], node.attrs["output_width"]
        )
        return [(size, kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        a = node.attrs
        return kernel(
            node, "resize.h", "roi_align", (element(node, graph, 0).name,), a["mode"] == "avg",
            a["coordinate_transformation_mode"] == "half_pixel", a["sampling_ratio"],
            float(a["spatial_scale"]), Problem("a region or its batch is out of range"),
        )
