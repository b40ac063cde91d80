"""The passes of tensor graphs: the same results from fewer nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qigen.codegen.reference import evaluate
from qigen.formats.catalog import by_name
from qigen.frontends.onnx.importer import import_model
from qigen.frontends.onnx.reader import prepare_model
from qigen.ir.dims import Sym, ceildiv, floordiv, mod
from qigen.ir.graph import Graph
from qigen.ir.verify import verify
from qigen.passes.tensor import optimize_graph
from qigen.quantize.rtn import quantize_rtn

# Largest difference from the imported graph, relative to the largest value: f32 is rounding in
# another order, the others are the error of the arithmetic on these models.
TOLERANCE = {None: 2e-6, "bf16": 0.03, "int8": 0.05}


class Builder:
    """Makes ONNX models in a few words; weights are random."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def const(self, data: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(data), name))
        return name

    def random(self, *shape: int, scale: float = 0.3) -> str:
        return self.const((scale * self.rng.standard_normal(shape)).astype(np.float32))

    def add(self, op: str, *inputs: str, **attrs: Any) -> str:
        name = f"{op}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attrs))
        return name

    def model(
        self, inputs: dict[str, list[Any]], output: str, rank: int = 4, opset: int = 17
    ) -> onnx.ModelProto:
        infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
        shape: list[Any] = [None] * rank
        out = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "model", infos, [out], self.weights)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
        )


def cnn() -> onnx.ModelProto:
    """Stem, hard-swish, depthwise, squeeze-and-excite, residual, pooling, resize, transposed."""
    b = Builder()

    def conv(x: str, n: int, k: int, size: int, **attrs: Any) -> str:
        group = attrs.get("group", 1)
        w = b.random(n, k // group, size, size)
        return b.add("Conv", x, w, b.random(n), kernel_shape=[size, size], **attrs)

    def norm(x: str, n: int) -> str:
        vectors = [b.random(n) for _ in range(3)]
        variance = b.const(b.rng.uniform(0.5, 2, n).astype(np.float32))
        return b.add("BatchNormalization", x, *vectors, variance)

    def swish(x: str) -> str:
        shifted = b.add("Add", x, b.const(np.float32(3)))
        clipped = b.add("Clip", shifted, b.const(np.float32(0)), b.const(np.float32(6)))
        return b.add("Div", b.add("Mul", x, clipped), b.const(np.float32(6)))

    x = swish(norm(conv("x", 8, 3, 3, strides=[2, 2], pads=[1, 1, 1, 1]), 8))
    d = b.add("Relu", norm(conv(x, 8, 8, 3, pads=[1, 1, 1, 1], group=8), 8))
    s = b.add("GlobalAveragePool", d)
    s = b.add("HardSigmoid", conv(b.add("Relu", conv(s, 4, 8, 1)), 8, 4, 1), alpha=0.2, beta=0.5)
    r = b.add("Add", conv(b.add("Mul", d, s), 8, 8, 1), x)
    p = b.add("MaxPool", r, kernel_shape=[2, 2], strides=[2, 2])
    a = b.add(
        "AveragePool", conv(p, 20, 8, 3, pads=[1, 1, 1, 1]), kernel_shape=[3, 3], pads=[1, 1, 1, 1]
    )
    g = conv(a, 20, 20, 1, group=5)
    up = b.add(
        "Resize",
        g,
        "",
        b.const(np.array([1, 1, 2, 2], np.float32)),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    joined = b.add("Concat", up, r, axis=1)
    t = b.add(
        "ConvTranspose",
        joined,
        b.random(28, 5, 2, 2),
        b.random(5),
        kernel_shape=[2, 2],
        strides=[2, 2],
    )
    return b.model({"x": ["N", 3, "H", "W"]}, b.add("Sigmoid", t))


def encoder() -> onnx.ModelProto:
    """One layer: norm, attention with a mask, GELU."""
    b = Builder(1)
    d, heads = 24, 3

    def linear(x: str, k: int, n: int) -> str:
        return b.add("Add", b.add("MatMul", x, b.random(k, n)), b.random(n))

    def norm(x: str) -> str:
        centred = b.add("Sub", x, b.add("ReduceMean", x, axes=[-1]))
        square = b.add("Pow", centred, b.const(np.float32(2)))
        variance = b.add("Add", b.add("ReduceMean", square, axes=[-1]), b.const(np.float32(1e-5)))
        y = b.add("Div", centred, b.add("Sqrt", variance))
        return b.add("Add", b.add("Mul", y, b.random(d)), b.random(d))

    def split(x: str, perm: list[int]) -> str:
        view = b.add("Reshape", x, b.const(np.array([0, 0, heads, d // heads], np.int64)))
        return b.add("Transpose", view, perm=perm)

    x = norm("x")
    q, k, v = (linear(x, d, d) for _ in range(3))
    scores = b.add("MatMul", split(q, [0, 2, 1, 3]), split(k, [0, 2, 3, 1]))
    scores = b.add("Add", b.add("Div", scores, b.const(np.float32(8**0.5))), "mask")
    out = b.add("MatMul", b.add("Softmax", scores, axis=-1), split(v, [0, 2, 1, 3]))
    out = b.add("Transpose", out, perm=[0, 2, 1, 3])
    out = b.add("Reshape", out, b.const(np.array([0, 0, d], np.int64)))
    x = b.add("Add", linear(out, d, d), x)
    h = linear(norm(x), d, 40)
    erf = b.add("Erf", b.add("Div", h, b.const(np.float32(2**0.5))))
    gelu = b.add(
        "Mul", b.add("Mul", h, b.add("Add", erf, b.const(np.float32(1)))), b.const(np.float32(0.5))
    )
    y = b.add("Add", linear(gelu, 40, d), x)
    return b.model({"x": ["N", "S", d], "mask": ["N", 1, 1, "S"]}, y, rank=3)


def feeds(name: str) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(7)
    if name == "cnn":
        return {"x": rng.standard_normal((2, 3, 20, 28)).astype(np.float32)}
    if name == "pyramid":
        return {"x": rng.standard_normal((1, 3, 16, 24)).astype(np.float32)}
    mask = np.where(rng.random((2, 1, 1, 9)) < 0.3, -1e9, 0).astype(np.float32)
    mask[..., 0] = 0
    return {"x": rng.standard_normal((2, 9, 24)).astype(np.float32), "mask": mask}


def pyramid() -> onnx.ModelProto:
    """Images of three sizes, enlarged, joined and convolved."""
    b = Builder()
    parts = []
    for factor, n in ((1, 5), (2, 7), (4, 6)):
        w = b.random(n, 3, factor, factor)
        x = b.add("Conv", "x", w, kernel_shape=[factor] * 2, strides=[factor] * 2)
        if factor > 1:
            scales = b.const(np.array([1, 1, factor, factor], np.float32))
            x = b.add("Resize", x, "", scales, mode="nearest", nearest_mode="floor",
                      coordinate_transformation_mode="asymmetric")  # fmt: skip
        parts.append(x)
    joined = b.add("Concat", *parts, axis=1)
    y = b.add("Conv", joined, b.random(4, 18, 3, 3), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return b.model({"x": [1, 3, 16, 24]}, y)


MODELS = {"cnn": cnn, "encoder": encoder, "pyramid": pyramid}


def imported(model: onnx.ModelProto) -> Graph:
    graph = import_model(prepare_model(model, Path("model.onnx")), "model.onnx")
    verify(graph)
    return graph


def ops(graph: Graph) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in graph.nodes:
        counts[node.op] = counts.get(node.op, 0) + 1
    return counts


@pytest.mark.parametrize("activations", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_same_results(name: str, activations: str | None) -> None:
    graph = imported(MODELS[name]())
    fast = optimize_graph(graph, activations)
    verify(fast)
    (wanted,) = evaluate(graph, feeds(name)).values()
    (got,) = evaluate(fast, feeds(name)).values()
    assert np.abs(got - wanted).max() <= TOLERANCE[activations] * np.abs(wanted).max()


def test_weights_of_convolutions_become_bytes() -> None:
    graph = imported(cnn())
    row = by_name("s8g32")
    fast = optimize_graph(graph, rounded=lambda w, name: (quantize_rtn(w, row), None))
    dense = [n for n in fast.nodes if n.op in ("Convolution", "Product")]
    assert {n.attrs["arithmetic"] for n in dense if n.attrs.get("group", 1) == 1} == {"f32s8"}
    (wanted,) = evaluate(graph, feeds("cnn")).values()
    (got,) = evaluate(fast, feeds("cnn")).values()
    assert np.abs(got - wanted).max() <= 0.02 * np.abs(wanted).max()


def test_cnn_is_nhwc_throughout() -> None:
    found = ops(optimize_graph(imported(cnn())))
    assert found["Depthwise"] == 1
    # a transposition at either end, and that of the transposed convolution's pixels
    assert found["SwapAxes"] == 3, found
    assert "onnx.BatchNormalization" not in found and "onnx.Transpose" not in found
    # what is left beside products is broadcast over the image (squeeze and excite) or at the end
    assert found["Loop"] <= 2, found


def test_images_are_joined_once() -> None:
    found = ops(optimize_graph(imported(pyramid())))
    assert found["JoinImages"] == 1
    assert not found.keys() & {"PadImage", "onnx.Resize", "onnx.Concat"}, found


def test_encoder_is_fused() -> None:
    found = ops(optimize_graph(imported(encoder())))
    assert found == {"LayerNorm": 2, "Product": 4, "EncoderAttention": 1}


def test_qdq_becomes_integer_products() -> None:
    b = Builder(2)
    scale, zero = b.const(np.float32(0.03)), b.const(np.uint8(120))
    codes = b.const(b.rng.integers(-127, 128, (16, 8, 1, 1)).astype(np.int8))
    channel = b.const(b.rng.uniform(0.001, 0.01, 16).astype(np.float32))
    q = b.add("QuantizeLinear", "x", scale, zero)
    x = b.add("DequantizeLinear", q, scale, zero)
    w = b.add("DequantizeLinear", codes, channel, b.const(np.zeros(16, np.int8)), axis=0)
    y = b.add("Relu", b.add("Conv", x, w, b.random(16)))
    out = b.add("DequantizeLinear", b.add("QuantizeLinear", y, scale, zero), scale, zero)
    graph = imported(b.model({"x": [1, 8, 5, 7]}, out))
    fast = optimize_graph(graph)
    product = next(n for n in fast.nodes if n.op == "Product")
    assert product.attrs["arithmetic"] == "u8s8"
    assert ops(fast)["Loop"] == 1  # of the input: all else is in the product
    image = {"x": np.random.default_rng(3).standard_normal((1, 8, 5, 7)).astype(np.float32)}
    (wanted,) = evaluate(graph, image).values()
    (got,) = evaluate(fast, image).values()
    # sums are exact here and rounded in the model, so a code may be the next one
    assert np.abs(got - wanted).max() <= 0.03 * 1.001
    assert (got != wanted).mean() < 0.01


@pytest.mark.parametrize("zeros", ["none", "bytes", "floats"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_of_few_bits_keep_their_codes(bits: int, zeros: str) -> None:
    rng = np.random.default_rng(bits)
    n, k, block = 10, 90, 32
    blocks = -(-k // block)

    def codes(*shape: int) -> np.ndarray[Any, Any]:
        return rng.integers(0, 256, shape).astype(np.uint8)

    b = Builder()
    inputs = ["x", b.const(codes(n, blocks, block * bits // 8)), b.random(n, blocks)]
    inputs.append({
        "none": "",
        "bytes": b.const(codes(n, -(-blocks * bits // 8))),
        "floats": b.random(n, blocks, scale=3),
    }[zeros])  # fmt: skip
    # groups of whole size in any order: columns are sorted once
    order = rng.permutation(np.arange(k) // block).astype(np.int32)
    inputs += ["" if zeros == "bytes" else b.const(order), b.random(n)]
    y = b.add("MatMulNBits", *inputs, domain="com.microsoft", K=k, N=n, bits=bits,
              block_size=block)  # fmt: skip
    model = b.model({"x": [7, k]}, y, rank=2)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    graph = imported(model)
    fast = optimize_graph(graph)
    assert "FormatProduct" in ops(fast) and "ms.MatMulNBits" not in ops(fast)
    x = {"x": rng.standard_normal((7, k)).astype(np.float32)}
    (wanted,), (got,) = evaluate(graph, x).values(), evaluate(fast, x).values()
    assert np.abs(got - wanted).max() <= 2e-6 * np.abs(wanted).max()


def test_sizes_are_expressions() -> None:
    h, w = Sym.named("h"), Sym.named("w")
    assert str((h + 2 - 3) // 2 + 1) == "floordiv(h - 1, 2) + 1"
    assert (2 * h * w) // h == 2 * w and mod(6 * h, 3) == 0
    assert ceildiv(h, 4).subs({"h": 9}) == 3 and floordiv(-3, 2) == -2  # type: ignore[union-attr]
    assert h - h == 0 and h * 0 == 0 and (h + w).names() == {"h", "w"}  # type: ignore[union-attr]
