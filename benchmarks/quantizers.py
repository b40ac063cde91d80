"""What quantization methods lose in the output of a language model's matrices.

    python benchmarks/quantizers.py MODEL --calibration TEXT --layers 2,14,26 \\
        s3g64:rtn s3g64:gptq lut3_tensor_g64:kmeans aqlm_2x8:aqlm

Hessians are those of the float model, over ``--samples`` sequences of 512 tokens. A row of the
table: format and method, bits of a weight (scales, tables and books included), the error of the
output relative to its square (mean over matrices, and by kind), CPU seconds of all matrices.

With ``--score TEXT --chunks 3`` the model is tried as a whole, those layers quantized and the
others as they are, each layer calibrated on what the ones before hand to it: perplexity and
divergence from the float model, with standard errors (float activations, by numpy).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from qigen.calibration import read_ids
from qigen.compiler import _tokenizer
from qigen.evaluate import perplexity
from qigen.formats.catalog import by_name
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends import build_graph, load_model
from qigen.ir.graph import Graph, load_constant
from qigen.quantize.hessian import Statistics
from qigen.quantize.methods import parse, quantize_matrix
from qigen.quantize.model import Recipe, matrices, quantize_model, sequences_of
from qigen.quantize.walk import Walk

CONTEXT = 512


def collected(model: Path, text: Path, layers: set[int], samples: int) -> dict[str, Any]:
    """(weight float32 [N, K], statistics) of every matrix of some layers, by name."""
    source = load_model(model)
    graph = build_graph(source, CONTEXT)
    ids = read_ids(text, _tokenizer(source))
    walk = Walk(graph, sequences_of(ids, samples, CONTEXT), memory=2 << 30)
    found: dict[str, Any] = {}
    for segment in walk.segments:
        if segment.layer is not None and segment.layer > max(layers):
            break
        products = segment.products(graph) if segment.layer in layers else []
        inputs = {node.inputs[0] for node in products}
        statistics = {x: Statistics.empty(int(str(graph.values[x].shape[-1]))) for x in inputs}
        for x, counted in statistics.items():
            walk.run(segment, {x: lambda _, value, into=counted: into.add(value)},  # type: ignore[misc]
                     advance=False)
        for node in products:
            data = load_constant(graph.constants[node.inputs[1]])
            w = data.dequantize() if isinstance(data, QuantizedTensor) else data
            found[node.inputs[1]] = np.asarray(w), statistics[node.inputs[0]]
        walk.run(segment)
    return found


class Replay:
    """A session that gives logits float32 [512, vocab] of one chunk after the other."""

    def __init__(self, logits: list[Any]) -> None:
        self.logits, self.chunk, self.at = logits, -1, 0

    def rewind(self, position: int) -> None:
        """To the next chunk."""
        self.chunk, self.at = self.chunk + 1, position

    def eval(self, tokens: Any, *, all: bool = False) -> Any:
        """The logits of the next tokens."""
        self.at += len(tokens)
        return self.logits[self.chunk][self.at - len(tokens) : self.at]


def logits_of(graph: Graph, chunks: Any) -> list[Any]:
    """Of every chunk [512] what the model says."""
    walk = Walk(graph, chunks, memory=2 << 30)
    for segment in walk.segments[:-1]:
        walk.run(segment)
    found: list[Any] = []
    walk.run(walk.segments[-1], {"logits": lambda _, x: found.append(x.copy())}, advance=False)
    return found


def score(options: argparse.Namespace, layers: set[int]) -> None:
    """The table of the whole model."""
    source = load_model(options.model)
    graph = build_graph(source, CONTEXT)
    tokenizer = _tokenizer(source)
    sequences = sequences_of(read_ids(options.calibration, tokenizer), options.samples, CONTEXT)
    ids = read_ids(options.score, tokenizer)[: options.chunks * CONTEXT]
    reference = logits_of(graph, ids.reshape(-1, CONTEXT))
    names = [n for n in matrices(graph) if n.startswith(tuple(f"blk.{i}." for i in layers))]
    print("| format | method | bits | divergence | log of the perplexity's ratio | perplexity | "
          "CPU s |\n| --- | --- " + "| --: " * 5 + "|")
    for pair in options.pairs:
        name, _, text = pair.partition(":")
        *before, (method, chosen) = parse(text or "rtn")
        start = time.process_time()
        recipe = Recipe(method, chosen, options.samples, CONTEXT, before=tuple(before))
        made, _ = quantize_model(graph, dict.fromkeys(names, by_name(name)), sequences, recipe)
        seconds = time.process_time() - start
        size = weights = 0
        for n in names:
            data = load_constant(made.constants[n])
            assert isinstance(data, QuantizedTensor)
            size, weights = size + data.nbytes, weights + data.shape[0] * data.shape[1]
        ours = logits_of(made, ids.reshape(-1, CONTEXT))
        r = perplexity(lambda ours=ours: Replay(ours), ids, context=CONTEXT,  # type: ignore[misc]
                       chunks=options.chunks, reference_factory=lambda: Replay(reference))
        print(f"| `{name}` | {text or 'rtn'} | {8 * size / weights:.2f} | {r['kl_mean']:.4f} ± "
              f"{r['kl_mean_se']:.4f} | {r['log_ratio']:+.4f} ± {r['log_ratio_se']:.4f} | "
              f"{r['perplexity']:.2f} | {seconds:.0f} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--layers", default="2,14,26")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--score", type=Path, help="a text: try the model as a whole on it")
    parser.add_argument("--chunks", type=int, default=3)
    parser.add_argument("pairs", nargs="+", metavar="FORMAT:METHOD")
    options = parser.parse_args()
    layers = {int(number) for number in options.layers.split(",")}
    if options.score is not None:
        score(options, layers)
        return
    found = collected(options.model, options.calibration, layers, options.samples)
    kinds = list(dict.fromkeys(name.split(".")[2] for name in found))
    print(f"| format | method | bits | error | {' | '.join(kinds)} | CPU s |")
    print("| --- | --- " + "| --: " * (len(kinds) + 3) + "|")
    for pair in options.pairs:
        name, _, text = pair.partition(":")
        (method, chosen), = parse(text or "rtn")
        errors: dict[str, list[float]] = {kind: [] for kind in kinds}
        bits, weights = 0.0, 0
        start = time.process_time()
        for matrix, (w, statistics) in found.items():
            tensor, report = quantize_matrix(w, by_name(name), method, statistics, **chosen)
            errors[matrix.split(".")[2]].append(report.relative)
            bits += 8 * tensor.nbytes
            weights += w.size
        seconds = time.process_time() - start
        mean = np.mean([e for part in errors.values() for e in part])
        cells = " | ".join(f"{np.mean(part):.4f}" for part in errors.values())
        print(f"| `{name}` | {text} | {bits / weights:.2f} | {mean:.4f} | {cells} | "
              f"{seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
