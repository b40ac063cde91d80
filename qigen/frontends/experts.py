"""Tensors that hold something of every expert, as one tensor an expert.

Containers stack the matrices of a layer's experts in one tensor of three dimensions, and their
biases in one of two. The model binds each expert's by its number: ``NAME.3.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from qigen.errors import BadInput
from qigen.formats.blocks import from_blocks
from qigen.formats.catalog import by_name
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends.checkpoints.raw import RawTensor
from qigen.frontends.model import Bytes, SourceTensor
from qigen.frontends.settings import shown

_GGUF = re.compile(r"(.*_exps)\.(weight|bias)")
_OLD_GGUF = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.weight")
_GPT_OSS = re.compile(r"(.*\.mlp\.experts\.(?:gate_up|down)_proj)(_bias|\.\d+|)")
_SINKS = re.compile(r".*\.self_attn\.sinks")


@dataclass(frozen=True, eq=False)
class Transposed(SourceTensor):
    """A matrix [N, K] of floats that lies in its file as [K, N]."""

    def load(self, first: int, last: int) -> QuantizedTensor:
        """Rows ``[first, last)``, which are columns of what is stored."""
        n, k = self.shape
        size = self.data.size // (n * k)
        part = self.data.reshape(k, n, size)[:, first:last].transpose(1, 0, 2)
        raw = np.ascontiguousarray(part).reshape(last - first, k * size)
        missing = -k % self.format.block * size
        return from_blocks(self.format, np.pad(raw, ((0, 0), (0, missing))), (last - first, k))


def _slices(name: str, shape: tuple[int, ...], data: Bytes) -> Iterator[tuple[str, Bytes]]:
    """Of every expert the name for messages and its bytes."""
    each = data.size // shape[0]
    for i in range(shape[0]):
        yield f"{name}[{i}]", data[i * each : (i + 1) * each]


def _check_count(name: str, shape: tuple[int, ...], rank: int, count: int, where: str) -> None:
    if len(shape) != rank or min(shape) < 1:
        raise BadInput(
            f"tensor '{shown(name)}' has the shape {list(shape)}, expected {rank} dimensions, "
            "those of every expert",
            where,
        )
    if shape[0] != count:
        raise BadInput(
            f"tensor '{shown(name)}' holds {shape[0]} experts, but the configuration says {count}",
            where,
        )


def of_gguf(
    name: str, shape: tuple[int, ...], data: Bytes, count: int, where: str
) -> tuple[str, tuple[int, ...], list[tuple[str, Bytes]]] | None:
    """What a tensor of a GGUF file holds of every expert: (name with ``{}`` for the number, shape
    of one, names for messages and bytes). None if it is no tensor of experts.

    Raises BadInput, naming it, if it holds other than ``count`` experts.
    """
    found = _GGUF.fullmatch(name) if count else None
    if found is None:
        return None
    _check_count(name, shape, 3 if found[2] == "weight" else 2, count, where)
    return f"{found[1]}.{{}}.{found[2]}", shape[1:], list(_slices(name, shape, data))


def renamed_gguf(name: str) -> str:
    """The name of an expert's matrix in files from before they were stacked, else ``name``."""
    return _OLD_GGUF.sub(r"\1_exps.\2.weight", name)


def renamed_gpt_oss(name: str) -> str:
    """A tensor of gpt-oss with the ending ``.weight`` that other families have."""
    matrix = _GPT_OSS.fullmatch(name)
    if _SINKS.fullmatch(name) or (matrix and matrix[2][:1] == "."):
        return f"{name}.weight"
    return name


def unstacked_gpt_oss(
    tensors: Mapping[str, RawTensor], count: int
) -> tuple[dict[str, RawTensor], dict[str, SourceTensor]]:
    """The tensors of a gpt-oss folder with the biases of experts apart, and the matrices of its
    experts where they are floats: those are stored as ``[E, K, N]``.

    Raises BadInput, naming the tensor, if one holds other than ``count`` experts.
    """
    rest: dict[str, RawTensor] = {}
    matrices: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        found = _GPT_OSS.fullmatch(name)
        if found is None or found[2][:1] == ".":
            rest[name] = tensor
            continue
        _check_count(name, tensor.shape, 2 if found[2] else 3, count, str(tensor.file))
        for i, (told, data) in enumerate(_slices(name, tensor.shape, tensor.data)):
            if found[2]:
                rest[f"{found[1]}.{i}.bias"] = replace(
                    tensor, name=told, shape=tensor.shape[1:], data=data
                )
                continue
            if tensor.dtype not in ("F32", "F16", "BF16"):
                raise tensor.bad(f"has the type {shown(tensor.dtype)}, expected floats")
            k, n = tensor.shape[1:]
            row = by_name(tensor.dtype.lower())
            matrices[f"{found[1]}.{i}.weight"] = Transposed(tensor.file, told, (n, k), row, data)
    return rest, matrices
