"""Quantized models as they come: patterns of codes, scales and zeros become integer products.

* QDQ: a product between DequantizeLinear and QuantizeLinear reads and makes codes.
* QLinearConv, QLinearMatMul: the same in one node.
* MatMulInteger and ConvInteger behind DynamicQuantizeLinear, with the multiplications that follow.

Codes of weights are kept. What is not recognised is computed in floats, which is right but slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qigen.formats import catalog
from qigen.formats.grouped import Grouped, grouped_row, grouped_rows, unpack_bits
from qigen.formats.tensor import QuantizedTensor
from qigen.ir import dims, schema
from qigen.ir.graph import Array, Graph, Node
from qigen.ir.tensor import MAX_FOLDED_BYTES, TensorOp, given
from qigen.ir.types import TYPES
from qigen.passes.tensor.products import (
    MAX_TAPS,
    TO_NCHW,
    TO_NHWC,
    Weights,
    Window,
    conv_window,
    emit_format_product,
    is_depthwise,
    packed_codes,
    padded,
)
from qigen.passes.tensor.rewrite import Rewriter


@dataclass(frozen=True)
class Codes:
    """A tensor as codes: value = scale * (code - zero), both numbers."""

    name: str
    scale: float
    zero: int


@dataclass(frozen=True)
class WeightCodes:
    """int8 weights, output channels first, with a scale by channel and no zero."""

    codes: Array
    scale: Array


def quantized_products(graph: Graph) -> Graph:
    """Integer products for what is quantized in the model."""
    r = Rewriter(graph)
    for node in r.nodes():
        if node.op == "onnx.DequantizeLinear" and r.alive(node):
            _unsigned(r, node)
    for node in r.nodes():
        if not r.alive(node):
            continue
        if node.op == "onnx.Conv":
            _convolution(r, node)
        elif node.op in ("onnx.MatMul", "onnx.Gemm"):
            _product(r, node)
        elif node.op == "onnx.MatMulInteger":
            _dynamic_product(r, node)
    return r.done()


def weight_only(graph: Graph) -> Graph:
    """Products of floats with int8 weights that have a scale by channel keep the codes.

    The codes are a matrix in a format of the catalog whose scales are all 1; the scales of the
    channels multiply the result, so nothing is rounded.
    """
    r = Rewriter(graph)
    for node in r.nodes():
        if node.op == "ms.MatMulNBits":
            _blocked_codes(r, node)
            continue
        if node.op != "onnx.MatMul" or r.dtype(node.inputs[0]) != "f32" or not r.alive(node):
            continue
        w = _weight_codes(r, node.inputs[1], 1) or _scaled_codes(r, node.inputs[1])
        if w is None or w.codes.ndim != 2:
            continue
        n, k = w.codes.shape
        weights = r.graph.add_constant(r.name(f"{node.inputs[1]}/codes"), _unit_format(w.codes))
        plain = r.name(f"{node.name}/codes")
        r.make(
            "FormatProduct",
            [node.inputs[0], weights],
            [plain],
            {"n": n, "k": k, "weight": node.inputs[1]},
            before=node,
        )
        scale = r.constant(f"{node.name}/scale", w.scale)
        r.replace(node, "onnx.Mul", [plain, scale])
    return r.done()


def _blocked_codes(r: Rewriter, node: Node) -> None:
    """MatMulNBits with constant weights as a product in a row of the catalog that holds its codes,
    scales and zeros exactly; with g_idx the columns are put in the order of their groups."""
    x, weights = node.inputs[0], r.array(node.inputs[1])
    arrays = {i: r.array(given(node, i)) for i in range(2, 6) if given(node, i)}
    if r.dtype(x) != "f32" or weights is None or any(a is None for a in arrays.values()):
        return
    n, k, bits, group = (node.attrs[name] for name in ("N", "K", "bits", "block_size"))
    blocks = -(-k // group)
    scales = np.asarray(arrays[2], np.float32).reshape(n, blocks)
    if not np.isfinite(scales).all():
        return
    stored = arrays.get(3)
    zeros: int | Array = 1 << (bits - 1)
    if stored is not None and stored.dtype == np.uint8:
        zeros = unpack_bits(stored.reshape(n, -1), bits)[:, :blocks]
    elif stored is not None:
        zeros = np.asarray(stored, np.float32).reshape(n, blocks)
    codes = unpack_bits(weights.reshape(n, -1), bits)[:, : blocks * group][:, :k]
    groups = arrays.get(4)
    if groups is not None:
        order = np.argsort(groups[:k], kind="stable")
        if not np.array_equal(groups[:k][order], np.arange(k) // group):
            return  # groups of several sizes
        if not np.array_equal(order, np.arange(k)):
            codes = codes[:, order]
            sorted_x = r.name(f"{x}/by_group")
            columns = r.constant(f"{node.name}/columns", order.astype(np.int64))
            r.make("onnx.Gather", [x, columns], [sorted_x], {"axis": -1}, before=node)
            x = sorted_x
    matrix = Grouped((n, k), bits, group, lambda a, b: codes[a:b], scales, zeros)
    row = grouped_row(matrix)
    if row is not None:
        bias = arrays.get(5)
        wanted = None if bias is None else np.asarray(bias, np.float32)
        emit_format_product(r, node, x, grouped_rows(matrix, row, 0, n), wanted, node.inputs[1])


def _scaled_codes(r: Rewriter, name: str) -> WeightCodes | None:
    """Cast of int8 constants [K, N] times a constant scale [N]."""
    scaled = r.producer(name, "onnx.Mul")
    if scaled is None:
        return None
    for i in (0, 1):
        cast = r.producer(scaled.inputs[i], "onnx.Cast")
        scale = r.array(scaled.inputs[1 - i])
        codes = r.array(cast.inputs[0]) if cast is not None else None
        if codes is None or scale is None or codes.dtype != np.int8 or codes.ndim != 2:
            continue
        if scale.size in (1, codes.shape[1]) and (scale.ndim == 0 or scale.shape[-1] == scale.size):
            return signed_codes(codes, scale, np.zeros(1, np.int8), 1)
    return None


def _unit_format(codes: Array) -> QuantizedTensor:
    """int8 codes [N, K] as a matrix of the catalog with scales of 1."""
    row = catalog.by_name("s8g32")
    n, k = codes.shape
    blocks = -(-k // row.block)
    full = np.full((n, blocks * row.block), 128, np.uint8)
    full[:, :k] = (codes.astype(np.int16) + 128).astype(np.uint8)
    ones = np.full((n, blocks, 1), np.float16(1).view(np.uint16), np.uint16)
    fields = {"codes": full.reshape(n, blocks, row.block), "d": ones}
    return QuantizedTensor(row, (n, k), fields)


def folded(graph: Graph) -> Graph:
    """Constants in the place of nodes whose inputs are constants: weights that no integer product
    took become floats here."""
    r = Rewriter(graph)
    for node in r.nodes():
        operator = schema.operator(node.op, node.name)
        if not isinstance(operator, TensorOp) or not operator.fold or operator.fused:
            continue
        arrays = [r.array(n) if n else np.zeros(0) for n in node.inputs]
        if not arrays or any(a is None for a in arrays) or len(node.outputs) != 1:
            continue
        value = r.graph.values[node.outputs[0]]
        if node.outputs[0] in r.graph.outputs or not dims.is_static(value.shape):
            continue
        most = max(MAX_FOLDED_BYTES, 8 * sum(a.nbytes for a in arrays if a is not None))
        sizes = [int(d) for d in value.shape]  # type: ignore[arg-type]
        if math.prod(sizes) * TYPES[value.dtype].bytes > most:
            continue  # a large result of little data is left to the run
        results = operator.reference(node, arrays, None)  # type: ignore[arg-type]
        data = np.asarray(results[0]).astype(TYPES[value.dtype].numpy)
        if data.shape == value.shape:
            r.use(node.outputs[0], r.constant(f"{node.outputs[0]}/values", data))
            r.remove(node)
    return r.done()


# -- recognising codes -----------------------------------------------------------------------------


def _number(r: Rewriter, name: str, default: float = 0.0) -> float | None:
    return r.scalar(name) if name else default


def _codes(r: Rewriter, name: str) -> Codes | None:
    """The codes behind a DequantizeLinear of u8 with one constant scale and zero."""
    node = r.producer(name, "onnx.DequantizeLinear")
    if node is None or r.dtype(node.inputs[0]) != "u8" or r.dtype(node.outputs[0]) != "f32":
        return None
    scale, zero = _number(r, node.inputs[1]), _number(r, given(node, 2))
    if scale is None or zero is None or r.array(node.inputs[0]) is not None:
        return None
    return Codes(node.inputs[0], scale, int(zero))


def _unsigned(r: Rewriter, node: Node) -> None:
    """int8 codes between a QuantizeLinear and its readers become uint8: zero and codes plus 128."""
    source = r.producer(node.inputs[0], "onnx.QuantizeLinear")
    if source is None or r.dtype(node.inputs[0]) != "i8" or source.outputs[0] in r.graph.outputs:
        return
    readers = r.consumers(source.outputs[0])
    if any(n.op != "onnx.DequantizeLinear" for n in readers):
        return
    zeros = [_number(r, given(n, 2)) for n in (source, *readers)]
    scales = [_number(r, n.inputs[1]) for n in (source, *readers)]
    if any(z is None for z in zeros) or any(s is None for s in scales):
        return
    attrs = {**source.attrs, "output_dtype": 0}
    zero = r.constant(f"{source.name}/zero", np.array(int(zeros[0] or 0) + 128, np.uint8))
    r.replace(source, "onnx.QuantizeLinear", [*source.inputs[:2], zero], attrs)
    for n, z in zip(readers, zeros[1:], strict=True):
        own = r.constant(f"{n.name}/zero", np.array(int(z or 0) + 128, np.uint8))
        r.replace(n, "onnx.DequantizeLinear", [*n.inputs[:2], own], dict(n.attrs))


def _weight_codes(r: Rewriter, name: str, axis: int) -> WeightCodes | None:
    """Constant weights behind a DequantizeLinear; ``axis`` is that of the output channels."""
    node = r.producer(name, "onnx.DequantizeLinear")
    if node is None or r.dtype(node.outputs[0]) != "f32" or node.attrs.get("block_size"):
        return None
    codes, scale = r.array(node.inputs[0]), r.array(node.inputs[1])
    zero_name = given(node, 2)
    zero = r.array(zero_name) if zero_name else np.zeros(1, np.int8)
    if codes is None or scale is None or zero is None:
        return None
    if scale.size > 1 and node.attrs["axis"] % codes.ndim != axis:
        return None
    return signed_codes(codes, scale, zero, axis)


def signed_codes(codes: Array, scale: Array, zero: Array, axis: int) -> WeightCodes | None:
    """Weights as int8 without zero, output channels first; None if they have another zero."""
    middle = 128 if codes.dtype == np.uint8 else 0
    if codes.dtype not in (np.int8, np.uint8) or (zero.astype(np.int32) != middle).any():
        return None
    if codes.ndim < 2:
        return None  # a vector is no matrix of weights
    n = codes.shape[axis]
    if scale.size not in (1, n):
        return None
    moved = np.moveaxis(codes.astype(np.int16) - middle, axis, 0).astype(np.int8)
    channel = np.broadcast_to(scale.reshape(-1).astype(np.float32), (n,))
    return WeightCodes(np.ascontiguousarray(moved), np.ascontiguousarray(channel))


def _bias(r: Rewriter, name: str, n: int) -> Array | None:
    """A bias as floats: a constant, or an int32 constant behind DequantizeLinear."""
    if not name:
        return np.zeros(n, np.float32)
    data = r.array(name)
    if data is not None:
        return data.reshape(-1).astype(np.float32) if data.size == n else None
    node = r.producer(name, "onnx.DequantizeLinear")
    if node is None:
        return None
    codes, scale = r.array(node.inputs[0]), r.array(node.inputs[1])
    zero = _number(r, given(node, 2))
    if codes is None or scale is None or zero is None or codes.size != n:
        zeros = r.array(given(node, 2)) if given(node, 2) else None
        if codes is None or scale is None or zeros is None or zeros.any() or codes.size != n:
            return None
        zero = 0.0
    return ((codes.reshape(-1) - zero) * scale.reshape(-1)).astype(np.float32)


# -- integer products ------------------------------------------------------------------------------


def _static(r: Rewriter, stem: str, weights: Weights, x: Codes, bias: Array) -> list[str]:
    """The inputs of a product behind x and its weights: bias, scale, where sums start."""
    assert weights.scale is not None and weights.sums is not None
    scale = weights.scale * np.float32(x.scale)
    init = -x.zero * weights.sums.astype(np.int64)
    return [
        r.constant(f"{stem}/bias", padded(bias, np.float32)),
        r.constant(f"{stem}/scale", padded(scale, np.float32)),
        r.constant(f"{stem}/init", padded(init.astype(np.int32), np.int32)),
    ]


def _product(r: Rewriter, node: Node) -> None:
    x = _codes(r, node.inputs[0])
    transposed = node.op == "onnx.Gemm" and node.attrs["transB"]
    if node.op == "onnx.Gemm" and (
        node.attrs["transA"] or node.attrs["alpha"] != 1.0 or node.attrs["beta"] != 1.0
    ):
        return
    w = _weight_codes(r, node.inputs[1], 0 if transposed else 1)
    if x is None or w is None or w.codes.ndim != 2:
        return
    n, k = w.codes.shape
    bias = _bias(r, given(node, 2), n)
    if bias is None:
        return
    codes = x.name
    if k % 4:
        return
    weights = packed_codes(w.codes[:, None, :], w.scale)
    packed = r.constant(f"{node.name}/packed", weights.packed)
    r.replace(
        node,
        "Product",
        [codes, packed, *_static(r, node.name, weights, x, bias)],
        {"arithmetic": "u8s8", "n": n, "k": k, "weight": node.inputs[1]},
    )


def _convolution(r: Rewriter, node: Node) -> None:
    x = _codes(r, node.inputs[0])
    w = _weight_codes(r, node.inputs[1], 0)
    if x is None or w is None or len(r.shape(node.inputs[0])) != 4:
        return
    n = w.codes.shape[0]
    bias = _bias(r, given(node, 2), n)
    channels = r.shape(node.inputs[0])[1]
    window = conv_window(r, node, w.codes.shape[2:])
    group = node.attrs["group"]
    if bias is None or window is None or not isinstance(channels, int):
        return
    if int(np.prod(w.codes.shape[2:])) > MAX_TAPS:
        return
    source, result = r.name(f"{node.name}/nhwc"), r.name(f"{node.name}/image")
    if is_depthwise(window, channels, n, w.codes.shape[1], group, "u8s8"):
        r.make("onnx.Transpose", [x.name], [source], {"perm": TO_NHWC}, before=node)
        _depthwise(r, node, source, w, x, bias, window, result)
    elif group == 1:
        r.make("onnx.Transpose", [x.name], [source], {"perm": TO_NHWC}, before=node)
        _dense(r, node, source, w, x, bias, window, result)
    else:
        return
    r.replace(node, "onnx.Transpose", [result], {"perm": TO_NCHW})


def _depthwise(
    r: Rewriter,
    node: Node,
    source: str,
    w: WeightCodes,
    x: Codes,
    bias: Array,
    window: Window,
    result: str,
) -> None:
    n = len(w.codes)
    taps = w.codes.reshape(n, -1).T
    full = np.zeros((len(taps), -(-n // 16) * 16), np.float32)
    full[:, :n] = taps
    inputs = [
        source,
        r.constant(f"{node.name}/packed", full),
        r.constant(f"{node.name}/bias", padded(bias, np.float32)),
        r.constant(f"{node.name}/scale", padded(w.scale * np.float32(x.scale), np.float32)),
        "",
        "",
        r.constant(f"{node.name}/x_zero", np.array([x.zero], np.int32)),
    ]
    r.make(
        "Depthwise",
        inputs,
        [result],
        {
            "arithmetic": "u8s8",
            "n": n,
            "k": 1,
            "weight": node.inputs[1],
            "kernel": window.kernel,
            "strides": window.strides,
            "dilations": window.dilations,
            "pads": window.pads,
        },
        before=node,
    )


def _dense(
    r: Rewriter,
    node: Node,
    source: str,
    w: WeightCodes,
    x: Codes,
    bias: Array,
    window: Window,
    result: str,
) -> None:
    n, k = w.codes.shape[:2]
    taps = w.codes.reshape(n, k, -1).transpose(0, 2, 1)
    weights = packed_codes(np.ascontiguousarray(taps), w.scale)
    packed = r.constant(f"{node.name}/packed", weights.packed)
    tail = _static(r, node.name, weights, x, bias)
    attrs: dict[str, Any] = {"arithmetic": "u8s8", "n": n, "k": k, "weight": node.inputs[1]}
    channels = -(-k // 4) * 4
    if any(window.pads) or channels != k:
        image = r.name(f"{node.name}/padded")
        r.make(
            "PadImage",
            [source],
            [image],
            {
                "pads": window.pads,
                "channels": channels,
                "to": "u8",
                "zero": x.zero,
            },
            before=node,
        )
        source = image
    if window.kernel == (1, 1) and window.strides == (1, 1):
        r.make("Product", [source, packed, *tail], [result], attrs, before=node)
        return
    attrs.update(kernel=window.kernel, strides=window.strides, dilations=window.dilations, group=1)
    r.make("Convolution", [source, packed, *tail], [result], attrs, before=node)


def _dynamic_product(r: Rewriter, node: Node) -> None:
    """DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul by the scales."""
    quantize = r.producer(node.inputs[0], "onnx.DynamicQuantizeLinear")
    if quantize is None or given(node, 2) != quantize.outputs[2]:
        return
    codes = r.array(node.inputs[1])
    zero_name = given(node, 3)
    zero = r.array(zero_name) if zero_name else np.zeros(1, np.int8)
    cast = r.only_consumer(node.outputs[0])
    if codes is None or codes.ndim != 2 or zero is None or cast is None or cast.op != "onnx.Cast":
        return
    if not zero_name and codes.dtype == np.uint8:
        return
    scaled = r.only_consumer(cast.outputs[0])
    if scaled is None or scaled.op != "onnx.Mul" or r.dtype(cast.outputs[0]) != "f32":
        return
    factor = r.producer(next(n for n in scaled.inputs if n != cast.outputs[0]), "onnx.Mul")
    if factor is None or quantize.outputs[1] not in factor.inputs:
        return
    w_scale = r.array(next(n for n in factor.inputs if n != quantize.outputs[1]))
    if w_scale is None:
        return
    w = signed_codes(codes, w_scale, zero, 1)
    x = quantize.inputs[0]
    if w is None or w.codes.shape[1] % 4:
        return
    n, k = w.codes.shape
    weights = packed_codes(w.codes[:, None, :], w.scale)
    assert weights.sums is not None
    image = _quantized_once(r, quantize, x)
    r.replace(
        scaled,
        "Product",
        [
            image[0],
            r.constant(f"{node.name}/packed", weights.packed),
            "",
            r.constant(f"{node.name}/scale", padded(w.scale, np.float32)),
            r.constant(f"{node.name}/sums", padded(weights.sums, np.int32)),
            image[1],
            image[2],
        ],
        {"arithmetic": "u8s8", "n": n, "k": k, "weight": node.inputs[1]},
    )


def _quantized_once(r: Rewriter, quantize: Node, x: str) -> tuple[str, str, str]:
    """The codes, scale and zero of x by a kernel; made once for all products that read it."""
    shape = r.shape(x)
    for reader in r.consumers(x):
        if reader.op == "QuantizeTensor":
            return reader.outputs[0], reader.outputs[1], reader.outputs[2]
    names = [r.name(f"{x}/{part}") for part in ("u8", "scale", "zero", "partials")]
    r.make("QuantizeTensor", [x], names, {"columns": shape[-1]}, before=quantize)
    return names[0], names[1], names[2]
