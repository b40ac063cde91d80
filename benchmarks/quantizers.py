"""What quantization methods lose in the output of a language model's matrices.

    python benchmarks/quantizers.py MODEL --calibration TEXT --layers 2,14,26 \\
        s3g64:rtn s3g64:gptq lut3_tensor_g64:kmeans aqlm_2x8:aqlm

Hessians are those of the float model, over ``--samples`` sequences of 512 tokens. A row of the
table: format and method, bits of a weight (scales, tables and books included), the error of the
output relative to its square (mean over matrices, and by kind), CPU seconds of all matrices.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from qigen.calibration import read_ids
from qigen.compiler import _tokenizer
from qigen.formats.algebra import QuantizedTensor
from qigen.formats.catalog import by_name
from qigen.frontends import build_graph, load_model
from qigen.ir.graph import load_constant
from qigen.quantize.hessian import Statistics
from qigen.quantize.methods import parse, quantize_matrix
from qigen.quantize.model import sequences_of
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--layers", default="2,14,26")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("pairs", nargs="+", metavar="FORMAT:METHOD")
    options = parser.parse_args()
    layers = {int(number) for number in options.layers.split(",")}
    matrices = collected(options.model, options.calibration, layers, options.samples)
    kinds = list(dict.fromkeys(name.split(".")[2] for name in matrices))
    print(f"| format | method | bits | error | {' | '.join(kinds)} | CPU s |")
    print("| --- | --- " + "| --: " * (len(kinds) + 3) + "|")
    for pair in options.pairs:
        name, _, text = pair.partition(":")
        (method, chosen), = parse(text or "rtn")
        errors: dict[str, list[float]] = {kind: [] for kind in kinds}
        bits, weights = 0.0, 0
        start = time.process_time()
        for matrix, (w, statistics) in matrices.items():
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
