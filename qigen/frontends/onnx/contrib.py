"""Operators of com.microsoft as functions of standard ones: what has no kernel of its own.

A builder gets the node, and of every input its type and rank (None: absent), and makes the nodes of
the function's body. Attributes are read here, so bodies refer to none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qigen.errors import BadInput, Unsupported
from qigen.ir.types import TYPES

DOMAIN = "com.microsoft"

OPSET = 23

Kind: TypeAlias = "tuple[str, int] | None"


class Body:
    """The nodes of a function. ``inputs`` are the names of the formal inputs, '' where absent."""

    def __init__(self, proto: onnx.NodeProto, kinds: Sequence[Kind]) -> None:
        self.proto = proto
        self.kinds = list(kinds)
        self.attrs = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        self.nodes: list[onnx.NodeProto] = []

    def input(self, index: int) -> str:
        """Name of formal input number ``index``; '' if the node does not have it."""
        return f"in{index}" if index < len(self.kinds) and self.kinds[index] is not None else ""

    def kind(self, index: int) -> tuple[str, int]:
        """Type and rank of an input; BadInput if it is absent."""
        found = self.kinds[index] if index < len(self.kinds) else None
        if found is None:
            raise BadInput(f"{self.proto.op_type} needs input number {index}")
        return found

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attrs: Any) -> str:
        """A node; the name of its (first) result. Absent attributes are None."""
        stem = f"n{len(self.nodes)}"
        names = [stem if i == 0 else f"{stem}.{i}" for i in range(outputs)]
        kept = {k: v for k, v in attrs.items() if v is not None}
        self.nodes.append(helper.make_node(op_type, list(inputs), names, **kept))
        return stem

    def constant(self, value: Any, dtype: str) -> str:
        """A constant of a type by its name here."""
        tensor = numpy_helper.from_array(np.asarray(value, TYPES[dtype].numpy), "value")
        return self.op("Constant", value=tensor)

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute of the node; text as str."""
        value = self.attrs.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def refuse(self, *names: str) -> None:
        """Unsupported if one of the attributes is not 0."""
        for name in names:
            if self.attrs.get(name):
                raise Unsupported(
                    f"{self.proto.op_type} with the attribute {name} is not supported"
                )

    def plus(self, x: str, *others: str) -> str:
        """A sum; absent operands are left out."""
        for other in others:
            x = self.op("Add", x, other) if other else x
        return x

    def real(self, codes: int) -> str:
        """Input ``codes`` as a number; its scale and its zero point come behind it."""
        self.kind(codes)
        return self.op("DequantizeLinear", *(self.input(codes + i) for i in range(3)))

    def codes(self, x: str, scale: int, like: int) -> str:
        """x by scale and zero point (input ``scale`` and the next) in the type of ``like``."""
        zero = self.input(scale + 1)
        kind = None if zero else TYPES[self.kind(like)[0]].onnx
        return self.op("QuantizeLinear", x, self.input(scale), zero, output_dtype=kind)


Builder: TypeAlias = Callable[[Body], Sequence[str]]


def _gelu(b: Body) -> Sequence[str]:
    return [b.op("Gelu", b.plus(b.input(0), b.input(1)))]


def _fast_gelu(b: Body) -> Sequence[str]:
    return [b.op("Gelu", b.plus(b.input(0), b.input(1)), approximate="tanh")]


def _quick_gelu(b: Body) -> Sequence[str]:
    x = b.input(0)
    scaled = b.op("Mul", x, b.constant(b.attr("alpha", 1.702), b.kind(0)[0]))
    return [b.op("Mul", x, b.op("Sigmoid", scaled))]


def _skip_layer_norm(b: Body) -> Sequence[str]:
    total = b.plus(b.input(0), b.input(1), b.input(4))
    y = b.op(
        "LayerNormalization",
        total,
        b.input(2),
        b.input(3),
        outputs=3,
        epsilon=b.attr("epsilon", 1e-12),
    )
    return [y, f"{y}.1", f"{y}.2", total]


def _skip_rms_norm(b: Body) -> Sequence[str]:
    total = b.plus(b.input(0), b.input(1), b.input(3))
    y = b.op("RMSNormalization", total, b.input(2), epsilon=b.attr("epsilon", 1e-12))
    return [y, "", "", total]


def _embed_layer_norm(b: Body) -> Sequence[str]:
    ids, segments, positions = b.input(0), b.input(1), b.input(8)
    words = b.op("Gather", b.input(2), ids)
    if positions:
        places = b.op("Gather", b.input(3), positions)
    else:
        zero, axis = b.constant([0], "i64"), b.constant([0], "i64")
        places = b.op("Slice", b.input(3), zero, b.op("Shape", ids, start=1, end=2), axis)
    total = b.plus(words, places, b.op("Gather", b.input(4), segments) if segments else "")
    y = b.op("LayerNormalization", total, b.input(5), b.input(6), epsilon=b.attr("epsilon", 1e-12))
    if b.input(7):
        counts = b.op("ReduceSum", b.input(7), b.constant([1], "i64"), keepdims=0)
    else:
        zeros = numpy_helper.from_array(np.zeros(1, np.int32))
        counts = b.op("ConstantOfShape", b.op("Shape", ids, start=0, end=1), value=zeros)
    return [y, counts, total]


def _fused_matmul(b: Body) -> Sequence[str]:
    b.refuse("transBatchA", "transBatchB")
    sides = []
    for index, name in enumerate(("transA", "transB")):
        side, rank = b.input(index), b.kind(index)[1]
        if b.attr(name, 0) and rank > 1:
            perm = [*range(rank - 2), rank - 1, rank - 2]
            side = b.op("Transpose", side, perm=perm)
        sides.append(side)
    y = b.op("MatMul", *sides)
    alpha = b.attr("alpha", 1.0)
    return [y if alpha == 1 else b.op("Mul", y, b.constant(alpha, b.kind(0)[0]))]


def _activation(b: Body, x: str, dtype: str) -> str:
    name = b.attr("activation", "")
    numbers = list(b.attr("activation_params", ()))
    if not name:
        return x
    if name == "LeakyRelu":
        return b.op(name, x, alpha=numbers[0] if numbers else None)
    if name == "HardSigmoid":
        alpha, beta = numbers or (0.2, 0.5)
        return b.op(name, x, alpha=alpha, beta=beta)
    if name == "Clip":
        return b.op(name, x, *(b.constant(v, dtype) for v in numbers))
    if name in ("Relu", "Tanh", "Sigmoid"):
        return b.op(name, x)
    raise Unsupported(f"{b.proto.op_type} with the activation {name} is not supported")


_CONV_ATTRS = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def _fused_conv(b: Body) -> Sequence[str]:
    y = b.op("Conv", b.input(0), b.input(1), b.input(2), **{n: b.attr(n) for n in _CONV_ATTRS})
    return [_activation(b, b.plus(y, b.input(3)), b.kind(0)[0])]


def _fused_gemm(b: Body) -> Sequence[str]:
    names = ("alpha", "beta", "transA", "transB")
    y = b.op("Gemm", b.input(0), b.input(1), b.input(2), **{n: b.attr(n) for n in names})
    return [_activation(b, y, b.kind(0)[0])]


def _scaled_product(
    b: Body, a: str, a_zero: str, b_zero: str, scale: str, bias: str, dtype: str
) -> str:
    product = b.op("MatMulInteger", a, b.input(1), a_zero, b_zero)
    y = b.op("Mul", b.op("Cast", product, to=TYPES["f32"].onnx), scale)
    if dtype != "f32":
        y = b.op("Cast", y, to=TYPES[dtype].onnx)
    return b.plus(y, bias)


def _dynamic_quantize_matmul(b: Body) -> Sequence[str]:
    a = b.op("DynamicQuantizeLinear", b.input(0), outputs=3)
    scale = b.op("Mul", f"{a}.1", b.input(2))
    return [_scaled_product(b, a, f"{a}.2", b.input(3), scale, b.input(4), "f32")]


def _matmul_integer_to_float(b: Body) -> Sequence[str]:
    dtype = b.kind(2)[0]
    scales = [b.input(2), b.input(3)]
    if dtype != "f32":
        scales = [b.op("Cast", s, to=TYPES["f32"].onnx) for s in scales]
    if b.kind(2)[1] == 1:  # by row, or one for all
        scales[0] = b.op("Unsqueeze", scales[0], b.constant([1], "i64"))
    scale = b.op("Mul", *scales)
    return [_scaled_product(b, b.input(0), b.input(4), b.input(5), scale, b.input(6), dtype)]


def _qlinear_binary(op_type: str) -> Builder:
    def build(b: Body) -> Sequence[str]:
        return [b.codes(b.op(op_type, b.real(0), b.real(3)), 6, 0)]

    return build


def _qlinear_unary(op_type: str, *attrs: str) -> Builder:
    def build(b: Body) -> Sequence[str]:
        y = b.op(op_type, b.real(0), **{name: b.attr(name) for name in attrs})
        return [b.codes(y, 3, 0)]

    return build


def _qlinear_pool(op_type: str, *attrs: str) -> Builder:
    """``channels_last`` is another order of the axes."""

    def build(b: Body) -> Sequence[str]:
        x, rank = b.real(0), b.kind(0)[1]
        last = b.attr("channels_last", 0)
        if last:
            x = b.op("Transpose", x, perm=[0, rank - 1, *range(1, rank - 1)])
        y = b.op(op_type, x, **{name: b.attr(name) for name in attrs})
        if last:
            y = b.op("Transpose", y, perm=[0, *range(2, rank), 1])
        return [b.codes(y, 3, 0)]

    return build


def _qlinear_softmax(b: Body) -> Sequence[str]:
    if b.attr("opset", 13) < 13:
        raise Unsupported("QLinearSoftmax of an opset before 13 is not supported")
    return [b.codes(b.op("Softmax", b.real(0), axis=b.attr("axis", -1)), 3, 0)]


def _qlinear_concat(b: Body) -> Sequence[str]:
    parts = []
    for i in range(2, len(b.kinds), 3):
        parts.append(b.input(i) if b.kind(i)[0] == "f32" else b.real(i))
    return [b.codes(b.op("Concat", *parts, axis=b.attr("axis")), 0, 1)]


def _dynamic_quantize_lstm(b: Body) -> Sequence[str]:
    """With the weights that the codes stand for; X and the states are not rounded to codes."""

    def weights(codes: int, scale: int, zero: int) -> str:
        def spread(index: int) -> str:
            axes = [1, 2] if b.kind(index)[1] < 2 else [1]
            x = b.op("Cast", b.input(index), to=TYPES["f32"].onnx)
            return b.op("Unsqueeze", x, b.constant(axes, "i64"))

        w = b.op("Cast", b.input(codes), to=TYPES["f32"].onnx)
        if b.input(zero):
            w = b.op("Sub", w, spread(zero))
        return b.op("Transpose", b.op("Mul", w, spread(scale)), perm=[0, 2, 1])

    names = (
        "activation_alpha",
        "activation_beta",
        "activations",
        "clip",
        "direction",
        "hidden_size",
        "input_forget",
    )
    inputs = [b.input(0), weights(1, 8, 9), weights(2, 10, 11), *(b.input(i) for i in range(3, 8))]
    y = b.op("LSTM", *inputs, outputs=3, **{name: b.attr(name) for name in names})
    return [y, f"{y}.1", f"{y}.2"]


_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")

BUILDERS: dict[str, Builder] = {
    "Gelu": _gelu,
    "BiasGelu": _gelu,
    "FastGelu": _fast_gelu,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
    "EmbedLayerNormalization": _embed_layer_norm,
    "FusedMatMul": _fused_matmul,
    "FusedConv": _fused_conv,
    "FusedGemm": _fused_gemm,
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "MatMulIntegerToFloat": _matmul_integer_to_float,
    "DynamicQuantizeLSTM": _dynamic_quantize_lstm,
    "QLinearAdd": _qlinear_binary("Add"),
    "QLinearMul": _qlinear_binary("Mul"),
    "QLinearSigmoid": _qlinear_unary("Sigmoid"),
    "QLinearLeakyRelu": _qlinear_unary("LeakyRelu", "alpha"),
    "QLinearSoftmax": _qlinear_softmax,
    "QLinearAveragePool": _qlinear_pool("AveragePool", *_POOL),
    "QLinearGlobalAveragePool": _qlinear_pool("GlobalAveragePool"),
    "QLinearConcat": _qlinear_concat,
}


def function(proto: onnx.NodeProto, kinds: Sequence[Kind]) -> onnx.FunctionProto | None:
    """The function that a node of com.microsoft stands for; None if there is none."""
    builder = BUILDERS.get(proto.op_type)
    if builder is None:
        return None
    body = Body(proto, kinds)
    results = builder(body)
    for index, name in enumerate(proto.output):
        if name and (index >= len(results) or not results[index]):
            raise Unsupported(f"result number {index} of {proto.op_type} is not supported")
    count = len(proto.output)
    return helper.make_function(
        DOMAIN,
        proto.op_type,
        [f"in{i}" for i in range(len(kinds))],
        list(results[:count]),
        body.nodes,
        [helper.make_opsetid("", OPSET)],
    )


__all__ = ["BUILDERS", "DOMAIN", "function"]
