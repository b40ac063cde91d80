"""Convolutions: Conv, ConvTranspose, DeformConv and those of 8-bit codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from qigen.errors import BadInput, Unsupported
from qigen.ir import dims
from qigen.ir.dims import Sym
from qigen.ir.graph import Dim, Graph, Node, Shape
from qigen.ir.ops.onnx.linear import CODES, FLOATS, WRONG, must_match, same_type
from qigen.ir.ops.onnx.window import (
    WINDOW,
    Window,
    image_axes,
    kernel_of,
    per_axis,
    split_pads,
    window,
)
from qigen.ir.schema import Attr, register
from qigen.ir.tensor import (
    Alias,
    Call,
    TensorOp,
    check_inputs,
    element,
    given,
    kernel,
    require_type,
    shape,
    show,
)

GROUP = Attr("group", int, 1, minimum=1)


class _Conv(TensorOp):
    """x, weights [out channels, channels of a group, ..]; ``w`` is the weights' input number."""

    attrs: ClassVar[tuple[Attr, ...]] = (*WINDOW, GROUP)
    w = 1

    def window(self, node: Node, graph: Graph) -> Window:
        """The window, the channels checked."""
        x, w = shape(node, graph, 0), shape(node, graph, self.w)
        if len(w) != len(x):
            raise BadInput(f"weights {show(w)} do not fit the image {show(x)}", node.name)
        found = window(node, x, w[2:])
        group = node.attrs["group"]
        must_match(node, x[1], w[1] * group, "the channels of the image and of the weights")
        if isinstance(w[0], int) and w[0] % group:
            raise BadInput(f"{w[0]} output channels cannot be {group} groups", node.name)
        return found

    def check_bias(self, node: Node, graph: Graph, index: int, channels: Dim) -> None:
        """Refuse a bias that is no vector by output channel."""
        if not given(node, index):
            return
        bias = shape(node, graph, index)
        if len(bias) != 1:
            raise BadInput(f"the bias {show(bias)} is no vector", node.name)
        must_match(node, bias[0], channels, "the bias and the output channels")

    def result(self, node: Node, graph: Graph) -> Shape:
        """The shape of the result."""
        found = self.window(node, graph)
        return (shape(node, graph, 0)[0], shape(node, graph, self.w)[0], *found.out)

    def convolve(
        self, node: Node, graph: Graph, function: str, types: Sequence[str], inputs: Sequence[int]
    ) -> Call:
        """The call with the window behind the tensors."""
        arguments = self.window(node, graph).arguments(kernel=False)
        return kernel(
            node, "conv.h", function, types, *arguments, node.attrs["group"], WRONG, inputs=inputs
        )


@register
class Conv(_Conv):
    """The convolution of images with weights, by groups of channels."""

    name = "onnx.Conv"
    inputs = "X[B, C, ..], W[N, C / group, ..], B[N]?"

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 2, 3)
        result = self.result(node, graph)
        self.check_bias(node, graph, 2, result[1])
        return [(result, same_type(node, graph, FLOATS, (0, 1, 2)))]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return self.convolve(node, graph, "conv", (element(node, graph, 0).name,), range(3))


@register
class ConvInteger(_Conv):
    """The convolution of 8-bit numbers without their zero points, as i32."""

    name = "onnx.ConvInteger"
    inputs = "x, w, x_zero_point?, w_zero_point?"

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 2, 4)
        same_type(node, graph, CODES, (0, 2))
        same_type(node, graph, CODES, (1, 3))
        return [(self.result(node, graph), "i32")]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        types = (element(node, graph, 0).name, element(node, graph, 1).name)
        return self.convolve(node, graph, "conv_integer", types, range(4))


@register
class QLinearConv(_Conv):
    """The convolution of quantized images as codes: rounded half to even, saturated."""

    name = "onnx.QLinearConv"
    inputs = (
        "x, x_scale, x_zero_point, w, w_scale[N]?, w_zero_point[N]?, y_scale, y_zero_point, "
        "B i32[N]?"
    )
    w = 3

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 7, 9)
        same_type(node, graph, CODES, (0, 2))
        same_type(node, graph, CODES, (3, 5))
        same_type(node, graph, ("f32",), (1, 4, 6))
        if given(node, 8):
            require_type(node, graph, 8, ("i32",))
        kind = (
            require_type(node, graph, 7, CODES) if given(node, 7) else element(node, graph, 0).name
        )
        result = self.result(node, graph)
        self.check_bias(node, graph, 8, result[1])
        return [(result, kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        kind = graph.values[node.outputs[0]].dtype
        types = (element(node, graph, 0).name, element(node, graph, 3).name, kind)
        return self.convolve(node, graph, "qlinear_conv", types, range(9))


@register
class ConvTranspose(_Conv):
    """What a convolution's gradient computes: every pixel adds its multiple of the kernel."""

    name = "onnx.ConvTranspose"
    inputs = "X[B, C, ..], W[C, N / group, ..], B[N]?"
    attrs = (*_Conv.attrs, Attr("output_padding", tuple, None), Attr("output_shape", tuple, None))

    def window(self, node: Node, graph: Graph) -> Window:
        x, w = shape(node, graph, 0), shape(node, graph, 1)
        image: tuple[Any, ...] = image_axes(node, x)
        n = len(image)
        if len(w) != len(x):
            raise BadInput(f"weights {show(w)} do not fit the image {show(x)}", node.name)
        must_match(node, x[1], w[0], "the channels of the image and of the weights")
        group = node.attrs["group"]
        if isinstance(w[0], int) and w[0] % group:
            raise BadInput(f"{w[0]} channels cannot be {group} groups", node.name)
        sizes = kernel_of(node, n, w[2:])
        strides = per_axis(node, "strides", n, 1, 1)
        dilations = per_axis(node, "dilations", n, 1, 1)
        extra = per_axis(node, "output_padding", n, 0, 0)
        pads = list(per_axis(node, "pads", 2 * n, 0, 0))
        auto = node.attrs["auto_pad"]
        asked = node.attrs["output_shape"]
        if asked is not None:
            asked = tuple(asked[-n:])
            if len(asked) != n or any(d < 1 for d in asked):
                raise BadInput(f"output_shape {asked} does not fit {n} axes", node.name)
        elif auto in ("SAME_UPPER", "SAME_LOWER"):
            asked = tuple(d * s for d, s in zip(image, strides, strict=True))
        elif auto == "VALID":
            pads = [0] * (2 * n)
        out = []
        for i, d in enumerate(image):
            full = strides[i] * (d - 1) + extra[i] + dilations[i] * (sizes[i] - 1) + 1
            if asked is None:
                out.append(full - pads[i] - pads[n + i])
                continue
            out.append(asked[i])
            total = dims.call("max", full - asked[i], 0)
            # the other way round than a convolution's, except with SAME_UPPER
            side = "SAME_UPPER" if auto == "SAME_UPPER" else "SAME_LOWER"
            pads[i], pads[n + i] = split_pads(total, side)
        if any(not isinstance(d, Sym) and d < 0 for d in out):
            raise BadInput(f"the result would have the sizes {show(tuple(out))}", node.name)
        return Window(sizes, strides, dilations, tuple(pads), tuple(out))

    def result(self, node: Node, graph: Graph) -> Shape:
        channels = shape(node, graph, 1)[1] * node.attrs["group"]
        return (shape(node, graph, 0)[0], channels, *self.window(node, graph).out)

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 2, 3)
        result = self.result(node, graph)
        self.check_bias(node, graph, 2, result[1])
        return [(result, same_type(node, graph, FLOATS, (0, 1, 2)))]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return self.convolve(
            node, graph, "conv_transpose", (element(node, graph, 0).name,), range(3)
        )


@register
class DeformConv(TensorOp):
    """A convolution with taps moved by ``offset`` (bilinear between pixels), times ``mask``."""

    name = "onnx.DeformConv"
    inputs = "X[B, C, H, W], W[N, C / group, ..], offset, B[N]?, mask?"
    attrs = (
        *(a for a in WINDOW if a.name != "auto_pad"),
        GROUP,
        Attr("offset_group", int, 1, minimum=1),
    )

    def _window(self, node: Node, graph: Graph) -> Window:
        x, w = shape(node, graph, 0), shape(node, graph, 1)
        if len(x) != 4 or len(w) != 4:
            raise Unsupported(
                f"DeformConv of {show(x)} has no kernel; images of two axes have", node.name
            )
        plain = Node(node.op, node.name, node.inputs, node.outputs)
        plain.attrs = {**node.attrs, "auto_pad": "NOTSET"}
        return window(plain, x, w[2:])

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 3, 5)
        kind = same_type(node, graph, FLOATS, range(5))
        x, w = shape(node, graph, 0), shape(node, graph, 1)
        found = self._window(node, graph)
        must_match(
            node, x[1], w[1] * node.attrs["group"], "the channels of the image and of the weights"
        )
        return [((x[0], w[0], *found.out), kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        arguments = self._window(node, graph).arguments(kernel=False)
        types = (element(node, graph, 0).name,)
        return kernel(
            node,
            "conv.h",
            "deform_conv",
            types,
            *arguments,
            node.attrs["group"],
            node.attrs["offset_group"],
            WRONG,
            inputs=range(5),
        )
