"""Runs a tensor graph with numpy: what its kernels are compared with, node by node.

Operators of ONNX run by their own references; what passes made is computed here from the packed
constants that the kernels read, in float64 or int64, and rounded once to the type of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from qigen.backends.cpu.elementwise import Step, chain_reference
from qigen.backends.cpu.gemm import unpack_weights
from qigen.errors import UsageError
from qigen.formats.tensor import QuantizedTensor
from qigen.ir import dims, schema
from qigen.ir.dims import Sym
from qigen.ir.graph import Array, Graph, Node, load_constant
from qigen.ir.ops.graph import BIAS, CHAIN, PARTIALS, SCALE, X_SCALE, X_ZERO, ZERO, W, window_sizes
from qigen.ir.types import TYPES


def evaluate(
    graph: Graph, feeds: Mapping[str, Array], keep: Sequence[str] | None = None
) -> dict[str, Array]:
    """The values called ``keep`` (default: the outputs) for inputs by name."""
    run = Run(graph, feeds)
    for name, data in graph.constants.items():
        loaded = load_constant(data)
        run.values[name] = loaded.dequantize() if isinstance(loaded, QuantizedTensor) else loaded
    for node in graph.nodes:
        run.step(node)
    return {name: run.values[name] for name in (graph.outputs if keep is None else keep)}


class Run:
    """The values of one run so far, by name: those of the inputs, and what :meth:`step` adds.

    Constants have to be put there; ``values`` may be any mapping.
    """

    def __init__(self, graph: Graph, feeds: Mapping[str, Array],
                 values: MutableMapping[str, Array] | None = None) -> None:
        self.graph = graph
        self.values: MutableMapping[str, Array] = {} if values is None else values
        self.sizes: dict[str, int] = {}
        for name in graph.inputs:
            if name not in feeds:
                raise UsageError(f"input {name} is missing")
            self.put(name, np.asarray(feeds[name]))

    def put(self, name: str, array: Array) -> None:
        """Add a value, and the sizes that it says."""
        self.values[name] = array
        for d, n in zip(self.graph.values[name].shape, array.shape, strict=True):
            if isinstance(d, Sym) and str(d) not in self.sizes and str(d) in d.names():
                self.sizes[str(d)] = n

    def step(self, node: Node) -> None:
        """Run a node."""
        inputs = [self.values[n] if n else np.zeros(0, np.float32) for n in node.inputs]
        function = _FUSED.get(node.op)
        if function is not None:
            results = function(node, inputs)
        else:
            bound = Node(node.op, node.name, node.inputs, node.outputs,
                         _bound(node.attrs, self.sizes))
            operator = schema.operator(node.op, node.name)
            results = operator.reference(bound, inputs, None)  # type: ignore[arg-type]
        for name, array in zip(node.outputs, results, strict=False):
            if name:
                kind = TYPES[self.graph.values[name].dtype].numpy
                self.put(name, np.asarray(array).astype(kind))


def _bound(attrs: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Attributes with the sizes of this run in place of symbols."""
    return {
        k: tuple(dims.subs(v, sizes) for v in a) if isinstance(a, tuple) else a
        for k, a in attrs.items()
    }


def _steps(node: Node) -> list[Step]:
    return [Step(f, args, params) for f, args, params in node.attrs["chain"]]


def _loop(node: Node, inputs: list[Array]) -> list[Array]:
    values = {f"in{i}": x.astype(np.float64) for i, x in enumerate(inputs)}
    with np.errstate(all="ignore"):
        return [chain_reference(_steps(node), values)]


def _epilogue(node: Node, inputs: list[Array], sums: Array, centred: bool = False) -> Array:
    """What follows the sums [.., n]; the zero of x is in them unless ``centred``."""
    a, n = node.attrs, node.attrs["n"]

    def vector(i: int) -> Array:
        return inputs[i][:n].astype(np.float64)

    value = sums.astype(np.float64)
    if a["arithmetic"] == "u8s8":
        if len(inputs) > X_SCALE and inputs[X_SCALE].size:
            rows = (*sums.shape[:-1], 1) if inputs[X_SCALE].size > 1 else (1,)
            zero = inputs[X_ZERO].reshape(rows).astype(np.float64)
            if not centred:
                value = value - zero * vector(ZERO)
            value = value * vector(SCALE)
            value = value * inputs[X_SCALE].reshape(rows)
        else:
            if not centred:
                value = value + vector(ZERO)
            value = value * vector(SCALE)
    elif a["arithmetic"] == "f32s8":
        value = value * vector(SCALE)
    if len(inputs) > BIAS and inputs[BIAS].size:
        value = value + vector(BIAS)
    if a["chain"]:
        known = {"acc": value}
        for i, kind in enumerate(a["kinds"]):
            x = inputs[CHAIN + i]
            known[f"in{i}"] = (x if kind == "full" else x[:n]).astype(np.float64)
        with np.errstate(all="ignore"):
            value = chain_reference(_steps(node), known)
    if a["out"] in ("u8", "s8", "i8"):
        low, high = (0, 255) if a["out"] == "u8" else (-128, 127)
        value = np.clip(np.rint(value / a["y_scale"]) + a["y_zero"], low, high)
    return value


def _weights(node: Node, inputs: list[Array], taps: int, n: int) -> Array:
    a = node.attrs
    w = unpack_weights(inputs[W], n, taps, a["k"], a["arithmetic"])
    return _floats(w, a["arithmetic"])


def _floats(x: Array, arithmetic: str) -> Array:
    if arithmetic == "bf16" and x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def _product(node: Node, inputs: list[Array]) -> list[Array]:
    a = node.attrs
    w = _weights(node, inputs, 1, a["n"])[:, 0]
    x = inputs[0][..., : a["k"]].astype(np.float64)
    return [_epilogue(node, inputs, x @ w.T)]


def _windows(x: Array, node: Node, pads: Sequence[int], empty: float) -> Array:
    """[B, H', W', taps, C] of an NHWC image."""
    a = node.attrs
    top, left, bottom, right = pads
    x = np.pad(
        x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=empty
    )
    (kh, kw), (sh, sw), (dh, dw) = a["kernel"], a["strides"], a["dilations"]
    h = (x.shape[1] - dh * (kh - 1) - 1) // sh + 1
    w = (x.shape[2] - dw * (kw - 1) - 1) // sw + 1
    taps = [
        x[:, i * dh : i * dh + (h - 1) * sh + 1 : sh, j * dw : j * dw + (w - 1) * sw + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    return np.stack(taps, axis=3)


def _convolution(node: Node, inputs: list[Array]) -> list[Array]:
    a = node.attrs
    windows = _windows(inputs[0], node, (0, 0, 0, 0), 0.0)
    groups = a["group"]
    taps = windows.shape[3]
    n, k = a["n"] // groups, a["k"]
    packed = inputs[W].reshape(groups, -1)
    sums = []
    for g in range(groups):
        w = _floats(unpack_weights(packed[g], n, taps, k, a["arithmetic"]), a["arithmetic"])
        x = windows[..., g * k : g * k + k]
        sums.append(np.einsum("bhwtc,ntc->bhwn", x, w))
    return [_epilogue(node, inputs, np.concatenate(sums, axis=-1))]


def _depthwise(node: Node, inputs: list[Array]) -> list[Array]:
    a = node.attrs
    x = inputs[0].astype(np.float64)
    if a["arithmetic"] == "u8s8":
        x = x - float(inputs[X_ZERO].reshape(-1)[0])
    windows = _windows(x, node, a["pads"], 0.0)
    sums = np.einsum("bhwtc,tc->bhwc", windows, inputs[W][:, : a["n"]].astype(np.float64))
    return [_epilogue(node, inputs, sums, centred=True)]


def _pad(node: Node, inputs: list[Array]) -> list[Array]:
    a = node.attrs
    x = inputs[0]
    top, left, bottom, right = a["pads"]
    widths = ((0, 0), (top, bottom), (left, right), (0, a["channels"] - x.shape[3]))
    if x.dtype == np.uint8:
        return [np.pad(x, widths, constant_values=a["zero"])]
    if a["to"] == "u8":
        x = np.clip(np.rint(x / np.float32(a["scale"])) + a["zero"], 0, 255)
        return [np.pad(x, widths, constant_values=a["zero"])]
    return [np.pad(x, widths)]


def _to_bf16(node: Node, inputs: list[Array]) -> list[Array]:
    x = inputs[0]
    extra = node.attrs["columns"] - x.shape[-1]
    return [np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)])]


def _quantizer(x: Array) -> tuple[np.float32, int]:
    """Scale and zero of ONNX DynamicQuantizeLinear."""
    low, high = min(np.float32(0), x.min()), max(np.float32(0), x.max())
    scale = np.float32((high - low) / np.float32(255)) if high > low else np.float32(1)
    return scale, int(np.clip(np.rint(-low / scale), 0, 255))


def _quantize_image(node: Node, inputs: list[Array]) -> list[Array]:
    x = inputs[0]
    scale, zero = _quantizer(x)
    top, left, bottom, right = node.attrs["pads"]
    widths = ((0, 0), (top, bottom), (left, right), (0, node.attrs["channels"] - x.shape[3]))
    q = np.clip(np.rint(x / scale) + zero, 0, 255)
    image = np.pad(q, widths, constant_values=zero)
    return [image, np.array([scale]), np.array([zero]), np.zeros(PARTIALS)]


def _quantize_tensor(node: Node, inputs: list[Array]) -> list[Array]:
    x = inputs[0]
    scale, zero = _quantizer(x)
    q = np.clip(np.rint(x / scale) + zero, 0, 255)
    return [q, np.array([scale]), np.array([zero]), np.zeros(PARTIALS)]


def _quantize_rows(node: Node, inputs: list[Array]) -> list[Array]:
    x = inputs[0].reshape(-1, inputs[0].shape[-1]).astype(np.float32)
    most = np.abs(x).max(axis=1, keepdims=True)
    scale = np.where(most > 0, most / np.float32(127), 1).astype(np.float32)
    q = np.clip(np.rint(x / scale) + 128, 0, 255)
    q = np.pad(q, ((0, 0), (0, node.attrs["columns"] - x.shape[1])), constant_values=128)
    shape = (*inputs[0].shape[:-1], node.attrs["columns"])
    return [q.reshape(shape), scale[:, 0], np.full(len(x), 128)]


def _layer_norm(node: Node, inputs: list[Array]) -> list[Array]:
    padded = inputs + [np.zeros(0)] * (4 - len(inputs))
    x = padded[0].astype(np.float64)
    if padded[3].size:
        x = x + padded[3]
    centred = x - x.mean(axis=-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + node.attrs["eps"])
    if padded[1].size:
        y = y * padded[1]
    if padded[2].size:
        y = y + padded[2]
    return [y, x]


def _softmax(node: Node, inputs: list[Array]) -> list[Array]:
    x = inputs[0].astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    total = np.exp(x).sum(axis=-1, keepdims=True)
    return [x - np.log(total) if node.attrs["log"] else np.exp(x) / total]


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": np.mean, "sum": np.sum, "max": np.max, "min": np.min,
}  # fmt: skip


def _reduce(node: Node, inputs: list[Array]) -> list[Array]:
    a = node.attrs
    axes = tuple(range(a["first"], a["last"]))
    x = inputs[0].astype(np.float64)
    return [_REDUCTIONS[a["kind"]](x, axis=axes, keepdims=bool(a["keep"]))]


def _swap(node: Node, inputs: list[Array]) -> list[Array]:
    return [inputs[0].transpose(node.attrs["perm"])]


def _format_product(node: Node, inputs: list[Array]) -> list[Array]:
    x, w, *bias = inputs
    y = x.astype(np.float64) @ w.astype(np.float64)[:, : x.shape[-1]].T
    return [y + bias[0][: node.attrs["n"]] if bias and bias[0].size else y]


def _join(node: Node, inputs: list[Array]) -> list[Array]:
    factors, (top, left, bottom, right) = node.attrs["factors"], node.attrs["pads"]
    parts = [
        x.repeat(fh, axis=1).repeat(fw, axis=2)
        for x, fh, fw in zip(inputs, factors[::2], factors[1::2], strict=True)
    ]
    return [np.pad(np.concatenate(parts, axis=3), ((0, 0), (top, bottom), (left, right), (0, 0)))]


def _pool(node: Node, inputs: list[Array]) -> list[Array]:
    a = node.attrs
    x = inputs[0]
    top, left, bottom, right = a["pads"]
    extra = [0, 0]
    if a["ceil"]:
        sizes = window_sizes(
            x.shape[1:3], a["kernel"], a["strides"], a["dilations"], a["pads"], True
        )
        for i, size in enumerate(sizes):
            reach = (size - 1) * a["strides"][i] + a["dilations"][i] * (a["kernel"][i] - 1) + 1
            extra[i] = max(0, reach - x.shape[1 + i] - a["pads"][i] - a["pads"][i + 2])
    pads = (top, left, bottom + extra[0], right + extra[1])
    if a["kind"] == "max":
        return [_windows(x, node, pads, -np.inf).max(axis=3)]
    sums = _windows(x, node, pads, 0.0).sum(axis=3)
    ones = np.ones((1, *x.shape[1:3], 1))
    if a["include_pad"]:
        ones = np.pad(ones, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=1)
        pads = (0, 0, extra[0], extra[1])
    return [sums / _windows(ones, node, pads, 0.0).sum(axis=3)]


def _attention(node: Node, inputs: list[Array]) -> list[Array]:
    a = node.attrs
    width = a["heads"] * a["head_dim"]
    q, k, v = (
        x[..., o : o + width].reshape(*x.shape[:-1], a["heads"], a["head_dim"]).astype(np.float64)
        for x, o in zip(inputs, a["offsets"], strict=False)
    )
    scores = np.einsum("bshd,bthd->bhst", q, k) * a["scale"]
    if len(inputs) > 3:
        scores = scores + inputs[3]
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = scores / scores.sum(axis=-1, keepdims=True)
    return [np.einsum("bhst,bthd->bshd", weights, v).reshape(*inputs[0].shape[:-1], width)]


_FUSED: dict[str, Callable[[Node, list[Array]], list[Array]]] = {
    "Loop": _loop,
    "Product": _product,
    "FormatProduct": _format_product,
    "Convolution": _convolution,
    "Depthwise": _depthwise,
    "PadImage": _pad,
    "ToBf16": _to_bf16,
    "QuantizeImage": _quantize_image,
    "QuantizeRows": _quantize_rows,
    "QuantizeTensor": _quantize_tensor,
    "LayerNorm": _layer_norm,
    "SoftmaxRows": _softmax,
    "ReduceAxes": _reduce,
    "SwapAxes": _swap,
    "JoinImages": _join,
    "Pool": _pool,
    "EncoderAttention": _attention,
}
