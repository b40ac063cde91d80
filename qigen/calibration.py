"""Calibration data, and static int8: ranges of activations from samples, as QDQ in the graph.

The float model is compiled with the inputs of its products as outputs and run over the samples.
Each such value then goes through QuantizeLinear and DequantizeLinear, and so do the weights, so
that the rest is the business of the passes for quantized models. A product stays float if rounding
its inputs or weights loses too much, measured on the samples.
"""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qigen import toolchain
from qigen.build import Progress
from qigen.codegen.reference import Run
from qigen.errors import BadInput, Unsupported, UsageError
from qigen.formats.catalog import by_name
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends.model import LanguageModel
from qigen.ir.graph import Array, Graph, Node, load_constant
from qigen.ir.types import TYPES
from qigen.passes.tensor import before_products
from qigen.passes.tensor.products import quantize_channels
from qigen.passes.tensor.rewrite import Rewriter
from qigen.passes.tensor.simplify import simplify
from qigen.quantize import methods
from qigen.quantize.hessian import Statistics, check_memory
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
    ``calibration`` data are looked at, in ``memory`` bytes. ``by_matrix`` names format and method
    of single matrices in place of ``format`` and ``method``, those of the others stay.
    """

    format: str
    method: str | None = None
    keep: tuple[str, ...] = ()
    calibration: Path | None = None
    samples: int = SAMPLES
    context: int = CONTEXT
    memory: int = MEMORY
    by_matrix: Mapping[str, tuple[str, str]] | None = None

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


def read_samples(path: Path, graph: Graph, outputs: bool = False) -> list[dict[str, Array]]:
    """Samples of a model's inputs: an .npz with an array by input, or a folder of such files; with
    ``outputs`` also the arrays of those that are expected, where there are any.

    BadInput for missing files, missing inputs and types that do not fit.
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise BadInput("the folder has no .npz files with samples", str(path))
    return [_sample(file, graph, outputs) for file in files]


def _sample(file: Path, graph: Graph, outputs: bool) -> dict[str, Array]:
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
    if outputs:
        shown: Mapping[str, str] = graph.meta.get("output_names", {})
        names = {shown.get(name, name) for name in graph.outputs} & arrays.keys()
        sample |= {name: arrays[name] for name in names if arrays[name].dtype.kind == "f"}
    return sample


@dataclass(frozen=True)
class _How:
    """The format of a matrix, and the method with its options that brings it there."""

    format: str
    method: str
    options: dict[str, Any]


class GraphRounder:
    """Brings the matrices of an ONNX graph to a format, for the inputs that they have over the
    calibration samples if there are any. A call is what
    :func:`qigen.passes.tensor.optimize_graph` asks for; ``outcomes`` says what became of every
    matrix.
    """

    def __init__(self, graph: Graph, rounding: Rounding, told: str, report: Progress) -> None:
        self.recipe = rounding.recipe(rounding.calibration is not None)
        if self.recipe.preparations:
            raise Unsupported(f"method {self.recipe.preparations[0][0]} folds scales or rotations "
                              "into neighbours, which is done for language models alone; take "
                              "method gptq or clip")
        self.outcomes: list[dict[str, Any]] = []
        self._names = product_matrices(graph := before_products(graph))
        self._hows = self._chosen(rounding)
        self._report = report
        samples: list[dict[str, Array]] = []
        if rounding.calibration is not None:
            samples = read_samples(rounding.calibration, graph)[: self.recipe.samples]
        else:
            for how in self._hows.values():
                if methods.by_name(how.method).needs_hessian:
                    raise UsageError(f"method {how.method} needs calibration data; give "
                                     "--calibration, or take method clip or rtn")
        digest = hashlib.sha256()
        for sample in samples:
            for name in sorted(sample):
                digest.update(f"{name} {sample[name].dtype} {sample[name].shape}".encode())
                digest.update(sample[name].tobytes())
        self._store = Store(None)
        if any(how.method != "rtn" for how in self._hows.values()):
            self._store = Store.of(toolchain.cache_folder() / "quantized", VERSION, told,
                                   sorted(self._hows.items()), digest.hexdigest())
        self._found: dict[str, tuple[Array, QuantizedTensor, Array | None]] = {}
        if samples:
            self._calibrate(graph, samples)

    def _chosen(self, rounding: Rounding) -> dict[str, _How]:
        """What becomes of every matrix that does not stay as it is."""
        if rounding.by_matrix is not None:
            return {name: _How(fmt, *parse(method)[-1])
                    for name, (fmt, method) in rounding.by_matrix.items()}
        for pattern in rounding.keep:
            if not any(fnmatchcase(name, pattern) for name in self._names):
                shown = ", ".join(list(self._names)[:3])
                raise UsageError(f"no matrix is called {pattern}; there are {shown} ...")
        how = _How(by_name(rounding.format).name, self.recipe.method, dict(self.recipe.options))
        return {name: how for name in self._names
                if not any(fnmatchcase(name, pattern) for pattern in rounding.keep)}

    def __call__(self, w: Array, name: str) -> tuple[QuantizedTensor, Array | None] | None:
        """The matrix [N, K], which the constant ``name`` holds, in its format, and what is to be
        added to its product [N]; None: it is kept."""
        how = self._hows.get(name)
        if how is None:
            return None
        known = self._found.get(name)
        if known is not None and np.array_equal(known[0], w):
            return known[1], known[2]
        found = self._stored(name, w)
        if found is not None:
            return found[0], None
        if methods.by_name(how.method).needs_hessian:
            how = _How(how.format, "clip", {})  # a pass has changed it
        return self._quantized(w, name, how, None), None

    def _stored(self, name: str, w: Array) -> tuple[QuantizedTensor, Array | None] | None:
        """What an earlier run has kept of a matrix."""
        found = self._store.get(_key(name))
        if found is None:
            return None
        tensor, shift, of = (found[0].get(part) for part in ("w", "shift", "of"))
        if not isinstance(of, np.ndarray) or not np.array_equal(of, _mark(w)):
            return None  # of other weights
        assert isinstance(tensor, QuantizedTensor) and not isinstance(shift, QuantizedTensor)
        self.outcomes.append(found[1])
        return tensor, shift

    def _quantized(self, w: Array, name: str, how: _How, hessian: Statistics | Array | None,
                   shift: Callable[[QuantizedTensor], Array] | None = None) -> QuantizedTensor:
        try:
            tensor, outcome = methods.quantize_matrix(
                np.ascontiguousarray(w, np.float32), by_name(how.format), how.method, hessian,
                **how.options)
        except BadInput as error:
            raise BadInput(f"{how.format}: {error.message}", name) from None
        if how.method != "rtn":
            about = {"matrix": name, **outcome.to_json()}
            kept: dict[str, Array | QuantizedTensor] = {"w": tensor, "of": _mark(w)}
            if shift is not None:
                kept["shift"] = shift(tensor)
            self._store.put(_key(name), kept, about)
            self.outcomes.append(about)
            self._report("quantize", len(self.outcomes), len(self._hows))
        return tensor

    def _calibrate(self, graph: Graph, samples: Sequence[Mapping[str, Array]]) -> None:
        """Quantize the matrices in the order of the graph, each for the inputs that the ones before
        it, quantized, make of the samples.

        What a product is off in the mean over its inputs is made up for by what is added to it, so
        that the weights have to fit their inputs' deviations from the mean alone.
        """
        walk = GraphWalk(graph, samples, self.recipe.memory)
        readers = {name: set(inputs) for name, inputs in self._names.items()}
        left = set(self._hows)
        for number, node in enumerate(graph.nodes):
            name = node.inputs[1] if node.op in ("onnx.MatMul", "onnx.Gemm") else ""
            if not left:
                break
            if name in left:
                left.discard(name)
                w = walk.matrix(node)
                x = node.inputs[0]
                found = self._stored(name, w)
                if found is None:
                    found = self._fitted(walk, w, name, x, len(readers[name]) == 1)
                self._found[name] = w, *found
                walk.exchange(node, found[0].dequantize(), found[1])
            walk.step(number)

    def _fitted(self, walk: GraphWalk, w: Array, name: str, x: str, alone: bool
                ) -> tuple[QuantizedTensor, Array | None]:
        """A matrix for its input ``x`` (``alone``: which no other product of it has)."""
        statistics, how = walk.statistics(x, name), self._hows[name]
        if not alone:
            return self._quantized(w, name, how, statistics), None
        mean = statistics.mean

        def shift(tensor: QuantizedTensor) -> Array:
            return np.asarray((w - tensor.dequantize()) @ mean, np.float32)

        tensor = self._quantized(w, name, how, statistics.centred(), shift)
        return tensor, shift(tensor)


class GraphWalk:
    """An ONNX graph on its way over all samples at once, node by node, by numpy.

    Where there is an input called attention_mask [B, T], what padding makes of an input [B, T, K]
    counts for nothing. What is live has to fit into ``memory`` bytes.
    """

    def __init__(self, graph: Graph, samples: Sequence[Mapping[str, Array]], memory: int) -> None:
        self.graph = graph
        self.masks = [sample.get("attention_mask") for sample in samples]
        self._memory = memory
        self._constants: dict[str, Array] = {}
        for name, data in graph.constants.items():
            loaded = load_constant(data)
            self._constants[name] = loaded.dequantize() if isinstance(
                loaded, QuantizedTensor) else loaded
        self._values: list[dict[str, Array]] = [{} for _ in samples]
        self._runs = [Run(graph, sample, ChainMap(values, self._constants))
                      for sample, values in zip(samples, self._values, strict=True)]
        self._last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs
                      if name not in graph.outputs}
        self._shifts: dict[str, Array] = {}
        self._counted: tuple[str, Statistics] | None = None

    def matrix(self, node: Node) -> Array:
        """The weights [N, K] of a product, as :class:`~qigen.passes.tensor.products.Products` takes
        them."""
        w = self._constants[node.inputs[1]]
        if node.op == "onnx.MatMul":
            return np.ascontiguousarray(w.T)
        turned = w if node.attrs["transB"] else w.T
        return np.ascontiguousarray(turned * np.float32(node.attrs["alpha"]))

    def exchange(self, node: Node, w: Array, shift: Array | None) -> None:
        """Go on with other weights [N, K], and ``shift`` [N] added to the product."""
        if node.op == "onnx.Gemm":
            w = w / np.float32(node.attrs["alpha"] or 1)
        turned = node.op == "onnx.Gemm" and node.attrs["transB"]
        self._constants[node.inputs[1]] = w if turned else np.ascontiguousarray(w.T)
        if shift is not None:
            self._shifts[node.outputs[0]] = shift

    def statistics(self, x: str, where: str) -> Statistics:
        """Those of a value that is known by now, for the matrix ``where``."""
        if self._counted is None or self._counted[0] != x:
            width = self.graph.values[x].shape[-1]
            assert isinstance(width, int)
            check_memory(width, self._memory, where)
            found = Statistics.empty(width)
            for run, mask in zip(self._runs, self.masks, strict=True):
                found.add(without_padding(run.values[x], mask))
            self._counted = x, found
        return self._counted[1]

    def outputs(self) -> list[dict[str, Array]]:
        """The outputs of every sample, once all nodes have run."""
        return [{name: run.values[name] for name in self.graph.outputs} for run in self._runs]

    def state(self) -> Any:
        """Where the walk stands, for :meth:`restart`; arrays are not copied."""
        return ([dict(values) for values in self._values], dict(self._constants),
                dict(self._shifts))

    def restart(self, state: Any) -> None:
        """Go on from what was the :meth:`state` at some node, with the weights of then."""
        values, constants, shifts = state
        for mine, old in zip((*self._values, self._constants, self._shifts),
                             (*values, constants, shifts), strict=True):
            mine.clear()
            mine.update(old)
        self._counted = None

    def step(self, number: int) -> None:
        """Run a node for all samples and forget what nobody needs any more."""
        node = self.graph.nodes[number]
        for run in self._runs:
            weights = self._constants.get(node.inputs[1]) if node.op == "onnx.MatMul" else None
            # in float32, which is enough here, and fast
            if weights is not None and weights.ndim == 2 and weights.dtype == np.float32:
                run.put(node.outputs[0], run.values[node.inputs[0]] @ weights)
            elif node.op == "onnx.Erf":
                run.put(node.outputs[0], _erf(run.values[node.inputs[0]]))
            elif node.op == "EncoderAttention":
                run.put(node.outputs[0], _attended(node, [run.values[n] for n in node.inputs if n]))
            else:
                run.step(node)
            for name in node.outputs:
                if name in self._shifts:
                    run.values[name] = run.values[name] + self._shifts[name]
            for name in node.inputs:
                if self._last.get(name) == number and name not in self._constants:
                    run.values.pop(name, None)
        live = sum(a.nbytes for run in self._runs for name, a in run.values.items()
                   if name not in self._constants)
        if live > self._memory:
            raise UsageError(
                f"the activations of {len(self._runs)} samples take {live / 2**20:.0f} MiB here, "
                f"and calibration may have {self._memory / 2**20:.0f}; give fewer --samples, or "
                f"--calibration-memory {-(-live // 2**20)}MiB or more", node.name)


def without_padding(value: Array, mask: Array | None) -> Array:
    """What counts of a value [B, T, ..]: where ``mask`` [B, T] is not zero; all of others."""
    if mask is not None and value.ndim > mask.ndim and value.shape[: mask.ndim] == mask.shape:
        return np.asarray(value[mask != 0])
    return value


def _attended(node: Node, inputs: Sequence[Array]) -> Array:
    """EncoderAttention by matrix products in float32."""
    a = node.attrs
    width = a["heads"] * a["head_dim"]
    q, k, v = (x[..., o : o + width].reshape(*x.shape[:-1], a["heads"], -1).transpose(0, 2, 1, 3)
               for x, o in zip(inputs, a["offsets"], strict=False))
    scores = q @ k.transpose(0, 1, 3, 2) * np.float32(a["scale"])
    if len(inputs) > 3:
        scores = scores + inputs[3]
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    mixed: Array = (scores @ v).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(mixed, np.float32).reshape(*inputs[0].shape[:-1], width)


def _erf(x: Array) -> Array:
    """The error function, to 2e-7 (Abramowitz and Stegun, 7.1.26)."""
    t = 1 / (1 + np.float32(0.3275911) * np.abs(x))
    tail = np.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = (tail + np.float32(factor)) * t
    found: Array = np.copysign(1 - tail * np.exp(-x * x), x)
    return found


def _mark(w: Array) -> Array:
    """uint8 [16]: tells matrices from each other."""
    digest = hashlib.blake2b(np.ascontiguousarray(w).tobytes(), digest_size=16).digest()
    return np.frombuffer(digest, np.uint8)


def _key(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=12).hexdigest()


def product_matrices(graph: Graph) -> dict[str, list[str]]:
    """The constant float matrices of a graph's products, and the inputs that meet each."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op not in ("onnx.MatMul", "onnx.Gemm") or node.attrs.get("transA"):
            continue
        if any(name and name not in graph.constants for name in node.inputs[2:]):
            continue
        data = graph.constants.get(node.inputs[1])
        if isinstance(data, np.ndarray) and data.ndim == 2 and data.dtype == np.float32 and (
                data.size and node.inputs[0] not in graph.constants):
            found.setdefault(node.inputs[1], []).append(node.inputs[0])
    return found


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
