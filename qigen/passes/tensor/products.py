"""Matrix products and convolutions with constant weights, as nodes that have generated kernels.

Convolutions become NHWC with a Transpose on either side; the pass ``layout`` lets those meet and
cancel. Weights are packed here, in the arithmetic that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from qigen.backends.cpu.gemm import check_depthwise, check_sums, pack_weights
from qigen.errors import Unsupported
from qigen.formats.tensor import QuantizedTensor, float_bits
from qigen.ir.graph import Array, Graph, Node
from qigen.ir.tensor import given
from qigen.passes.tensor.rewrite import Rewriter

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
MAX_TAPS = 256


@dataclass(frozen=True)
class Weights:
    """Weights [N, taps, K] of a product as its kernel takes them, and what turns sums into numbers.

    ``scale`` (by channel) is there for f32s8 and u8s8, ``sums`` (of the codes, by
    channel) for u8s8.
    """

    packed: Array
    n: int
    k: int
    arithmetic: str
    scale: Array | None = None
    sums: Array | None = None


def quantize_channels(w: Array) -> tuple[Array, Array]:
    """int8 codes and f32 scales by output channel (axis 0), symmetric: absmax / 127."""
    flat = w.reshape(len(w), -1).astype(np.float32)
    scale = np.abs(flat).max(axis=1) / np.float32(127)
    safe = np.where(scale > 0, scale, 1).astype(np.float32)
    codes = np.clip(np.rint(flat / safe[:, None]), -127, 127).astype(np.int8)
    return codes.reshape(w.shape), scale.astype(np.float32)


def prepare(w: Array, arithmetic: str) -> Weights:
    """Float weights [N, taps, K] in an arithmetic; f32s8 and u8s8 round them by channel."""
    n, _, k = w.shape
    if arithmetic == "u8s8":
        codes, scale = quantize_channels(w)
        return packed_codes(codes, scale)
    if arithmetic == "f32s8":
        codes, scale = quantize_channels(w)
        return Weights(pack_weights(codes, arithmetic), n, k, arithmetic, scale)
    data = float_bits(w, "bf16") if arithmetic == "bf16" else np.ascontiguousarray(w, np.float32)
    return Weights(pack_weights(data, arithmetic), n, k, arithmetic)


def packed_codes(codes: Array, scale: Array) -> Weights:
    """int8 weights [N, taps, K] with a scale by channel."""
    n, taps, k = codes.shape
    check_sums(taps * k)
    sums = codes.reshape(n, -1).astype(np.int32).sum(axis=1, dtype=np.int32)
    return Weights(pack_weights(codes, "u8s8"), n, k, "u8s8", scale, sums)


def padded(vector: Array, dtype: Any) -> Array:
    """A vector by channel, padded to whole vectors of 16."""
    out = np.zeros(-(-len(vector) // 16) * 16, dtype)
    out[: len(vector)] = vector
    return out


Rounding: TypeAlias = Callable[[Array, str], tuple[QuantizedTensor, Array | None] | None]


class Products:
    """The pass; ``arithmetic_of(node)`` says how a node's product is computed.

    ``rounded`` brings the weights [N, K] of matrix products to a format of the catalog; they are
    then read by the kernels of that format. With them comes what is added to the product [N], or
    None. None keeps a matrix as it is.
    """

    def __init__(
        self,
        graph: Graph,
        arithmetic_of: Callable[[Node], str],
        rounded: Rounding | None = None,
    ) -> None:
        self.r = Rewriter(graph)
        self.arithmetic_of = arithmetic_of
        self.rounded = rounded

    def run(self) -> Graph:
        r = self.r
        for node in r.nodes():
            if not r.alive(node):
                continue
            if node.op == "onnx.MatMul":
                self._matmul(node)
            elif node.op == "onnx.Gemm":
                self._gemm(node)
            elif node.op == "onnx.Conv":
                self._convolution(node)
            elif node.op == "onnx.ConvTranspose":
                self._transposed(node)
        return r.done()

    # -- matrix products --------------------------------------------------------------------------

    def _matmul(self, node: Node) -> None:
        r = self.r
        x, name = node.inputs
        w = r.array(name)
        if w is None or w.ndim != 2 or w.dtype != np.float32 or r.dtype(x) != "f32":
            return
        if len(r.shape(x)) < 1 or 0 in w.shape:
            return
        self._product(node, x, np.ascontiguousarray(w.T), None, name)

    def _gemm(self, node: Node) -> None:
        r, a = self.r, node.attrs
        x = node.inputs[0]
        w = r.array(node.inputs[1])
        bias_name = given(node, 2)
        if w is None or w.dtype != np.float32 or r.dtype(x) != "f32" or a["transA"] or 0 in w.shape:
            return
        n = w.shape[0] if a["transB"] else w.shape[1]
        bias = r.array(bias_name) if bias_name else np.zeros(n, np.float32)
        if bias is None or (bias.ndim > 1 and bias.size not in (1, n)) or bias.size not in (1, n):
            return
        matrix = w if a["transB"] else w.T
        bias = np.broadcast_to(bias.reshape(-1) * np.float32(a["beta"]), (n,))
        self._product(
            node, x, np.ascontiguousarray(matrix * np.float32(a["alpha"])), bias, node.inputs[1]
        )

    def _product(self, node: Node, x: str, w: Array, bias: Array | None, name: str) -> None:
        """Replace a node by x times w[N, K] transposed."""
        found = self.rounded(w, name) if self.rounded is not None else None
        if found is not None:
            tensor, shift = found
            if shift is not None:
                bias = shift if bias is None else bias + shift
            emit_format_product(self.r, node, x, tensor, bias, name)
            return
        weights = prepare(w[:, None, :], self.arithmetic_of(node))
        emit_product(self.r, node, x, weights, bias, name)

    # -- convolutions -----------------------------------------------------------------------------

    def _convolution(self, node: Node) -> None:
        r, a = self.r, node.attrs
        w = r.array(node.inputs[1])
        bias_name = given(node, 2)
        bias = r.array(bias_name) if bias_name else None
        rank = len(r.shape(node.inputs[0])) - 2
        if w is None or w.dtype != np.float32 or rank not in (1, 2) or 0 in w.shape:
            return
        if (bias_name and bias is None) or not isinstance(r.shape(node.inputs[0])[1], int):
            return
        window = conv_window(r, node, w.shape[2:])
        if window is None or int(np.prod(w.shape[2:])) > MAX_TAPS:
            return
        factor, offset = self._following(node)
        kept = w * factor.reshape(-1, *(1,) * (w.ndim - 1)).astype(np.float32)
        total = offset if bias is None else bias * factor + offset
        if rank == 1:
            kept = kept[:, :, None, :]
        emit_convolution(
            r,
            node,
            node.inputs[0],
            kept,
            total.astype(np.float32),
            window,
            a["group"],
            self.arithmetic_of(node),
            node.inputs[1],
        )

    def _following(self, node: Node) -> tuple[Array, Array]:
        """Take constants by channel that multiply or are added behind a node into (factor, offset);
        what did that is dropped."""
        r = self.r
        channels = r.shape(node.outputs[0])[1]
        assert isinstance(channels, int)
        factor = np.ones(channels, np.float64)
        offset = np.zeros(channels, np.float64)
        while True:
            reader = r.only_consumer(node.outputs[0])
            if reader is None or reader.op not in ("onnx.Mul", "onnx.Add", "onnx.Sub", "onnx.Div"):
                return factor, offset
            if reader.inputs.count(node.outputs[0]) != 1:
                return factor, offset
            first = reader.inputs[0] == node.outputs[0]
            if not first and reader.op in ("onnx.Sub", "onnx.Div"):
                return factor, offset
            data = r.array(reader.inputs[1 if first else 0])
            rank = len(r.shape(node.outputs[0]))
            if data is None or r.shape(reader.outputs[0]) != r.shape(node.outputs[0]):
                return factor, offset
            shape = (1,) * (rank - data.ndim) + data.shape
            if data.size not in (1, channels) or (data.size > 1 and shape[1] != channels):
                return factor, offset
            vector = np.broadcast_to(data.reshape(-1).astype(np.float64), (channels,))
            if reader.op in ("onnx.Mul", "onnx.Div"):
                vector = vector if reader.op == "onnx.Mul" else 1 / vector
                factor, offset = factor * vector, offset * vector
            else:
                offset = offset + (vector if reader.op == "onnx.Add" else -vector)
            # the node makes what its reader made
            r.remove(reader)
            r.graph.nodes[r._at(node)].outputs = list(reader.outputs)
            r._index()

    def _transposed(self, node: Node) -> None:
        """Windows that do not overlap: a product that makes kernel x kernel pixels of each
        pixel."""
        r, a = self.r, node.attrs
        w = r.array(node.inputs[1])
        bias_name = given(node, 2)
        bias = r.array(bias_name) if bias_name else None
        if w is None or w.dtype != np.float32 or w.ndim != 4 or (bias_name and bias is None):
            return
        kernel = w.shape[2:]
        plain = (
            tuple(a["strides"] or (1, 1)) == kernel
            and tuple(a["dilations"] or (1, 1)) == (1, 1)
            and not any(a["pads"] or ())
            and not any(a["output_padding"] or ())
            and not a["output_shape"]
            and a["group"] == 1
            and a["auto_pad"] in ("NOTSET", "VALID")
        )
        if not plain:
            return
        factor, offset = self._following(node)
        channels = w.shape[1]
        kept = w * factor.reshape(1, -1, 1, 1).astype(np.float32)
        total = (offset if bias is None else bias * factor + offset).astype(np.float32)
        # rows of the matrix: (ky, kx, channel)
        matrix = kept.transpose(2, 3, 1, 0).reshape(-1, w.shape[0])
        b, _, h, width = r.shape(node.inputs[0])
        stem = node.name
        nhwc = r.name(f"{stem}/nhwc")
        r.make("onnx.Transpose", [node.inputs[0]], [nhwc], {"perm": TO_NHWC}, before=node)
        flat = r.name(f"{stem}/pixels")
        weights = prepare(matrix[:, None, :], self.arithmetic_of(node))
        product = r.make("onnx.Identity", [nhwc], [flat], before=node)
        emit_product(
            r, product, nhwc, weights, np.tile(total, kernel[0] * kernel[1]), node.inputs[1]
        )
        split = r.name(f"{stem}/split")
        r.make(
            "onnx.Reshape",
            [flat],
            [split],
            {"shape": (b, h, width, *kernel, channels), "allowzero": 1},
            before=node,
        )
        moved = r.name(f"{stem}/moved")
        r.make("onnx.Transpose", [split], [moved], {"perm": (0, 1, 3, 2, 4, 5)}, before=node)
        image = r.name(f"{stem}/image")
        r.make(
            "onnx.Reshape",
            [moved],
            [image],
            {"shape": (b, h * kernel[0], width * kernel[1], channels), "allowzero": 1},
            before=node,
        )
        r.replace(node, "onnx.Transpose", [image], {"perm": TO_NCHW})


TABLE_WEIGHTS = 1 << 16
"""Tables with fewer weights stay as they are."""


def quantized_tables(graph: Graph) -> Graph:
    """Large tables that rows are looked up in, as int8 with a scale by row."""
    r = Rewriter(graph)
    for node in r.nodes():
        if node.op != "onnx.Gather" or node.attrs["axis"] != 0:
            continue
        table = r.array(node.inputs[0])
        if table is None or table.dtype != np.float32 or table.ndim != 2:
            continue
        if table.size < TABLE_WEIGHTS:
            continue
        codes, scale = quantize_channels(table)
        r.replace(
            node,
            "GatherCodes",
            [
                r.constant(f"{node.inputs[0]}/codes", codes),
                r.constant(f"{node.inputs[0]}/scale", scale),
                node.inputs[1],
            ],
        )
    return r.done()


@dataclass(frozen=True)
class Window:
    """A 2-D window; pads are (top, left, bottom, right)."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]


def conv_window(r: Rewriter, node: Node, kernel: tuple[int, ...]) -> Window | None:
    """The window of a convolution or pool node in two dimensions; None if pads need run-time
    sizes."""
    a = node.attrs
    rank = len(kernel)
    strides = tuple(a["strides"] or (1,) * rank)
    dilations = tuple(a.get("dilations") or (1,) * rank)
    pads = list(a["pads"] or (0,) * (2 * rank))
    auto = a["auto_pad"]
    if auto == "VALID":
        pads = [0] * (2 * rank)
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        for i in range(rank):
            size = r.shape(node.inputs[0])[2 + i]
            if not isinstance(size, int):
                if strides[i] != 1:
                    return None
                total = dilations[i] * (kernel[i] - 1)
            else:
                out = -(-size // strides[i])
                total = max((out - 1) * strides[i] + dilations[i] * (kernel[i] - 1) + 1 - size, 0)
            small, large = total // 2, total - total // 2
            pads[i], pads[rank + i] = (small, large) if auto == "SAME_UPPER" else (large, small)
    if any(p < 0 for p in pads):
        return None
    if rank == 1:
        return Window((1, kernel[0]), (1, strides[0]), (1, dilations[0]), (0, pads[0], 0, pads[1]))
    return Window(
        (kernel[0], kernel[1]),
        (strides[0], strides[1]),
        (dilations[0], dilations[1]),
        (pads[0], pads[1], pads[2], pads[3]),
    )


def emit_product(
    r: Rewriter, node: Node, x: str, weights: Weights, bias: Array | None, name: str
) -> None:
    """Replace ``node`` by the product of x with packed weights; quantizes the rows of x for
    u8s8."""
    stem = name
    w = r.constant(f"{stem}/packed", weights.packed)
    b = r.constant(f"{node.name}/bias", padded(bias, np.float32)) if bias is not None else ""
    attrs: dict[str, Any] = {
        "arithmetic": weights.arithmetic,
        "n": weights.n,
        "k": weights.k,
        "weight": name,
    }
    if weights.arithmetic == "u8s8":
        assert weights.scale is not None and weights.sums is not None
        scale = r.constant(f"{stem}/scale", padded(weights.scale, np.float32))
        sums = r.constant(f"{stem}/sums", padded(weights.sums, np.int32))
        xq, x_scale, x_zero = quantized_rows(r, node, x, weights.k)
        r.replace(node, "Product", [xq, w, b, scale, sums, x_scale, x_zero], attrs)
        return
    if weights.arithmetic == "bf16":
        x = converted(r, node, x, weights.k, "bf16")
    extra = []
    if weights.scale is not None:
        extra = [r.constant(f"{stem}/scale", padded(weights.scale, np.float32))]
    r.replace(node, "Product", [x, w, b, *extra], attrs)


def emit_format_product(
    r: Rewriter, node: Node, x: str, w: QuantizedTensor, bias: Array | None, name: str
) -> None:
    """Replace ``node`` by the product of x with weights in a format of the catalog."""
    n, k = w.shape
    weights = r.graph.add_constant(r.name(f"{name}/{w.format.name}"), w)
    b = r.constant(f"{node.name}/bias", padded(bias, np.float32)) if bias is not None else ""
    r.replace(node, "FormatProduct", [x, weights, b], {"n": n, "k": k, "weight": name})


def quantized_rows(r: Rewriter, node: Node, x: str, k: int) -> tuple[str, str, str]:
    """x as u8 rows with scales and zeros; made once for all products that read it."""
    for reader in r.consumers(x):
        if reader.op == "QuantizeRows":
            return reader.outputs[0], reader.outputs[1], reader.outputs[2]
    names = [r.name(f"{x}/{part}") for part in ("u8", "scale", "zero")]
    producer = r.producer(x)
    r.make(
        "QuantizeRows",
        [x],
        names,
        {"columns": -(-k // 4) * 4},
        after=producer,
        before=None if producer is not None else r.graph.nodes[0],
    )
    return names[0], names[1], names[2]


def converted(r: Rewriter, node: Node, x: str, k: int, to: str) -> str:
    """x as bf16 rows of an even number of columns; made once for all that read it."""
    for reader in r.consumers(x):
        if reader.op == "ToBf16":
            return reader.outputs[0]
    name = r.name(f"{x}/{to}")
    producer = r.producer(x)
    r.make(
        "ToBf16",
        [x],
        [name],
        {"columns": -(-k // 2) * 2},
        after=producer,
        before=None if producer is not None else r.graph.nodes[0],
    )
    return name


def emit_convolution(
    r: Rewriter,
    node: Node,
    x: str,
    w: Array,
    bias: Array,
    window: Window,
    group: int,
    arithmetic: str,
    name: str,
) -> None:
    """Replace an NCHW convolution (1-D or 2-D) by its NHWC form between transposes."""
    one = len(r.shape(x)) == 3
    n, per_group = w.shape[0], w.shape[1]
    channels = r.shape(x)[1]
    assert isinstance(channels, int)
    depthwise = is_depthwise(window, channels, n, per_group, group, "f32")
    if depthwise and arithmetic in ("bf16", "f32s8"):
        arithmetic = "f32"
    if group > 1 and not depthwise and arithmetic != "f32":
        arithmetic = "f32"
    source = r.name(f"{node.name}/nhwc")
    if one:
        b, _, length = r.shape(x)
        turned = r.name(f"{node.name}/turned")
        r.make("onnx.Transpose", [x], [turned], {"perm": (0, 2, 1)}, before=node)
        r.make(
            "onnx.Reshape",
            [turned],
            [source],
            {"shape": (b, 1, length, channels), "allowzero": 1},
            before=node,
        )
    else:
        r.make("onnx.Transpose", [x], [source], {"perm": TO_NHWC}, before=node)
    b_name = r.constant(f"{node.name}/bias", padded(bias, np.float32))
    result = r.name(f"{node.name}/image")
    if depthwise:
        _depthwise(r, node, source, w, b_name, window, result, name)
    else:
        _dense(r, node, source, w, b_name, window, group, arithmetic, result, name)
    if one:
        b, _, length, _ = r.shape(result)
        flat = r.name(f"{node.name}/row")
        r.make(
            "onnx.Reshape", [result], [flat], {"shape": (b, length, n), "allowzero": 1}, before=node
        )
        r.replace(node, "onnx.Transpose", [flat], {"perm": (0, 2, 1)})
    else:
        r.replace(node, "onnx.Transpose", [result], {"perm": TO_NCHW})


def is_depthwise(
    window: Window, channels: int, n: int, per_group: int, group: int, arithmetic: str
) -> bool:
    """Whether a convolution has a depthwise kernel."""
    if not group == channels == n or per_group != 1 or group == 1:
        return False
    try:
        check_depthwise(window.kernel, window.dilations[1], arithmetic)
    except Unsupported:
        return False
    return True


def _depthwise(
    r: Rewriter, node: Node, x: str, w: Array, bias: str, window: Window, result: str, name: str
) -> None:
    n = w.shape[0]
    taps = w.reshape(n, -1).T  # [taps, C]
    full = np.zeros((len(taps), -(-n // 16) * 16), np.float32)
    full[:, :n] = taps
    packed = r.constant(f"{name}/packed", full)
    r.make(
        "Depthwise",
        [x, packed, bias],
        [result],
        {
            "arithmetic": "f32",
            "n": n,
            "k": 1,
            "weight": name,
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
    x: str,
    w: Array,
    bias: str,
    window: Window,
    group: int,
    arithmetic: str,
    result: str,
    name: str,
) -> None:
    n, k = w.shape[:2]
    taps = w.reshape(n, k, -1).transpose(0, 2, 1)  # [N, taps, K]
    attrs: dict[str, Any] = {"arithmetic": arithmetic, "n": n, "k": k, "weight": name}
    tail: list[str] = []
    if group > 1:
        parts = [prepare(part, arithmetic).packed for part in np.split(taps, group)]
        packed = r.constant(f"{name}/packed", np.concatenate(parts))
    else:
        weights = prepare(taps, arithmetic)
        packed = r.constant(f"{name}/packed", weights.packed)
        if weights.scale is not None:
            tail.append(r.constant(f"{name}/scale", padded(weights.scale, np.float32)))
        if weights.sums is not None:
            tail.append(r.constant(f"{name}/sums", padded(weights.sums, np.int32)))
    pointwise = window.kernel == (1, 1) and window.strides == (1, 1) and group == 1
    if pointwise and not any(window.pads):
        if arithmetic == "u8s8":
            xq, scale, zero = quantized_image(r, node, x, window.pads)
            r.make("Product", [xq, packed, bias, *tail, scale, zero], [result], attrs, before=node)
        else:
            source = converted(r, node, x, k, "bf16") if arithmetic == "bf16" else x
            r.make("Product", [source, packed, bias, *tail], [result], attrs, before=node)
        return
    extra = list(tail)
    if arithmetic == "u8s8":
        source, scale, zero = quantized_image(r, node, x, window.pads)
        extra += [scale, zero]
    else:
        to = "bf16" if arithmetic == "bf16" else "f32"
        source = padded_image(r, node, x, window.pads, to)
    attrs.update(
        kernel=window.kernel, strides=window.strides, dilations=window.dilations, group=group
    )
    r.make("Convolution", [source, packed, bias, *extra], [result], attrs, before=node)


def padded_image(r: Rewriter, node: Node, x: str, pads: tuple[int, ...], arithmetic: str) -> str:
    """x with borders in the type of an arithmetic; x itself if nothing is to be done."""
    channels = r.shape(x)[3]
    assert isinstance(channels, int)
    if arithmetic == "f32" and not any(pads):
        return x
    columns = channels if arithmetic == "f32" else -(-channels // 2) * 2
    attrs = {"pads": tuple(pads), "channels": columns, "to": arithmetic}
    for reader in r.consumers(x):
        if reader.op == "PadImage" and all(reader.attrs[k] == v for k, v in attrs.items()):
            return reader.outputs[0]
    name = r.name(f"{x}/padded")
    r.make("PadImage", [x], [name], attrs, before=node)
    return name


def quantized_image(r: Rewriter, node: Node, x: str, pads: tuple[int, ...]) -> tuple[str, str, str]:
    """x as u8 with one scale and zero for the whole tensor, found at run time."""
    channels = r.shape(x)[3]
    assert isinstance(channels, int)
    attrs = {"pads": tuple(pads), "channels": -(-channels // 4) * 4}
    for reader in r.consumers(x):
        if reader.op == "QuantizeImage" and all(reader.attrs[k] == v for k, v in attrs.items()):
            return reader.outputs[0], reader.outputs[1], reader.outputs[2]
    names = [r.name(f"{x}/{part}") for part in ("u8", "scale", "zero", "partials")]
    r.make("QuantizeImage", [x], names, attrs, before=node)
    return names[0], names[1], names[2]
