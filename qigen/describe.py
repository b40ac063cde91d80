"""What is in a model file, a Hugging Face folder or an artifact, as plain data."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qigen import targets
from qigen.artifact import Artifact
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.matmul import INTEGER_ACTIVATIONS
from qigen.backends.cuda import gemm, gemv
from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import Format
from qigen.formats.catalog import CATALOG
from qigen.frontends.gguf import load_gguf, read_gguf
from qigen.frontends.huggingface import load_huggingface
from qigen.frontends.model import LanguageModel
from qigen.frontends.onnx import import_model
from qigen.frontends.onnx.reader import opsets, parse_model, prepare_model
from qigen.graph_compiler import is_onnx
from qigen.ir.types import PACKED_BITS, of_onnx
from qigen.quantize.rtn import check_rounding

_SHOWN_NUMBERS = 8  # of an array in the metadata


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``qigen inspect --json`` prints.

    'kind' is "artifact", "gguf", "huggingface" or "onnx". All have 'name', 'tensors' (name, format,
    shape, bytes), 'formats' (the same by format: tensors, weights, bytes) and 'config' (null for
    what is no language model). ONNX files, and artifacts of them, have 'inputs', 'outputs' and
    'operators'. A sound file that cannot be compiled has a 'problem'. Raises BadInput for anything
    else and for damaged files, Unsupported for folders of unknown models.
    """
    path = Path(path)
    if path.is_dir() and (path / "manifest.json").is_file():
        return _artifact(path)
    if path.is_dir() and (path / "config.json").is_file():
        return _huggingface(path)
    if path.is_dir():
        raise BadInput(
            "the folder is neither an artifact (manifest.json) nor a Hugging Face model "
            "(config.json)",
            str(path),
        )
    return _onnx(path) if is_onnx(path) else _gguf(path)


def formats() -> list[dict[str, Any]]:
    """The rows of the format catalog, as ``qigen formats --json`` prints them."""
    return [
        {
            "name": row.name,
            "bits_per_weight": row.bits_per_weight,
            "code_bits": row.code_bits,
            "block": row.block,
            "group": row.group,
            "map": row.map_kind,
            "scale": row.scale_kind,
            "zero": row.zero_kind,
            "sparsity": row.sparsity,
            "activations": ["f32", "bf16", *(INTEGER_ACTIVATIONS if row.integer else ())],
            "isas": list(ISAS),
            "gpu": _on_gpu(row),
            "rounding": _rounds(row),
            "gguf": row.ggml_type is not None,
            "source": row.source,
        }
        for row in CATALOG.values()
    ]


def _on_gpu(row: Format) -> list[str]:
    """The kernels that GPUs have for the format: products of few rows, of many on tensor cores from
    the codes themselves or (halves-gemm) from halves made of them, of many in int8 and int4."""
    there = gemv.supports(row)
    kernels = {"gemv": there, "gemm": gemm.supports(row),
               "halves-gemm": there and not gemm.supports(row),
               "gemm-int8": gemm.supports(row, "s8"), "gemm-int4": gemm.supports(row, "s4")}
    return [name for name, has in kernels.items() if has]


def _rounds(row: Format) -> bool:
    """Whether ``--weights`` can round to the format."""
    try:
        check_rounding(row, row.block)
    except Unsupported:
        return False
    return True


def _by_format(tensors: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Number of tensors, weights and bytes of every format, the largest first."""
    totals: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        total = totals.setdefault(tensor["format"], {"tensors": 0, "weights": 0, "bytes": 0})
        total["tensors"] += 1
        total["weights"] += math.prod(tensor["shape"])
        total["bytes"] += tensor["bytes"]
    return dict(sorted(totals.items(), key=lambda item: -item[1]["bytes"]))


def _artifact(path: Path) -> dict[str, Any]:
    artifact = Artifact(path)
    manifest = artifact.manifest
    tensors = [
        {
            "name": " + ".join(part["name"] for part in tensor["parts"]),
            "format": tensor["format"],
            "shape": _joined([part["shape"] for part in tensor["parts"]]),
            "bytes": tensor["bytes"],
        }
        for tensor in artifact.tensors.values()
    ]
    graph = {}
    if artifact.is_graph:
        interface = manifest["interface"]
        graph = {
            "inputs": interface["inputs"],
            "outputs": interface["outputs"],
            "operators": manifest["operators"],
        }
    return {
        "kind": "artifact",
        "path": str(path),
        "name": manifest["name"],
        "config": manifest.get("config"),
        "formats": _by_format(tensors),
        "tensors": tensors,
        **graph,
        "variants": variants(manifest),
        "manifest": manifest,
    }


def variants(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The variants of an artifact, the fastest first: 'target', 'isa', whether this machine takes
    it ('taken') and 'why'. The library decides as this does, when it is loaded."""
    here = targets.native()
    rows: list[dict[str, Any]] = []
    for target in (manifest["target"], *manifest.get("variants", ())):
        lacks = [feature for feature in target["features"] if feature not in here.features]
        # artifacts of older versions do not name these
        platform = (
            target.get("architecture", here.architecture), target.get("system", here.system)
        )  # fmt: skip
        gpu = target.get("gpu")
        if gpu is not None:
            why = (
                f"machine code for {', '.join(gpu['machine_code'])}, PTX of {gpu['ptx']} for later "
                f"GPUs (CUDA {gpu['cuda']}); the driver is opened at load"
            )
        elif platform != (here.architecture, here.system):
            why = f"is for {' '.join(platform)}"
        elif lacks:
            why = f"this machine lacks {', '.join(lacks)}"
        elif any(row["taken"] for row in rows):
            why = "a faster one runs here"
        else:
            why = "this machine has all that it needs"
        taken = why == "this machine has all that it needs"
        rows.append({"target": target["machine"], "isa": target["isa"], "taken": taken, "why": why})
    return rows


def _joined(shapes: list[list[int]]) -> list[int]:
    """The shape of matrices one below the other."""
    if len(shapes) == 1:
        return shapes[0]
    return [sum(shape[0] for shape in shapes), *shapes[0][1:]]


def _gguf(path: Path) -> dict[str, Any]:
    file = read_gguf(path)
    tensors = [
        {
            "name": tensor.name,
            "format": tensor.type.name.lower(),
            "shape": list(tensor.shape),
            "bytes": len(tensor.data),
        }
        for tensor in file.tensors.values()
    ]
    result: dict[str, Any] = {
        "kind": "gguf",
        "path": str(path),
        "name": file.fields.get("general.name", path.stem),
        "architecture": file.fields.get("general.architecture"),
        "config": None,
        "formats": _by_format(tensors),
        "tensors": tensors,
        "metadata": {key: _short(value) for key, value in file.fields.items()},
    }
    try:
        return result | _config(load_gguf(path))
    except (BadInput, Unsupported) as error:
        return result | {"problem": error.message}


def _onnx(path: Path) -> dict[str, Any]:
    model = parse_model(path)
    graph = model.graph
    initial = {tensor.name for tensor in graph.initializer}

    def dtype(number: int) -> str:
        known = number in onnx.TensorProto.DataType.values()
        return str(onnx.TensorProto.DataType.Name(number)).lower() if known else f"type {number}"

    def interface(infos: Iterable[onnx.ValueInfoProto]) -> list[dict[str, Any]]:
        return [
            {
                "name": info.name,
                "dtype": dtype(info.type.tensor_type.elem_type),
                "shape": [
                    d.dim_value if d.HasField("dim_value") else d.dim_param or "?"
                    for d in info.type.tensor_type.shape.dim
                ],
            }
            for info in infos
        ]

    operators: Counter[str] = Counter()
    tensors: list[dict[str, Any]] = []

    def add(name: str, tensor: onnx.TensorProto) -> None:
        bits = _element_bits(tensor.data_type)
        tensors.append(
            {
                "name": name,
                "format": dtype(tensor.data_type),
                "shape": list(tensor.dims),
                "bytes": (math.prod(tensor.dims) * bits + 7) // 8,
            }
        )

    def walk(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            add(tensor.name, tensor)
        for node in graph.node:
            domain = "" if node.domain == "ai.onnx" else node.domain
            operators[f"{domain}.{node.op_type}" if domain else node.op_type] += 1
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    walk(attribute.g)
                if attribute.HasField("t"):
                    add(next(iter(node.output), node.name), attribute.t)

    walk(graph)
    problem = {}
    try:
        import_model(prepare_model(model, path), str(path))
    except (BadInput, Unsupported) as error:
        problem = {"problem": str(error).removeprefix(f"{path}: ")}
    return {
        "kind": "onnx",
        "path": str(path),
        "name": graph.name or path.stem,
        "config": None,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": opsets(model),
        "inputs": interface(i for i in graph.input if i.name not in initial),
        "outputs": interface(graph.output),
        "operators": dict(sorted(operators.items())),
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors),
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "formats": _by_format(tensors),
        "tensors": tensors,
        **problem,
    }


def _element_bits(number: int) -> int:
    """Bits of an element of a type of onnx.TensorProto; 0 of strings and unknown types."""
    try:
        element = of_onnx(number)
    except Unsupported:
        return 0
    return PACKED_BITS.get(element.name, 8 * element.bytes)


def _huggingface(path: Path) -> dict[str, Any]:
    model = load_huggingface(path)
    tensors = [
        {
            "name": tensor.name,
            "format": tensor.format.name,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
        }
        for tensor in model.source_tensors.values()
    ]
    return {
        "kind": "huggingface",
        "path": str(path),
        "name": model.metadata.name,
        "formats": _by_format(tensors),
        "tensors": tensors,
        **_config(model),
    }


def _config(model: LanguageModel) -> dict[str, Any]:
    return {
        "config": model.config.to_json(),
        "parameters": model.parameters(),
        "licence": model.metadata.licence,
        "notes": list(model.metadata.notes),
    }


def _short(value: Any) -> Any:
    """A value of the metadata that JSON can hold; of long lists the length and the first items."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list) and len(value) > _SHOWN_NUMBERS:
        return {"length": len(value), "first": value[:_SHOWN_NUMBERS]}
    return value
