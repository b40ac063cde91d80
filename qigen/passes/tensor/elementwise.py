"""Fusion of elementwise functions: into one loop, and into the product that makes their input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from qigen.ir.graph import Graph, Node
from qigen.ir.ops.graph import CHAIN, Chain, chain_inputs
from qigen.ir.tensor import given
from qigen.passes.tensor.rewrite import Rewriter

MAX_INPUTS = 8
MAX_STEPS = 48
MAX_PRODUCT_INPUTS = 4

COMMON = frozenset(
    float(np.float32(x))
    for y in (0.0, 0.5, 1.0, 2.0, 3.0, 6.0, 1 / 6, 2**0.5, 0.5**0.5, 255.0, 0.044715,
              (2 / np.pi) ** 0.5, 1.702)
    for x in (y, -y)
)  # fmt: skip
"""Numbers of formulas. They are part of a kernel; others are read, so that layers share kernels."""

PRODUCTS = ("Product", "Convolution", "Depthwise")

Parameters: TypeAlias = Callable[[Rewriter, Node], "tuple[float, ...] | None"]


def _none(r: Rewriter, node: Node) -> tuple[float, ...]:
    return ()


def _attrs(*names: str) -> Parameters:
    return lambda r, node: tuple(float(node.attrs[n]) for n in names)


def _clip(r: Rewriter, node: Node) -> tuple[float, ...] | None:
    """Bounds that are constants; None if they are not."""
    bounds = []
    for index, open_ in ((1, -np.inf), (2, np.inf)):
        name = given(node, index)
        bound = r.scalar(name) if name else open_
        if bound is None:
            return None
        bounds.append(float(bound))
    return tuple(bounds)


# ONNX operator -> (function of backends/cpu/elementwise.py, its operands, its parameters)
UNARY: dict[str, tuple[str, Parameters]] = {
    "onnx.Neg": ("neg", _none),
    "onnx.Abs": ("abs", _none),
    "onnx.Relu": ("relu", _none),
    "onnx.Sqrt": ("sqrt", _none),
    "onnx.Reciprocal": ("reciprocal", _none),
    "onnx.Exp": ("exp", _none),
    "onnx.Log": ("log", _none),
    "onnx.Erf": ("erf", _none),
    "onnx.Tanh": ("tanh", _none),
    "onnx.Sigmoid": ("sigmoid", _none),
    "onnx.Softplus": ("softplus", _none),
    "onnx.Softsign": ("softsign", _none),
    "onnx.Mish": ("mish", _none),
    "onnx.HardSwish": ("hard_swish", _none),
    "onnx.Floor": ("floor", _none),
    "onnx.Ceil": ("ceil", _none),
    "onnx.Round": ("round", _none),
    "onnx.Sign": ("sign", _none),
    "onnx.LeakyRelu": ("leaky_relu", _attrs("alpha")),
    "onnx.HardSigmoid": ("hard_sigmoid", _attrs("alpha", "beta")),
    "onnx.Elu": ("elu", _attrs("alpha")),
    "onnx.Celu": ("celu", _attrs("alpha")),
    "onnx.Selu": ("selu", _attrs("alpha", "gamma")),
    "onnx.ThresholdedRelu": ("thresholded_relu", _attrs("alpha")),
    "onnx.Clip": ("clip", _clip),
    "onnx.Swish": ("swish", _attrs("alpha")),
    "onnx.Gelu": ("gelu_erf", _none),
}
GELU = {"none": "gelu_erf", "tanh": "gelu_tanh"}
"""Functions by the attribute ``approximate``."""
BINARY: dict[str, str] = {
    "onnx.Add": "add",
    "onnx.Sub": "sub",
    "onnx.Mul": "mul",
    "onnx.Div": "div",
    "onnx.Max": "max",
    "onnx.Min": "min",
    "onnx.PRelu": "prelu",
}


def to_loops(graph: Graph, functions: set[str]) -> Graph:
    """Every elementwise f32 node whose function is one of ``functions`` becomes a Loop."""
    r = Rewriter(graph)
    for node in r.nodes():
        chain = _chain_of(r, node, functions)
        if chain is not None:
            steps, inputs = chain
            if len(inputs) <= MAX_INPUTS:
                r.replace(node, "Loop", inputs, {"chain": steps})
    return r.done()


def _chain_of(r: Rewriter, node: Node, functions: set[str]) -> tuple[Chain, list[str]] | None:
    """The chain of one node and the values that it reads; None if it has no vector function."""
    if len(node.outputs) != 1 or any(
        r.dtype(n) != "f32" for n in (*node.inputs, *node.outputs) if n
    ):
        return None
    if node.op in UNARY:
        function, parameters = UNARY[node.op]
        if node.op == "onnx.Gelu":
            function = GELU[node.attrs["approximate"]]
        params = parameters(r, node)
        if function not in functions or params is None:
            return None
        return ((function, ("in0",), params),), [node.inputs[0]]
    if node.op == "onnx.Pow":
        return _power(r, node, functions)
    if node.op not in BINARY or BINARY[node.op] not in functions:
        return None
    steps: list[tuple[str, tuple[str, ...], tuple[float, ...]]] = []
    inputs: list[str] = []
    operands = []
    shape = r.shape(node.outputs[0])
    for name in node.inputs:
        number = r.scalar(name)
        if number is not None and len(r.shape(name)) <= len(shape) and number in COMMON:
            steps.append(("const", (), (number,)))
            operands.append(f"t{len(steps) - 1}")
        else:
            if name not in inputs:
                inputs.append(name)
            operands.append(f"in{inputs.index(name)}")
    # a constant of one element could be what gives the result its rank
    if not inputs or len(shape) != max(len(r.shape(n)) for n in inputs):
        return None
    function = BINARY[node.op]
    if function == "div" and steps and operands[1] == "t0" and steps[0][2] != (0.0,):
        # a division takes as long as a whole polynomial; the product differs by an ulp at most
        steps[0] = ("const", (), (1.0 / steps[0][2][0],))
        function = "mul"
    result = operands[0]
    for operand in operands[1:]:
        steps.append((function, (result, operand), ()))
        result = f"t{len(steps) - 1}"
    if len(operands) == 1:
        return None
    return tuple(steps), inputs


def _power(r: Rewriter, node: Node, functions: set[str]) -> tuple[Chain, list[str]] | None:
    exponent = r.scalar(node.inputs[1])
    if exponent is None or r.shape(node.outputs[0]) != r.shape(node.inputs[0]):
        return None
    x = [node.inputs[0]]
    if exponent == 2.0:
        return (("mul", ("in0", "in0"), ()),), x
    if exponent == 3.0:
        return (("mul", ("in0", "in0"), ()), ("mul", ("t0", "in0"), ())), x
    if exponent == 0.5 and "sqrt" in functions:
        return (("sqrt", ("in0",), ()),), x
    if "pow" not in functions:
        return None
    return (("const", (), (exponent,)), ("pow", ("in0", "t0"), ())), x


def codes_to_loops(graph: Graph) -> Graph:
    """QuantizeLinear and DequantizeLinear with one constant scale and zero become loops."""
    r = Rewriter(graph)
    for node in r.nodes():
        if node.op not in ("onnx.QuantizeLinear", "onnx.DequantizeLinear"):
            continue
        source, result = r.dtype(node.inputs[0]), r.dtype(node.outputs[0])
        codes = ("u8", "i8")
        scale = r.scalar(node.inputs[1])
        zero = r.scalar(given(node, 2)) if given(node, 2) else 0.0
        if scale is None or zero is None or node.attrs.get("block_size"):
            continue
        if node.op == "onnx.QuantizeLinear" and source == "f32" and result in codes:
            chain: Chain = (("quantize", ("in0",), (scale, zero)),)
            r.replace(node, "Loop", [node.inputs[0]], {"chain": chain, "out": result})
        elif node.op == "onnx.DequantizeLinear" and source in codes and result == "f32":
            chain = (
                ("const", (), (zero,)),
                ("sub", ("in0", "t0"), ()),
                ("const", (), (scale,)),
                ("mul", ("t1", "t2"), ()),
            )
            r.replace(node, "Loop", [node.inputs[0]], {"chain": chain})
    return r.done()


def fuse(graph: Graph) -> Graph:
    """Loops whose results only one loop reads join it; a loop joins the product that feeds it."""
    r = Rewriter(graph)
    changed = True
    while changed:
        changed = False
        for node in r.nodes():
            if node.op == "Loop" and r.alive(node):
                changed = _join_loops(r, node) or changed
    for node in r.nodes():
        if node.op == "Loop" and r.alive(node):
            _join_product(r, node)
    return r.done()


def _join_loops(r: Rewriter, node: Node) -> bool:
    """Take loops into ``node`` that make nothing but its inputs, of its shape."""
    for name in node.inputs:
        producer = r.producer(name, "Loop")
        if producer is None or r.only_consumer(name) is not node:
            continue
        if r.shape(name) != r.shape(node.outputs[0]):
            continue
        first: Chain = producer.attrs["chain"]
        if producer.attrs["out"] != "f32":  # the next loop reads what the codes would hold
            limits = {"u8": (0.0, 255.0), "i8": (-128.0, 127.0)}[producer.attrs["out"]]
            first = (*first, ("clip", (f"t{len(first) - 1}",), limits))
        steps, inputs = _joined(first, producer.inputs, "", node.attrs["chain"], node.inputs, name)
        if len(inputs) > MAX_INPUTS or len(steps) > MAX_STEPS:
            continue
        r.replace(node, "Loop", inputs, {"chain": steps, "out": node.attrs["out"]})
        r.remove(producer)
        return True
    return False


def _joined(
    first: Chain,
    first_inputs: list[str],
    acc: str,
    second: Chain,
    second_inputs: list[str],
    link: str,
) -> tuple[Chain, list[str]]:
    """The second chain behind the first, whose result it reads as ``link``.

    ``acc`` is the name that a result without steps has in the first chain.
    """
    inputs = list(first_inputs)
    steps = list(first)
    result = f"t{len(steps) - 1}" if steps else acc
    names: dict[str, str] = {}
    for i, name in enumerate(second_inputs):
        if name == link:
            names[f"in{i}"] = result
            continue
        if name not in inputs:
            inputs.append(name)
        names[f"in{i}"] = f"in{inputs.index(name)}"
    for i in range(len(second)):
        names[f"t{i}"] = f"t{len(first) + i}"
    for function, args, params in second:
        steps.append((function, tuple(names[a] for a in args), params))
    return tuple(steps), inputs


def _join_product(r: Rewriter, node: Node) -> bool:
    """Let a product compute the loop that reads its result, before it stores it."""
    shape = r.shape(node.outputs[0])
    # the latest product: what else the loop reads is there by then
    candidates = [
        p
        for p in (r.producer(n, *PRODUCTS) for n in node.inputs)
        if p is not None
        and p.attrs["out"] == "f32"
        and r.only_consumer(p.outputs[0]) is node
        and r.shape(p.outputs[0]) == shape
    ]
    for product in reversed(candidates):
        link = product.outputs[0]
        steps, inputs = _joined(
            product.attrs["chain"],
            chain_inputs(product),
            "acc",
            node.attrs["chain"],
            node.inputs,
            link,
        )
        kinds = [_kind(r, name, shape) if r.dtype(name) == "f32" else None for name in inputs]
        if None in kinds or len(inputs) > MAX_PRODUCT_INPUTS or len(steps) > MAX_STEPS:
            continue
        fixed = [given(product, i) for i in range(CHAIN)]
        padded = [
            pad_channels(r, name, shape[-1]) if kind == "channel" else name
            for name, kind in zip(inputs, kinds, strict=True)
        ]
        if "" in padded:
            continue
        attrs: dict[str, Any] = {**product.attrs, "chain": steps, "kinds": tuple(kinds)}
        if node.attrs["out"] != "f32":
            (function, (last,), (scale, zero)) = steps[-1]
            if (
                function != "quantize"
                or product.attrs.get("group", 1) > 1
                or last not in ("acc", f"t{len(steps) - 2}")
            ):
                continue
            attrs.update(chain=steps[:-1], out=node.attrs["out"], y_scale=scale, y_zero=int(zero))
        r.replace(node, product.op, [*fixed, *padded], attrs)
        r.remove(product)
        return True
    return False


def _kind(r: Rewriter, name: str, shape: tuple[Any, ...]) -> str | None:
    """How a product's chain can read a value: each element, one for each channel, or not at all."""
    own = r.shape(name)
    if own == shape:
        return "full"
    if r.array(name) is None:
        return None
    if all(d == 1 for d in own) or (own[-1] == shape[-1] and all(d == 1 for d in own[:-1])):
        return "channel"
    return None


def pad_channels(r: Rewriter, name: str, channels: Any) -> str:
    """A constant, one number or one by channel, by channel and padded to whole vectors."""
    data = r.array(name)
    if data is None or not isinstance(channels, int):
        return ""
    flat = np.broadcast_to(data.reshape(-1).astype(np.float32), (channels,))
    if flat.size % 16 == 0 and data.ndim == 1:
        return name
    out = np.zeros(-(-flat.size // 16) * 16, np.float32)
    out[: flat.size] = flat
    return r.constant(f"{name}/padded", out)
