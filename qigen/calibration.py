"""Calibration data, and static int8: ranges of activations from samples, as QDQ in the graph.

The float model is compiled with the inputs of its products as outputs and run over the samples.
Each such value then goes through QuantizeLinear and DequantizeLinear, and so do the weights, so
that the rest is the business of the passes for quantized models. A product stays float if rounding
its inputs or weights loses too much, measured on the samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qigen import toolchain
from qigen.build import Progress
from qigen.codegen.reference import evaluate
from qigen.errors import BadInput, Unsupported, UsageError
from qigen.formats.algebra import QuantizedTensor
from qigen.formats.catalog import by_name
from qigen.frontends.model import LanguageModel
from qigen.ir.graph import Array, Graph, Node
from qigen.ir.types import TYPES
from qigen.passes.tensor.products import quantize_channels
from qigen.passes.tensor.rewrite import Rewriter
from qigen.passes.tensor.simplify import simplify
from qigen.quantize import methods
from qigen.quantize.hessian import Statistics
from qigen.quantize.methods import parse
from qigen.quantize.model import (
    CONTEXT,
    MEMORY,
    SAMPLES,
    VERSION,
    Recipe,
    Store,
    quantize_model,
    sequences_of,
)
from qigen.quantize.weights import chosen, requantized
from qigen.text import Tokenizer

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


@dataclass(frozen=True)
class Rounding:
    """How the weights of a model are to be quantized, as the user says it.

    ``format`` is a name of the catalog, ``method`` as :func:`qigen.quantize.methods.parse` takes
    it (None: gptq if there are calibration data, else rtn). ``keep`` are patterns of names of
    matrices that stay as they are. ``samples`` sequences of ``context`` tokens of the
    ``calibration`` data are looked at, in ``memory`` bytes.
    """

    format: str
    method: str | None = None
    keep: tuple[str, ...] = ()
    calibration: Path | None = None
    samples: int = SAMPLES
    context: int = CONTEXT
    memory: int = MEMORY

    def recipe(self, calibrated: bool) -> Recipe:
        """What :mod:`qigen.quantize` goes by; raises as :meth:`Recipe.check` does."""
        *before, (method, options) = parse(self.method or ("gptq" if calibrated else "rtn"))
        found = Recipe(method, options, self.samples, self.context, self.memory,
                       before=tuple(before))
        found.check()
        return found


def quantize_language_model(
    source: LanguageModel,
    graph: Graph,
    tokenizer: Tokenizer | None,
    rounding: Rounding,
    report: Progress,
) -> tuple[Graph, list[dict[str, Any]]]:
    """The flat ``graph`` of a language model with its matrices in another format, and what became
    of each. Layers that an earlier run of the same has finished are taken from the cache.

    Raises what :func:`read_ids` and :func:`qigen.quantize.model.quantize_model` raise.
    """
    fmt = by_name(rounding.format)
    recipe = rounding.recipe(rounding.calibration is not None)
    names = chosen(graph, fmt, rounding.keep, bool(recipe.preparations))
    # where nothing is looked at, matrices are rounded as they are written
    if recipe.method == "rtn" and not recipe.preparations:
        return requantized(graph, fmt, rounding.keep), []
    sequences = calibration_sequences(graph, tokenizer, rounding, recipe)
    told = None if sequences is None else hashlib.sha256(sequences.tobytes()).hexdigest()
    store = Store.of(
        toolchain.cache_folder() / "quantized", VERSION, source.metadata.sha256(), fmt.name, names,
        recipe.before, recipe.method, sorted(recipe.options.items()), told, recipe.sequential,
    )
    return quantize_model(graph, dict.fromkeys(names, fmt), sequences, recipe, store=store,
                          progress=report)


def calibration_sequences(
    graph: Graph, tokenizer: Tokenizer | None, rounding: Rounding, recipe: Recipe
) -> npt.NDArray[np.int32] | None:
    """int32 [S, T]: what a language model is calibrated on; None without calibration data."""
    if rounding.calibration is None:
        return None
    ids = read_ids(rounding.calibration, tokenizer)
    context = min(recipe.context, graph.meta["max_seq"])
    return sequences_of(ids, recipe.samples, context, str(rounding.calibration))


def quantize_by_matrix(
    source: LanguageModel,
    graph: Graph,
    formats: Mapping[str, str],
    by_matrix: Mapping[str, str],
    sequences: npt.NDArray[np.int32] | None,
    recipe: Recipe,
    report: Progress,
) -> tuple[Graph, list[dict[str, Any]]]:
    """The flat ``graph`` with the matrices that ``formats`` names in those formats, each by its own
    method; raises and resumes as :func:`quantize_language_model` does."""
    rows = {name: by_name(fmt) for name, fmt in formats.items()}
    if set(by_matrix.values()) <= {"rtn"}:
        sequences = None  # nothing looks at them
    told = None if sequences is None else hashlib.sha256(sequences.tobytes()).hexdigest()
    store = Store.of(
        toolchain.cache_folder() / "quantized", VERSION, source.metadata.sha256(),
        sorted(formats.items()), sorted(by_matrix.items()), told, recipe.sequential,
    )
    return quantize_model(graph, rows, sequences, recipe, store=store, progress=report,
                          by_matrix=by_matrix)


def read_ids(path: Path, tokenizer: Tokenizer | None) -> npt.NDArray[np.int32]:
    """Token ids of a calibration text: a UTF-8 file, or an .npy of integers.

    BadInput for files that are neither, Unsupported for a text and a model without a tokenizer.
    """
    where = str(path)
    if path.suffix == ".npy":
        try:
            ids = np.load(path, allow_pickle=False)
        except Exception as error:  # whatever a damaged file makes numpy raise
            raise BadInput(f"this is no .npy of token ids ({' '.join(str(error).split())})",
                           where) from None
        if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
            raise BadInput("this is no .npy of token ids; they must be integers", where)
        return ids.reshape(-1).astype(np.int32)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"the file cannot be read ({error.strerror})", where) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"the file is not UTF-8 (byte {error.start})", where) from None
    if tokenizer is None:
        raise Unsupported("the model has no tokenizer for a calibration text; give an .npy of "
                          "token ids", where)
    return np.asarray(tokenizer.encode(text, add_special=False), np.int32)


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


class GraphRounder:
    """Brings the matrices of an ONNX graph to a format, with the statistics of their inputs if
    there are calibration samples. A call is what :func:`qigen.passes.tensor.optimize_graph` asks
    for; ``outcomes`` says what became of every matrix.
    """

    def __init__(self, graph: Graph, rounding: Rounding, told: str, report: Progress) -> None:
        self.format = by_name(rounding.format)
        self.recipe = rounding.recipe(rounding.calibration is not None)
        if self.recipe.preparations:
            raise Unsupported(f"method {self.recipe.preparations[0][0]} folds scales or rotations "
                              "into neighbours, which is done for language models alone; take "
                              "method gptq or clip")
        self.keep = rounding.keep
        self.outcomes: list[dict[str, Any]] = []
        self._statistics: dict[str, Statistics] = {}
        self._names = product_matrices(graph := simplify(graph))
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in self._names):
                shown = ", ".join(list(self._names)[:3])
                raise UsageError(f"no matrix is called {pattern}; there are {shown} ...")
        self._report = report
        samples: list[dict[str, Array]] = []
        if rounding.calibration is not None:
            samples = read_samples(rounding.calibration, graph)[: self.recipe.samples]
        elif methods.by_name(self.recipe.method).needs_hessian:
            raise UsageError(f"method {self.recipe.method} needs calibration data; give "
                             "--calibration, or take method clip or rtn")
        digest = hashlib.sha256()
        for sample in samples:
            for name in sorted(sample):
                digest.update(f"{name} {sample[name].dtype} {sample[name].shape}".encode())
                digest.update(sample[name].tobytes())
        self._store = Store(None)
        if self.recipe.method != "rtn":
            self._store = Store.of(
                toolchain.cache_folder() / "quantized", VERSION, told, self.format.name,
                self.recipe.method, sorted(self.recipe.options.items()), digest.hexdigest())
        missing = [n for n in self._names if self.wanted(n) and not self._store.get(_key(n))]
        if samples and missing:
            self._statistics = graph_statistics(graph, missing, samples, self.recipe.memory, report)

    def wanted(self, name: str) -> bool:
        """Whether a matrix comes to the format at all."""
        return not any(fnmatchcase(name, pattern) for pattern in self.keep)

    def __call__(self, w: Array, name: str) -> QuantizedTensor | None:
        """The matrix [N, K], which the constant ``name`` holds, in the format; None: it is kept."""
        if not self.wanted(name):
            return None
        found = self._store.get(_key(name))
        if found is not None:
            tensor = found[0]["w"]
            if isinstance(tensor, QuantizedTensor) and tensor.shape == w.shape:
                self.outcomes.append(found[1])
                return tensor
        statistics = self._statistics.get(name)
        method, options = self.recipe.method, dict(self.recipe.options)
        if statistics is None and methods.by_name(method).needs_hessian:
            method, options = "clip", {}  # its input is nothing that the samples reach
        try:
            tensor, outcome = methods.quantize_matrix(
                np.ascontiguousarray(w, np.float32), self.format, method, statistics, **options)
        except BadInput as error:
            raise BadInput(f"{self.format.name}: {error.message}", name) from None
        if self.recipe.method != "rtn":
            about = {"matrix": name, **outcome.to_json()}
            self._store.put(_key(name), {"w": tensor}, about)
            self.outcomes.append(about)
            self._report("quantize", len(self.outcomes), len(self._names))
        return tensor


def _key(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=12).hexdigest()


def product_matrices(graph: Graph) -> dict[str, list[str]]:
    """The constant float matrices of a graph's products, and the inputs that meet each."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op not in ("onnx.MatMul", "onnx.Gemm") or node.attrs.get("transA"):
            continue
        data = graph.constants.get(node.inputs[1])
        if isinstance(data, np.ndarray) and data.ndim == 2 and data.dtype == np.float32:
            found.setdefault(node.inputs[1], []).append(node.inputs[0])
    return found


def graph_statistics(
    graph: Graph,
    names: Sequence[str],
    samples: Sequence[Mapping[str, Array]],
    memory: int,
    report: Progress,
) -> dict[str, Statistics]:
    """The statistics of the inputs of matrices by their constants' names, by numpy over samples of
    the graph's inputs. If they do not fit into half of ``memory``, the samples are gone through
    several times for some of them at once; what a matrix needs has to fit."""
    readers = product_matrices(graph)
    inputs: dict[str, int] = {}
    for x in (x for name in names for x in readers[name]):
        width = graph.values[x].shape[-1]
        if isinstance(width, int):
            inputs[x] = width
    found: dict[str, Statistics] = {}
    waiting = list(inputs)
    first = True
    while waiting:
        room = memory // 2
        batch: list[str] = []
        while waiting and (not batch or 4 * inputs[waiting[0]] ** 2 <= room):
            batch.append(waiting.pop(0))
            room -= 4 * inputs[batch[-1]] ** 2
        found |= {x: Statistics.empty(inputs[x]) for x in batch}
        for done, sample in enumerate(samples):
            for x, value in evaluate(graph, sample, batch).items():
                found[x].add(value)
            if first:
                report("calibrate", done + 1, len(samples))
        first = False
    result: dict[str, Statistics] = {}
    for name in names:
        parts = [found[x] for x in readers[name] if x in found]
        if len(parts) == 1:
            result[name] = parts[0]
        elif parts:
            total = Statistics.empty(len(parts[0].largest))
            for part in parts:
                total.merge(part)
            result[name] = total
    return result


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
