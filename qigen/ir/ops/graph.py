"""Operators that the passes make of tensor graphs: what generated kernels exist for.

Images are NHWC here. Weights are packed constants (bytes in the order of the kernel that reads
them), ``n``, ``k`` and the taps say what they are. A *chain* is a tuple of (function, operands,
parameters): elementwise functions of ``acc`` (what a product summed up, with its bias), ``in0``..
(the node's chain inputs) and ``t0``.. (earlier results), as in backends/cpu/elementwise.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from qigen.errors import BadInput
from qigen.ir import dims
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.schema import Array, Attr, Evaluation, register
from qigen.ir.tensor import (
    Call,
    Problem,
    TensorOp,
    broadcast,
    check_inputs,
    element,
    given,
    kernel,
    shape,
)

Chain: TypeAlias = tuple[tuple[str, tuple[str, ...], tuple[float, ...]], ...]

PARTIALS = 16 * 1024
"""Floats of a scratch result in which each thread has a cache line."""

ARITHMETICS = ("f32", "f32s8", "bf16", "u8s8")

X, W, BIAS, SCALE, ZERO, X_SCALE, X_ZERO, CHAIN = range(8)
"""Inputs of products: x, packed weights, bias, scale of the weights by channel; ``ZERO`` is where
accumulators start (static) or the sums of the weights (dynamic); scale and zero of x at run time;
the chain's inputs from ``CHAIN`` on."""

_PRODUCT = (
    Attr("arithmetic", str, choices=ARITHMETICS),
    Attr("n", int, minimum=1),
    Attr("k", int, minimum=1),
    Attr("chain", tuple, ()),
    Attr("kinds", tuple, ()),
    Attr("out", str, "f32"),
    Attr("y_scale", float, 1.0),
    Attr("y_zero", int, 0),
    Attr("weight", str, ""),
)


def _element(arithmetic: str) -> str:
    return {"f32": "f32", "f32s8": "f32", "bf16": "bf16", "u8s8": "u8"}[arithmetic]


@register
class Loop(TensorOp):
    """A chain of elementwise functions, one pass over the broadcast operands.

    Codes (u8, i8) are read as the integers that they are; a chain that ends in ``quantize`` makes
    some.
    """

    name = "Loop"
    inputs = "in0, in1, .. f32, u8 or i8"
    attrs = (Attr("chain", tuple), Attr("out", str, "f32"))
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        shapes = (shape(node, graph, i) for i in range(len(node.inputs)))
        return [(broadcast(node, *shapes), node.attrs["out"])]


class _Product(TensorOp):
    fused = True

    def check(self, node: Node, graph: Graph) -> None:
        """BadInput unless x has the type and the chain its inputs."""
        check_inputs(node, W + 1, CHAIN + len(node.attrs["kinds"]))
        if element(node, graph, X).name != _element(node.attrs["arithmetic"]):
            raise BadInput(
                f"x of {node.attrs['arithmetic']} cannot be {element(node, graph, X).name}",
                node.name,
            )


@register
class Product(_Product):
    """x[.., K] times W[N, K] transposed, and the chain."""

    name = "Product"
    inputs = "x[..,K], W packed, bias[N]?, scale[N]?, zero[N]?, x_scale?, x_zero?, in0.."
    attrs = _PRODUCT

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        self.check(node, graph)
        return [((*shape(node, graph, X)[:-1], node.attrs["n"]), node.attrs["out"])]


@register
class FormatProduct(TensorOp):
    """x[.., K] times W[N, K] transposed, W in a format of the catalog, plus bias.

    ``rows`` are the rows of x as the kernel reads them (FormatRows); without, x itself.
    """

    name = "FormatProduct"
    inputs = "x[..,K], W[N,K] in a format, bias[N]?, rows?"
    attrs = (
        Attr("n", int, minimum=1),
        Attr("k", int, minimum=1),
        Attr("weight", str, ""),
    )
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 2, 4)
        if graph.values[node.inputs[1]].shape != (node.attrs["n"], node.attrs["k"]):
            raise BadInput("its weights have another shape", node.name)
        return [((*shape(node, graph, 0)[:-1], node.attrs["n"]), "f32")]


@register
class FormatRows(TensorOp):
    """The rows of x as records of ``stride`` bytes that matrix kernels of a format read."""

    name = "FormatRows"
    inputs = "x[..,K]"
    attrs = (Attr("stride", int, minimum=1), Attr("of", str))
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        rows = dims.product(shape(node, graph, 0)[:-1])
        return [((rows, node.attrs["stride"]), "u8")]


@register
class Convolution(_Product):
    """NHWC convolution of an image that is padded already; K is the channels of a group."""

    name = "Convolution"
    inputs = Product.inputs.replace("x[..,K]", "x[B,H,W,C]")
    attrs = (
        *_PRODUCT,
        Attr("kernel", tuple),
        Attr("strides", tuple),
        Attr("dilations", tuple),
        Attr("group", int, 1),
    )

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        self.check(node, graph)
        a = node.attrs
        b, h, w, _ = shape(node, graph, X)
        sizes = [
            dims.floordiv(d - dilation * (kernel - 1) - 1, stride) + 1
            for d, kernel, stride, dilation in zip(
                (h, w), a["kernel"], a["strides"], a["dilations"], strict=True
            )
        ]
        return [((b, *sizes, a["n"]), a["out"])]


@register
class Depthwise(_Product):
    """NHWC convolution of each channel by itself; pads are (top, left, bottom, right)."""

    name = "Depthwise"
    inputs = Convolution.inputs
    attrs = (
        *_PRODUCT,
        Attr("kernel", tuple),
        Attr("strides", tuple),
        Attr("dilations", tuple),
        Attr("pads", tuple),
    )

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, W + 1, CHAIN + len(node.attrs["kinds"]))
        a = node.attrs
        b, h, w, c = shape(node, graph, X)
        return [
            (
                (b, *window_sizes((h, w), a["kernel"], a["strides"], a["dilations"], a["pads"]), c),
                a["out"],
            )
        ]


def window_sizes(
    sizes: Sequence[Any],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    ceil: bool = False,
) -> list[Any]:
    """Output sizes of windows over axes; pads are all begins, then all ends."""
    result = []
    n = len(kernel)
    for i, d in enumerate(sizes):
        room = d + pads[i] + pads[i + n] - dilations[i] * (kernel[i] - 1) - 1
        size = (dims.ceildiv if ceil else dims.floordiv)(room, strides[i]) + 1
        if (
            ceil
            and isinstance(size, int)
            and isinstance(d, int)
            and ((size - 1) * strides[i] >= d + pads[i])
        ):
            size -= 1  # the last window would begin behind the image
        result.append(size)
    return result


@register
class PadImage(TensorOp):
    """An NHWC image with borders, channels padded to ``channels``, as f32, bf16 or u8
    (quantized)."""

    name = "PadImage"
    inputs = "x[B,H,W,C]"
    attrs = (
        Attr("pads", tuple),
        Attr("channels", int, minimum=1),
        Attr("to", str, choices=("f32", "bf16", "u8")),
        Attr("scale", float, 1.0),
        Attr("zero", int, 0),
    )
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        a = node.attrs
        b, h, w, _ = shape(node, graph, 0)
        top, left, bottom, right = a["pads"]
        return [((b, h + top + bottom, w + left + right, a["channels"]), a["to"])]


@register
class QuantizeRows(TensorOp):
    """Rows of x as u8, each with its own scale and zero (128 if symmetric)."""

    name = "QuantizeRows"
    inputs = "x[..,K]"
    attrs = (Attr("columns", int), Attr("symmetric", int, 1))
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        *rows, _ = shape(node, graph, 0)
        count = (dims.product(rows),)
        return [((*rows, node.attrs["columns"]), "u8"), (count, "f32"), (count, "i32")]


@register
class ToBf16(TensorOp):
    """Rows of x rounded to bf16, padded with zeros to ``columns``."""

    name = "ToBf16"
    inputs = "x[..,K]"
    attrs = (Attr("columns", int),)
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        return [((*shape(node, graph, 0)[:-1], node.attrs["columns"]), "bf16")]


@register
class QuantizeImage(TensorOp):
    """An NHWC image with borders as u8, with one scale and zero: ONNX DynamicQuantizeLinear."""

    name = "QuantizeImage"
    inputs = "x[B,H,W,C]"
    attrs = (Attr("pads", tuple), Attr("channels", int))
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        b, h, w, _ = shape(node, graph, 0)
        top, left, bottom, right = node.attrs["pads"]
        image = (b, h + top + bottom, w + left + right, node.attrs["channels"])
        return [(image, "u8"), ((1,), "f32"), ((1,), "i32"), ((PARTIALS,), "f32")]


@register
class QuantizeTensor(TensorOp):
    """x as u8 with one scale and zero for all: ONNX DynamicQuantizeLinear."""

    name = "QuantizeTensor"
    inputs = "x[..,K]"
    attrs = (Attr("columns", int),)
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        return [(shape(node, graph, 0), "u8"), ((1,), "f32"), ((1,), "i32"), ((PARTIALS,), "f32")]


@register
class LayerNorm(TensorOp):
    """(x + residual) normalised over the last axis, times weight plus bias."""

    name = "LayerNorm"
    inputs = "x[..,N], weight[N]?, bias[N]?, residual[..,N]?"
    attrs = (Attr("eps", float), Attr("sum", int, 0, doc="1: the sum x + residual is a result too"))
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1, 4)
        result = (shape(node, graph, 0), "f32")
        return [result, result] if node.attrs["sum"] else [result]


@register
class Softmax(TensorOp):
    """Softmax over the last axis."""

    name = "SoftmaxRows"
    inputs = "x[..,N]"
    attrs = (Attr("log", int, 0),)
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        return [(shape(node, graph, 0), "f32")]


@register
class ReduceAxes(TensorOp):
    """A reduction over adjacent axes [first, last); they stay with size 1 if ``keep``."""

    name = "ReduceAxes"
    inputs = "x"
    attrs = (Attr("kind", str), Attr("first", int), Attr("last", int), Attr("keep", int, 1))
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        source = shape(node, graph, 0)
        a = node.attrs
        ones = (1,) * (a["last"] - a["first"]) if a["keep"] else ()
        return [((*source[: a["first"]], *ones, *source[a["last"] :]), "f32")]


@register
class SwapAxes(TensorOp):
    """[outer][a][b][inner] -> [outer][b][a][inner]: ``axes`` are where a, b and inner begin."""

    name = "SwapAxes"
    inputs = "x"
    attrs = (Attr("perm", tuple), Attr("axes", tuple))
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        source = shape(node, graph, 0)
        return [(tuple(source[p] for p in node.attrs["perm"]), element(node, graph, 0).name)]


JOINED_IMAGES = 8
"""The most images that one JoinImages joins (``JoinImagesArgs``)."""


@register
class JoinImages(TensorOp):
    """The channels of NHWC images in one with borders of zeros; ``factors`` (height and width of
    each) say how often a pixel is repeated, ``pads`` are top, left, bottom, right."""

    name = "JoinImages"
    inputs = "x[B,H,W,C].."
    attrs = (Attr("factors", tuple), Attr("pads", tuple))
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1, JOINED_IMAGES)
        b, h, w, _ = shape(node, graph, 0)
        fh, fw, *_ = node.attrs["factors"]
        top, left, bottom, right = node.attrs["pads"]
        channels = sum(graph.values[n].shape[3] for n in node.inputs)  # type: ignore[misc]
        return [((b, top + h * fh + bottom, left + w * fw + right, channels), "f32")]


@register
class Pool(TensorOp):
    """NHWC pooling: kind max or average."""

    name = "Pool"
    inputs = "x[B,H,W,C]"
    attrs = (
        Attr("kind", str, choices=("max", "average")),
        Attr("kernel", tuple),
        Attr("strides", tuple),
        Attr("dilations", tuple),
        Attr("pads", tuple),
        Attr("ceil", int, 0),
        Attr("include_pad", int, 0),
    )
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        a = node.attrs
        b, h, w, c = shape(node, graph, 0)
        sizes = window_sizes(
            (h, w), a["kernel"], a["strides"], a["dilations"], a["pads"], bool(a["ceil"])
        )
        return [((b, *sizes, c), element(node, graph, 0).name)]


@register
class EncoderAttention(TensorOp):
    """softmax(scale q k^T + mask) v by heads.

    Head h of q lies in columns ``offsets[0] + h * head_dim`` of the first input, k and v likewise
    in the second and third, so that all may be parts of one product. The mask is broadcast to
    [B, heads, S, T].
    """

    name = "EncoderAttention"
    inputs = "q[B,S,..], k[B,T,..], v[B,T,..], mask?"
    attrs = (
        Attr("heads", int, minimum=1),
        Attr("head_dim", int, minimum=1),
        Attr("scale", float),
        Attr("offsets", tuple, (0, 0, 0)),
    )
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 3, 4)
        a = node.attrs
        return [((*shape(node, graph, 0)[:-1], a["heads"] * a["head_dim"]), "f32")]


@register
class GatherCodes(TensorOp):
    """Rows of a table of int8 codes, each times its scale."""

    name = "GatherCodes"
    inputs = "codes[V,D] i8, scale[V], ids"
    fused = True

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 3)
        return [((*shape(node, graph, 2), shape(node, graph, 0)[1]), "f32")]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        codes, scale, ids = inputs
        return [codes[ids].astype(np.float32) * scale[ids][..., None]]

    def call(self, node: Node, graph: Graph) -> Call:
        wrong = Problem("an index is out of range")
        return kernel(
            node, "gather_codes.h", "gather_codes", (element(node, graph, 2).name,), wrong
        )


def chain_inputs(node: Node) -> list[str]:
    """The values that a product's chain reads as in0, in1, .."""
    return [given(node, i) for i in range(CHAIN, len(node.inputs))]
