"""How fast the artifact of an ONNX model is, beside ONNX Runtime, OpenVINO and TVM.

As in :mod:`qigen.bench`, every side is a process of its own, all stay loaded and take turns on the
same arrays with the same number of threads, and ratios are medians over pairs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray

from qigen.arrays import read_array, read_inputs
from qigen.artifact import Artifact
from qigen.bench import Progress, Worker, machine
from qigen.errors import BadInput, Unsupported, UsageError
from qigen.frontends.onnx.reader import parse_model
from qigen.ir.types import TYPES
from qigen.toolchain import cache_folder

Array = NDArray[Any]

PEERS = ("onnxruntime", "openvino", "tvm", "tvm-tuned")

_TVM = ("tvm", "tvm-tuned")

TRIALS = 16
"""Schedules of every operator that TVM tries where it is tuned."""

PRECISIONS = ("f32", "bf16", "int8")

_TURN_S = 0.3  # that a turn of a side takes at least
_MOST_RUNS = 1000  # of a turn
_PAUSE_S = 0.02  # in which idle threads of the side before fall asleep
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "MatMulInteger", "ConvInteger")


class _Worker(Worker):
    module = "qigen.bench_graph_worker"


def bench_graph(
    path: str | os.PathLike[str],
    *,
    inputs: Mapping[str, str | os.PathLike[str]] | None = None,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    threads: int = 0,
    pin: bool = False,
    repeat: int = 5,
    peers: Sequence[str] = (),
    peer_model: str | os.PathLike[str] | None = None,
    peer_precision: str = "f32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an artifact; the keys of the result are those of ``qigen bench --json``.

    ``inputs`` are .npy files by name. All others are made up: random floats, and ones where
    integers are wanted, in the artifact's shape, of which ``shapes`` gives the open dimensions
    (a first dimension that is open is 1 otherwise). ``peers`` run ``peer_model``, by default the
    ONNX file that the artifact was made of, in ``peer_precision``; an int8 model is made for them
    unless the file is quantized itself.

    'latency_ms' is the median of 'runs', each the median of a turn; 'ratio' is of speeds, ours by
    theirs, so more than 1 where ours takes less time. 'max_difference' is the largest difference
    of an output from ours.

    Raises UsageError, BadInput, MachineMismatch; Unsupported if a peer is unknown or not installed.
    """
    artifact = Artifact(path)
    if not artifact.is_graph:
        raise UsageError("this is a language model; measure it with qigen.bench", str(path))
    if repeat < 1:
        raise UsageError("a benchmark needs at least one repeat")
    if peer_precision not in PRECISIONS:
        raise UsageError(f"precision {peer_precision}: choose one of {', '.join(PRECISIONS)}")
    for name in peers:
        _check_peer(name, peer_precision)
    arrays = model_inputs(artifact, inputs or {}, shapes or {})
    source = _peer_source(artifact, peer_model) if peers else None
    report = progress or (lambda stage, done, total: None)

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qigen-bench-")))
        specification = _saved(arrays, folder)
        report("load", 0, 1 + len(peers))
        before = psutil.cpu_times()
        ours = stack.enter_context(
            _Worker("qigen", path=str(path), inputs=specification, threads=threads, pin=pin)
        )
        sides: dict[str, _Worker] = {"qigen": ours}
        about: dict[str, dict[str, Any]] = {}
        for done, name in enumerate(peers):
            report("load", 1 + done, 1 + len(peers))
            assert source is not None
            options, about[name] = _peer_options(name, artifact, source, arrays, specification,
                                                 peer_precision)  # fmt: skip
            sides[name] = stack.enter_context(
                _Worker(name, inputs=specification, threads=ours.threads, **options)
            )
        report("load", 1 + len(peers), 1 + len(peers))
        runs = {name: _runs_a_turn(side) for name, side in sides.items()}
        outputs = {name: _outputs(side, folder / name) for name, side in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(repeat):
            report("measure", turn, repeat)
            # Nobody always goes first.
            for name in list(sides) if turn % 2 == 0 else list(reversed(sides)):
                time.sleep(_PAUSE_S)
                seconds = sides[name].ask(do="run", runs=runs[name])["seconds"]
                times[name].append(1e3 * statistics.median(seconds))
        report("measure", repeat, repeat)
        memory = {name: side.ask(do="memory") for name, side in sides.items()}
        after = psutil.cpu_times()

    def result(name: str) -> dict[str, Any]:
        return {
            "threads": ours.threads,
            "peak_rss_bytes": memory[name]["peak_rss_bytes"],
            "load_s": sides[name].load_s,
            "latency_ms": statistics.median(times[name]),
            "runs": times[name],
            "runs_a_turn": runs[name],
        }

    summary = result("qigen") | {
        "weight_bytes": artifact.manifest["files"]["weights.bin"]["bytes"],
        "precision": _precision(artifact),
        "model": artifact.manifest["name"],
        "isa": artifact.manifest["target"]["isa"],
        "inputs": [
            {
                "name": n,
                "dtype": str(a.dtype),
                "shape": list(a.shape),
                "file": str(inputs[n]) if inputs and n in inputs else None,
            }
            for n, a in arrays.items()
        ],
        "machine": machine(before, after),
        "peers": {},
    }
    for name in peers:
        pairs = zip(times["qigen"], times[name], strict=True)
        summary["peers"][name] = (
            result(name)
            | {"ratio": statistics.median(theirs / mine for mine, theirs in pairs)}
            | _difference(outputs["qigen"], outputs[name])
            | {"version": sides[name].loaded["version"]}
            | about[name]
        )
    return summary


# ---- inputs --------------------------------------------------------------------------------------


def model_inputs(
    artifact: Artifact,
    files: Mapping[str, str | os.PathLike[str]],
    shapes: Mapping[str, Sequence[int | str]],
) -> dict[str, Array]:
    """An array for every input: the file's, else made up."""
    interface = artifact.manifest["interface"]
    wanted = interface["inputs"]
    names = [entry["name"] for entry in wanted]
    for name in (*files, *shapes):
        if name not in names:
            raise BadInput(f"the model has no such input; it has {', '.join(names)}", name)
    for name in shapes:
        if name in files:
            raise UsageError(f"--shape of {name}: the shape of its file counts")
    given = [
        {"name": e["name"], "dtype": TYPES[e["dtype"]].numpy.name}
        for e in wanted
        if e["name"] in files
    ]
    arrays = read_inputs({name: Path(file) for name, file in files.items()}, given)
    sizes: dict[str, int] = {}  # of the open dimensions, by their names
    for entry in wanted:
        if entry["name"] in arrays:
            for d, size in zip(entry["shape"], arrays[entry["name"]].shape, strict=False):
                sizes.setdefault(str(d), size)
    for entry in wanted:
        asked = _sizes(entry, shapes[entry["name"]]) if entry["name"] in shapes else entry["shape"]
        for d, size in zip(entry["shape"], asked, strict=True):
            if isinstance(size, int):
                sizes.setdefault(str(d), size)
    rng = np.random.default_rng(0)
    for entry in wanted:
        if entry["name"] in arrays:
            continue
        shape = []
        for axis, d in enumerate(entry["shape"]):
            size = d if isinstance(d, int) else sizes.get(d, 1 if axis == 0 else None)
            if size is None:
                raise UsageError(
                    f"dimension {axis} ({d}) of input {entry['name']} is open; give the sizes with "
                    f"--shape {entry['name']}={'x'.join(map(str, entry['shape']))}"
                )
            shape.append(size)
        arrays[entry["name"]] = _made_up(entry["dtype"], shape, rng)
    return {name: arrays[name] for name in names}


def _sizes(entry: dict[str, Any], asked: Sequence[int | str]) -> list[int]:
    """The sizes that --shape gives an input, checked."""
    name, shape = entry["name"], entry["shape"]
    if not all(str(size).isdecimal() for size in asked):
        raise UsageError(f"--shape of {name}: a benchmark needs numbers")
    sizes = [int(size) for size in asked]
    if len(sizes) != len(shape) or any(
        isinstance(d, int) and d != size for d, size in zip(shape, sizes, strict=True)
    ):
        raise UsageError(
            f"--shape of {name}: {'x'.join(map(str, sizes))} does not fit what the artifact was "
            f"compiled for, {'x'.join(map(str, shape))}"
        )
    return sizes


def _made_up(dtype: str, shape: Sequence[int], rng: np.random.Generator) -> Array:
    row = TYPES[dtype]
    if row.floating:
        return rng.standard_normal(shape, np.float32).astype(row.numpy)
    # One is an id of any vocabulary, a mask that hides nothing, an index of most things.
    return np.ones(shape, row.numpy)


def _saved(arrays: Mapping[str, Array], folder: Path) -> list[dict[str, str]]:
    specification = []
    for i, (name, array) in enumerate(arrays.items()):
        file = folder / f"input{i}.npy"
        np.save(file, array)
        specification.append({"name": name, "file": str(file), "dtype": array.dtype.name})
    return specification


# ---- sides ---------------------------------------------------------------------------------------


def _precision(artifact: Artifact) -> str:
    """The arithmetic that ours uses, as far as the manifest says."""
    kernels = artifact.explain()
    found = {str(k["arithmetic"]) for k in kernels if k.get("arithmetic")}
    return "+".join(sorted(found)) or str(artifact.manifest["plan"].get("activations", ""))


def _runs_a_turn(side: _Worker) -> int:
    """So many that a turn takes long enough; the first runs warm up."""
    seconds = min(side.ask(do="run", runs=3)["seconds"])
    return max(1, min(_MOST_RUNS, math.ceil(_TURN_S / max(float(seconds), 1e-6))))


def _outputs(side: _Worker, folder: Path) -> list[Array]:
    folder.mkdir()
    count = side.ask(do="outputs", folder=str(folder))["count"]
    return [read_array(folder / f"{i}.npy") for i in range(count)]


def _difference(ours: Sequence[Array], theirs: Sequence[Array]) -> dict[str, Any]:
    """The largest difference of an output, and the largest number in ours to set it beside."""
    most = max((float(np.abs(a[np.isfinite(a)]).max(initial=0)) for a in ours), default=0.0)
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return {"max_difference": None, "max_output": most, "note": "the outputs' shapes differ"}
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        with np.errstate(invalid="ignore"):
            # equal infinities and two NaN are no difference
            gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        worst = max(worst, float(np.nan_to_num(gap, nan=math.inf).max(initial=0)))
    return {"max_difference": worst, "max_output": most}


def _check_peer(name: str, precision: str) -> None:
    if name not in PEERS:
        raise Unsupported(f"peer '{name}' is not known; there is {', '.join(PEERS)}")
    extra = "tvm" if name in _TVM else "bench"
    for package in _packages(name, precision):
        if importlib.util.find_spec(package) is None:
            raise Unsupported(
                f"{package} is not installed; install it with pip install 'qigen[{extra}]'", name
            )
    if precision != "f32" and name in _TVM:
        raise Unsupported(f"TVM is measured in f32; leave --peer-precision {precision} out", name)
    if precision == "bf16" and name == "onnxruntime":
        raise Unsupported("ONNX Runtime has no bf16 arithmetic on this processor; leave it out",
                          name)  # fmt: skip


def _packages(name: str, precision: str) -> list[str]:
    """What must be installed for a peer."""
    if name in _TVM:
        return ["tvm"]
    return [name, "nncf"] if (name, precision) == ("openvino", "int8") else [name]


def _peer_source(artifact: Artifact, given: str | os.PathLike[str] | None) -> Path:
    """The ONNX file that peers run."""
    source = Path(artifact.manifest["source"]["path"] if given is None else given)
    if not source.is_file():
        raise BadInput("there is no such file; give the ONNX model with --source", str(source))
    return source


def _peer_options(
    name: str,
    artifact: Artifact,
    source: Path,
    arrays: Mapping[str, Array],
    specification: list[dict[str, str]],
    precision: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the peer's side, what the result says about it).

    Dimensions that the artifact fixes are fixed for the peer too, so that it can use them.
    """
    model = parse_model(source)
    shapes = {e["name"]: e["shape"] for e in artifact.manifest["interface"]["inputs"]}
    static = all(isinstance(d, int) for shape in shapes.values() for d in shape)
    sizes: dict[str, set[int | str]] = {}
    for info in model.graph.input:
        declared = info.type.tensor_type.shape.dim
        for d, size in zip(declared, shapes.get(info.name, ()), strict=False):
            sizes.setdefault(d.dim_param, set()).add(size)
    # "?" and the like are names of nothing in particular
    fixed = {
        name: next(iter(found))
        for name, found in sizes.items()
        if re.search(r"\w", name) and len(found) == 1 and isinstance(next(iter(found)), int)
    }
    file = source
    if precision == "int8" and not any(n.op_type in _QUANTIZED for n in model.graph.node):
        file = _int8_model(name, source, model, arrays, specification)
    options: dict[str, Any] = {"path": str(file)}
    if name == "onnxruntime":
        options["fixed"] = fixed
    elif name in _TVM:
        options["trials"] = TRIALS if name == "tvm-tuned" else 0
    else:
        options |= {"fixed": static, "precision": "bf16" if precision == "bf16" else "f32"}
    return options, {"model": str(file), "precision": precision}


def _int8_model(
    name: str,
    source: Path,
    model: onnx.ModelProto,
    arrays: Mapping[str, Array],
    specification: list[dict[str, str]],
) -> Path:
    """An int8 model for a peer, made once for these inputs and kept in the cache."""
    digest = hashlib.blake2b(source.read_bytes(), digest_size=16)
    versions = map(importlib.metadata.version, _packages(name, "int8"))
    digest.update(" ".join((name, *versions)).encode())
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                file = source.parent / entry.value
                if file.is_file():
                    digest.update(f"{file} {file.stat().st_mtime_ns}".encode())
    for key, array in arrays.items():
        digest.update(f"{key} {array.dtype} {array.shape}".encode() + array.tobytes())
    folder = cache_folder() / "bench" / digest.hexdigest()
    made = "model.onnx" if name == "onnxruntime" else "model.xml"
    if not (folder / made).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            with _Worker(f"{name}-int8", path=str(source), inputs=specification,
                         output=str(draft / made)):  # fmt: skip
                pass
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder / made


__all__ = ["PEERS", "PRECISIONS", "bench_graph"]
