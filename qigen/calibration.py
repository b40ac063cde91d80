"""Static int8: ranges of activations from samples, written into the graph as QDQ.

The float model is compiled with the inputs of its products as outputs and run over the samples.
Each such value then goes through QuantizeLinear and DequantizeLinear, and so do the weights, so
that the rest is the business of the passes for quantized models. A product stays float if rounding
its inputs or weights loses too much, measured on the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from qigen.build import Progress
from qigen.errors import BadInput
from qigen.ir.graph import Array, Graph, Node
from qigen.ir.types import TYPES
from qigen.passes.tensor.products import quantize_channels
from qigen.passes.tensor.rewrite import Rewriter
from qigen.passes.tensor.simplify import simplify

Observe: TypeAlias = Callable[[Graph, Sequence[Mapping[str, Array]]], Iterator[dict[str, Array]]]

MOST_ERROR = 0.1
"""A product whose quantized input or weights differ more from the floats (relative to their norm)
stays float."""

PRODUCTS = ("onnx.Conv", "onnx.MatMul", "onnx.Gemm")


@dataclass(frozen=True)
class Quantization:
    """What became of one product: the measured errors of its input and weights."""

    node: str
    precision: str
    input_error: float
    weight_error: float
    low: float
    high: float


def read_samples(path: Path, graph: Graph) -> list[dict[str, Array]]:
    """Samples of a model's inputs: an .npz with an array by input, or a folder of such files.

    BadInput for missing files, missing inputs and types that do not fit.
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise BadInput("the folder has no .npz files with samples", str(path))
    return [_sample(file, graph) for file in files]


def _sample(file: Path, graph: Graph) -> dict[str, Array]:
    where = str(file)
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # whatever a damaged archive makes numpy raise
        raise BadInput(
            f"this is no .npz of samples ({' '.join(str(error).split())})", where
        ) from None
    sample = {}
    for name in graph.inputs:
        if name not in arrays:
            raise BadInput(f"it has no array for the input {name}", where)
        value = graph.values[name]
        array = arrays[name]
        if array.ndim != len(value.shape) or array.dtype != TYPES[value.dtype].numpy:
            raise BadInput(
                f"{name} is {array.dtype}{list(array.shape)}; the model takes {value}", where
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadInput(f"{name} has NaN or infinite values", where)
        sample[name] = np.ascontiguousarray(array)
    return sample


def with_static_codes(
    graph: Graph, samples: Sequence[Mapping[str, Array]], observe: Observe, report: Progress
) -> Graph:
    """The graph with the inputs and weights of its products as codes, where that loses little."""
    graph = simplify(graph)
    nodes = [n for n in graph.nodes if n.op in PRODUCTS and _weights(graph, n) is not None]
    names = list(dict.fromkeys(n.inputs[0] for n in nodes))
    ranges, errors = _measure(graph, names, samples, observe, report)
    r = Rewriter(graph)
    rows: list[Quantization] = []
    replaced: dict[str, str] = {}
    for node in r.nodes():
        if node.op not in PRODUCTS or _weights(r.graph, node) is None:
            continue
        x = node.inputs[0]
        if x not in ranges:
            continue
        w = _weights(r.graph, node)
        assert w is not None
        axis = 0 if node.op == "onnx.Conv" or node.attrs.get("transB") else 1
        codes, scale = quantize_channels(np.moveaxis(w, axis, 0))
        shape = (-1,) + (1,) * (w.ndim - 1)
        moved = np.moveaxis(w, axis, 0)
        weight_error = _relative(codes * scale.reshape(shape) - moved, moved)
        low, high = ranges[x]
        keep = max(errors[x], weight_error) > MOST_ERROR
        rows.append(
            Quantization(node.name, "f32" if keep else "int8", errors[x], weight_error, low, high)
        )
        if keep:
            continue
        if x not in replaced:
            replaced[x] = _quantized(r, x, low, high)
        weights = _quantized_weights(r, node, np.moveaxis(codes, 0, axis), scale, axis)
        r.replace(node, node.op, [replaced[x], weights, *node.inputs[2:]], dict(node.attrs))
    result = r.done()
    result.meta["quantization"] = [asdict(row) for row in rows]
    return result


def _weights(graph: Graph, node: Node) -> Array | None:
    """The float weights of a product that has an integer kernel."""
    data = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.float32
        or data.ndim < 2
        or not data.size
    ):
        return None
    if node.op == "onnx.Conv":
        group = node.attrs["group"]
        depthwise = group == data.shape[0] and data.shape[1] == 1
        return data if data.ndim == 4 and (group == 1 or depthwise) else None
    columns = data.shape[1] if node.attrs.get("transB") else data.shape[0]
    return data if data.ndim == 2 and columns % 4 == 0 else None


def _measure(
    graph: Graph,
    names: Sequence[str],
    samples: Sequence[Mapping[str, Array]],
    observe: Observe,
    report: Progress,
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """The range of every value, and the error of rounding it to codes of that range."""
    watched = graph.copy()
    computed = [name for name in names if name not in graph.inputs]
    watched.outputs = list(dict.fromkeys([*graph.outputs, *computed]))
    watched = watched.rebuilt(watched.nodes)
    ranges = dict.fromkeys(names, (0.0, 0.0))
    for done, (sample, values) in enumerate(
        zip(samples, observe(watched, samples), strict=True)
    ):
        for name in names:
            x = values[name] if name in values else sample[name]
            if x.size:
                low, high = ranges[name]
                ranges[name] = min(low, float(x.min())), max(high, float(x.max()))
        report("calibrate", done + 1, 2 * len(samples))
    noise = dict.fromkeys(names, 0.0)
    power = dict.fromkeys(names, 0.0)
    for done, (sample, values) in enumerate(
        zip(samples, observe(watched, samples), strict=True)
    ):
        for name in names:
            x = np.asarray(values[name] if name in values else sample[name], np.float64)
            scale, zero = quantizer(*ranges[name])
            codes = np.clip(np.rint(x / scale) + zero, 0, 255)
            noise[name] += float((((codes - zero) * scale - x) ** 2).sum())
            power[name] += float((x**2).sum())
        report("calibrate", len(samples) + done + 1, 2 * len(samples))
    errors = {n: float(np.sqrt(noise[n] / power[n])) if power[n] else 0.0 for n in names}
    return ranges, errors


def quantizer(low: float, high: float) -> tuple[np.float32, int]:
    """Scale and zero of uint8 codes for a range that holds 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) if high > low else np.float32(1)
    return scale, int(np.clip(np.rint(-low / float(scale)), 0, 255))


def _relative(error: Array, of: Array) -> float:
    norm = float(np.linalg.norm(of))
    return float(np.linalg.norm(error)) / norm if norm else 0.0


def _quantized(r: Rewriter, x: str, low: float, high: float) -> str:
    """x after QuantizeLinear and DequantizeLinear; all who read x read that."""
    scale, zero = quantizer(low, high)
    s = r.constant(f"{x}/q_scale", scale)
    z = r.constant(f"{x}/q_zero", np.uint8(zero))
    codes, back = r.name(f"{x}/codes"), r.name(f"{x}/rounded")
    producer = r.producer(x)
    first = r.make("onnx.QuantizeLinear", [x, s, z], [codes], after=producer,
                   before=None if producer is not None else r.graph.nodes[0])
    second = r.make("onnx.DequantizeLinear", [codes, s, z], [back], after=first)
    for reader in list(r.consumers(x)):
        if reader is not first and reader is not second:
            reader.inputs = [back if n == x else n for n in reader.inputs]
    r._index()
    return back


def _quantized_weights(r: Rewriter, node: Node, codes: Array, scale: Array, axis: int) -> str:
    w = r.constant(f"{node.inputs[1]}/int8", codes)
    s = r.constant(f"{node.inputs[1]}/int8_scale", scale)
    name = r.name(f"{node.inputs[1]}/rounded")
    r.make("onnx.DequantizeLinear", [w, s], [name], {"axis": axis}, before=node)
    return name
