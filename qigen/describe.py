"""What is in a model file, a Hugging Face folder or an artifact, as plain data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qigen.artifact import Artifact
from qigen.errors import BadInput, Unsupported
from qigen.formats.catalog import CATALOG
from qigen.frontends.gguf import load_gguf, read_gguf
from qigen.frontends.huggingface import load_huggingface
from qigen.frontends.model import LanguageModel

_SHOWN_NUMBERS = 8  # of an array in the metadata


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``qigen inspect --json`` prints.

    'kind' is "artifact", "gguf" or "huggingface". All have 'name', 'tensors' (name, format, shape,
    bytes), 'formats' (the same by format: tensors, weights, bytes) and 'config'. A sound GGUF file
    that cannot be compiled has a 'problem' instead of a 'config'. Raises BadInput for anything else
    and for damaged files, Unsupported for folders of unknown models.
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
    return _gguf(path)


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
            "gguf": row.ggml_type is not None,
            "source": row.source,
        }
        for row in CATALOG.values()
    ]


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
            "shape": [
                sum(part["shape"][0] for part in tensor["parts"]),
                *tensor["parts"][0]["shape"][1:],
            ],
            "bytes": tensor["bytes"],
        }
        for tensor in artifact.tensors.values()
    ]
    return {
        "kind": "artifact",
        "path": str(path),
        "name": manifest["name"],
        "config": manifest["config"],
        "formats": _by_format(tensors),
        "tensors": tensors,
        "manifest": manifest,
    }


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


def _huggingface(path: Path) -> dict[str, Any]:
    model = load_huggingface(path)
    tensors = [
        {
            "name": tensor.name,
            "format": tensor.format.name,
            "shape": list(tensor.shape),
            "bytes": len(tensor.data),
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
