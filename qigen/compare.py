"""How far the outputs of a model are from what they should be: of models that have no tokens, on
samples, and of the layers of language models, on a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.artifact import Artifact
from qigen.bench_graph import model_inputs
from qigen.errors import BadInput, UsageError
from qigen.frontends import build_graph, load_model
from qigen.ir.graph import Array, Graph, constant_shape
from qigen.model import Model
from qigen.quantize.walk import Walk

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]

MEMORY = 1 << 30
"""Bytes of what lies between two layers, at most."""


def difference(got: Array, expected: Array) -> dict[str, float]:
    """``relative_error`` (Frobenius norm of the difference over that of ``expected``) and
    ``cosine``, in float64. Two arrays of zeros are equal; NaN where a number is not finite."""
    a, b = (np.asarray(x, np.float64).reshape(-1) for x in (got, expected))
    size, product = float(np.linalg.norm(b)), float(np.linalg.norm(a) * np.linalg.norm(b))
    off = float(np.linalg.norm(a - b))
    if not np.isfinite(off):
        return {"relative_error": float("nan"), "cosine": float("nan")}
    relative = off / size if size else (0.0 if off == 0 else float("inf"))
    cosine = float(a @ b) / product if product else float(off == 0)
    return {"relative_error": relative, "cosine": min(1.0, max(-1.0, cosine))}


def compare_outputs(
    model: Run, reference: Run | None, samples: Iterable[Mapping[str, Array]],
    outputs: Sequence[str], inputs: Sequence[str],
) -> list[dict[str, Any]]:
    """For every output what is between ``model`` and ``reference`` over the samples: ``cosine_min``
    and ``cosine_mean``, ``relative_error`` (mean) and ``relative_error_max``.

    Without a reference the samples hold the outputs that are expected, beside the inputs. BadInput
    if an output is missing there or has another shape.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in outputs}
    for number, sample in enumerate(samples):
        given = {name: sample[name] for name in inputs}
        got = model(given)
        expected = reference(given) if reference is not None else sample
        named = [name for name in outputs if name in expected]
        if not named:
            raise BadInput(f"it has none of the outputs {', '.join(outputs)}; give --against, or "
                           "samples with the outputs that are expected", f"sample {number}")
        for name in named:
            if got[name].shape != expected[name].shape:
                raise BadInput(f"output {name} has the shape {list(got[name].shape)}, expected was "
                               f"{list(expected[name].shape)}", f"sample {number}")
            found[name].append(difference(got[name], expected[name]))
    rows = []
    for name, differences in found.items():
        if not differences:
            continue
        cosines = [d["cosine"] for d in differences]
        errors = [d["relative_error"] for d in differences]
        rows.append({
            "output": name, "samples": len(differences), "cosine_min": min(cosines),
            "cosine_mean": float(np.mean(cosines)), "relative_error": float(np.mean(errors)),
            "relative_error_max": max(errors),
        })  # fmt: skip
    return rows


def evaluate_graph(
    artifact: str | Path, against: str | Path | None, samples: str | Path | None,
    shapes: Mapping[str, Sequence[int | str]] | None = None, threads: int = 0,
) -> dict[str, Any]:
    """The outputs of a graph artifact beside those of another, or beside those in the samples.

    ``samples`` is an .npz with an array by input, or a folder of such; None: one made-up sample, of
    which ``shapes`` gives the open dimensions. Raises BadInput for samples that do not fit,
    UsageError if there is nothing to compare with.
    """
    if against is None and samples is None:
        raise UsageError("give --against ARTIFACT, or --samples with the outputs that are expected")
    described = Artifact(artifact)
    model = Model(artifact, threads)
    inputs = [i["name"] for i in model.inputs]
    outputs = [o["name"] for o in model.outputs]
    reference = None
    if against is not None:
        other = Model(against, threads)
        if [i["name"] for i in other.inputs] != inputs:
            raise BadInput(f"the reference has the inputs "
                           f"{', '.join(i['name'] for i in other.inputs)}, the model "
                           f"{', '.join(inputs)}", str(against))
        reference = other.run
        outputs = [o for o in outputs if o in {r["name"] for r in other.outputs}]
    found: list[dict[str, Array]]
    if samples is None:
        found = [model_inputs(described, {}, shapes or {})]
    else:
        found = read_sample_arrays(Path(samples), inputs)
    rows = compare_outputs(model.run, reference, found, outputs, inputs)
    return {"samples": len(found), "made_up": samples is None, "outputs": rows}


def read_sample_arrays(path: Path, inputs: Sequence[str]) -> list[dict[str, Array]]:
    """The arrays of an .npz, or of every .npz of a folder. BadInput for files that are none and for
    inputs that are missing."""
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise BadInput("the folder has no .npz files with samples", str(path))
    found = []
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:  # whatever a damaged archive makes numpy raise
            raise BadInput(f"this is no .npz of samples ({' '.join(str(error).split())})",
                           str(file)) from None
        for name in inputs:
            if name not in arrays:
                raise BadInput(f"it has no array for the input {name}", str(file))
        found.append(arrays)
    return found


def layer_errors(
    artifact: str | Path, against: str | Path, sequences: npt.NDArray[np.int32],
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[dict[str, Any]]:
    """What every layer of a language model does to the error, over ``sequences`` int32 [S, T].

    The weights are those of the two artifacts, the arithmetic is float32: what is shown comes from
    the weights alone. A row has ``layer`` (the last is 'logits'), ``relative_error`` and ``cosine``
    of its output beside the reference's, each model going its own way, and ``own_relative_error``
    and ``own_cosine``, where the layer gets the reference's input. The model file that the
    reference was compiled from says how the layers hang together; BadInput if it is gone.
    """
    ours, theirs = Artifact(artifact), Artifact(against)
    path = Path(theirs.manifest["source"]["path"])
    if not path.exists():
        raise BadInput("the model that the reference was compiled from is not there any more; "
                       "layers cannot be compared without it", str(path))
    source = load_model(path)
    graph = build_graph(source, max(sequences.shape[1], 64))
    expected = Walk(_of_artifact(graph, theirs), sequences, memory=MEMORY)
    changed = _of_artifact(graph, ours)
    own, whole = (Walk(changed, sequences, memory=MEMORY) for _ in range(2))
    ends = _ends(graph)
    rows: list[dict[str, Any]] = []
    start = expected.kept()
    first = 0
    parts = list(zip(expected.segments, own.segments, whole.segments, strict=True))
    for number, (a, _, c) in enumerate(parts):
        names = [n for node in a.nodes for n in node.outputs if n in ends]
        seen: list[dict[str, list[Array]]] = [{n: [] for n in names} for _ in range(3)]

        def watch(into: dict[str, list[Array]]) -> dict[str, Callable[[str, Array], None]]:
            return {n: lambda key, value, into=into: into[key].append(value.copy())  # type: ignore[misc]
                    for n in into}

        last = number + 1 == len(parts)
        expected.run(a, watch(seen[0]), advance=not last)
        whole.run(c, watch(seen[2]), advance=not last)
        if names:
            own.restart(start)
            for j in range(first, number + 1):
                own.run(parts[j][1], watch(seen[1]) if j == number else None,
                        advance=j < number or not last)
            for name in names:
                pairs = [np.concatenate(s[name]) for s in seen]
                alone = difference(pairs[1], pairs[0])
                rows.append({"layer": ends[name], **difference(pairs[2], pairs[0]),
                             "own_relative_error": alone["relative_error"],
                             "own_cosine": alone["cosine"]})
            start, first = expected.kept(), number + 1
        progress("layers", number + 1, len(parts))
    return rows


def _ends(graph: Graph) -> dict[str, int | str]:
    """The values that layers hand on, by the layer that makes them, and the logits."""
    layers = {n.name: n.layer for n in graph.nodes}
    made = {name: node for node in graph.nodes for name in node.outputs}
    found: dict[str, int | str] = {}
    for node in graph.nodes:
        for name in node.inputs:
            producer = made.get(name)
            layer = None if producer is None else layers[producer.name]
            if producer is not None and layer is not None and layer != node.layer:
                found[name] = layer
    return found | dict.fromkeys(graph.outputs, "logits")


def _of_artifact(graph: Graph, artifact: Artifact) -> Graph:
    """The flat graph with the matrices and vectors of an artifact."""
    result = graph.copy()
    held = {part["name"]: t for t in artifact.tensors.values() for part in t["parts"]}
    for name, data in graph.constants.items():
        if name not in held:
            continue
        tensor = held[name]
        if "layout" in tensor:
            result.constants[name] = artifact.unpack(name)
        elif tensor["format"] == "vector":
            n = constant_shape(data)[0]
            raw = np.fromfile(artifact.weights_path, np.float32, n, offset=tensor["offset"])
            result.constants[name] = raw
    return result
