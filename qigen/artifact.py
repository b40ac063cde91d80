"""The artifact: a folder with the compiled model, its packed weights and a manifest.

``weights.bin`` begins with a 4 KiB header (magic, ABI version, size, the model's uid, CRC-32) that
the runtime checks at load; then come the tensors, each on a 64-byte line. ``manifest.json`` says
what every tensor was, so that a packed weight can be unpacked again without loss.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qigen.backends.cuda.prefill import GemmForm
from qigen.codegen.lower import PackedTensor, align
from qigen.errors import BadInput
from qigen.formats.blocks import to_blocks
from qigen.formats.catalog import by_name
from qigen.formats.layout import Layout, pack, packed_bytes, packed_shape, shared_bytes, unpack
from qigen.formats.tensor import QuantizedTensor
from qigen.ir.graph import (
    Constant,
    constant_bytes,
    constant_format,
    constant_shape,
    load_constant,
)

ABI_VERSION = 2
"""QIGEN_ABI_VERSION of runtime/include/qigen.h."""

MAGIC = b"QIGENWB1"
HEADER_BYTES = 4096
MANIFEST_VERSION = 1

_HEADER = struct.Struct("<8sIIQ32s")

Progress = Callable[[str, int, int], None]


def tensor_bytes(tensor: PackedTensor, constants: Mapping[str, Constant]) -> int:
    """Bytes of a tensor in weights.bin, before alignment."""
    if tensor.raw:
        return constant_bytes(constants[tensor.parts[0]])
    shapes = [constant_shape(constants[part]) for part in tensor.parts]
    if tensor.form is not None:
        return tensor.form.nbytes((shapes[0][0], shapes[0][1]))
    if tensor.spec is None:
        return 4 * align(shapes[0][0], 16)
    spec = tensor.spec
    return sum(packed_bytes(spec.format, (s[0], s[1]), spec.layout) for s in shapes)


def place_tensors(
    tensors: Sequence[PackedTensor], constants: Mapping[str, Constant]
) -> tuple[dict[str, int], int]:
    """(byte offset of every tensor in weights.bin, size of the file)."""
    offsets: dict[str, int] = {}
    at = HEADER_BYTES
    for tensor in tensors:
        offsets[tensor.name] = at
        at = align(at + tensor_bytes(tensor, constants))
    return offsets, align(at, HEADER_BYTES)


class TensorUnion:
    """The tensors of several programs that read one weights.bin: equal ones lie there once.

    ``tensors`` and ``size`` (bytes of the file) are those of all programs so far.
    """

    def __init__(self, constants: Mapping[str, Constant]) -> None:
        self.tensors: list[PackedTensor] = []
        self.size = HEADER_BYTES
        self._constants = constants

    def add(self, tensors: Sequence[PackedTensor], isa: str) -> dict[str, int]:
        """The byte offset of each tensor of a program, by its name in that program; what is stored
        in another way already is called ``NAME@ISA`` here."""
        places = {self._stored(tensor): tensor.name for tensor in self.tensors}
        names = {tensor.name for tensor in self.tensors}
        for tensor in tensors:
            if self._stored(tensor) not in places:
                name = f"{tensor.name}@{isa}" if tensor.name in names else tensor.name
                self.tensors.append(dataclasses.replace(tensor, name=name))
                places[self._stored(tensor)] = name
        offsets, self.size = place_tensors(self.tensors, self._constants)
        return {tensor.name: offsets[places[self._stored(tensor)]] for tensor in tensors}

    @staticmethod
    def _stored(tensor: PackedTensor) -> object:
        """What makes two tensors the same bytes."""
        spec = tensor.spec and (tensor.spec.format.name, tensor.spec.layout)
        return tensor.parts, tensor.raw, spec, tensor.form


def pack_tensor(
    tensor: PackedTensor, constants: Mapping[str, Constant]
) -> npt.NDArray[np.uint8]:
    """uint8: the tensor as it lies in weights.bin."""
    if tensor.raw:
        array = load_constant(constants[tensor.parts[0]])
        assert isinstance(array, np.ndarray), tensor.name
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if tensor.form is not None:
        matrix = load_constant(constants[tensor.parts[0]])
        assert isinstance(matrix, QuantizedTensor), tensor.name
        return tensor.form.pack(matrix)
    if tensor.spec is None:
        vector = np.asarray(load_constant(constants[tensor.parts[0]]), np.float32)
        out = np.zeros(align(len(vector), 16), np.float32)
        out[: len(vector)] = vector
        return out.view(np.uint8)
    packed = []
    shared: list[npt.NDArray[np.uint8]] = []
    for part in tensor.parts:
        data = load_constant(constants[part])
        assert isinstance(data, QuantizedTensor), part
        start = shared_bytes(tensor.spec.format, data.shape[1], tensor.spec.layout)
        rows, _, _ = packed_shape(tensor.spec.format, data.shape, tensor.spec.layout)
        whole = pack(data, tensor.spec.layout)
        if len(tensor.parts) == 1:
            return whole
        shared.append(whole[:start])
        packed.append(whole[start:].reshape(rows, -1))
    return np.concatenate([*shared, np.stack(packed, axis=1).reshape(-1)])


def write_weights(
    stream: BinaryIO,
    tensors: Sequence[PackedTensor],
    constants: Mapping[str, Constant],
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write weights.bin but for its header; returns the BLAKE2b hash of every tensor."""
    offsets, size = place_tensors(tensors, constants)
    hashes: dict[str, str] = {}
    stream.truncate(size)
    for done, tensor in enumerate(tensors):
        data = pack_tensor(tensor, constants)
        stream.seek(offsets[tensor.name])
        stream.write(data.tobytes() if not data.flags.c_contiguous else data.data)
        hashes[tensor.name] = hashlib.blake2b(data.data, digest_size=16).hexdigest()
        if progress:
            progress("pack", done + 1, len(tensors))
    return hashes


def write_header(stream: BinaryIO, size: int, uid: bytes) -> None:
    """Write the header of weights.bin."""
    head = _HEADER.pack(MAGIC, ABI_VERSION, HEADER_BYTES, size, uid)
    stream.seek(0)
    stream.write(head + struct.pack("<I", zlib.crc32(head)))


def describe_tensors(
    tensors: Sequence[PackedTensor],
    constants: Mapping[str, Constant],
    hashes: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The manifest's entries of the tensors."""
    offsets, _ = place_tensors(tensors, constants)
    entries = []
    for tensor in tensors:
        parts = []
        for part in tensor.parts:
            data = constants[part]
            entry: dict[str, Any] = {"name": part, "shape": list(constant_shape(data))}
            source = getattr(data, "source", None)
            if source is not None:
                entry["source"] = {"tensor": source.tensor, "rows": list(source.rows)}
            parts.append(entry)
        entry = {
            "name": tensor.name,
            "parts": parts,
            "format": (
                tensor.form.name
                if tensor.form
                else tensor.spec.format.name
                if tensor.spec
                else constant_format(constants[tensor.parts[0]])
                if tensor.raw
                else "vector"
            ),
            "offset": offsets[tensor.name],
            "bytes": tensor_bytes(tensor, constants),
            "blake2b": hashes[tensor.name],
        }
        if tensor.form:
            entry["packed_by_backend"] = tensor.form.format.name
            entry["packed_for"] = tensor.form.activations
        if tensor.spec:
            entry["layout"] = {"rows": tensor.spec.layout.rows, "blocks": tensor.spec.layout.blocks}
        entries.append(entry)
    return entries


def _sealed(body: bytes) -> bytes:
    """A manifest without its last brace, completed by an entry with the hash of all before it."""
    digest = hashlib.blake2b(body, digest_size=16).hexdigest()
    return body + f',\n "blake2b": "{digest}"\n}}\n'.encode()


_SEAL_BYTES = len(_sealed(b""))


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json with a checksum of itself."""
    body = json.dumps(manifest, indent=1).removesuffix("\n}")
    (folder / "manifest.json").write_bytes(_sealed(body.encode()))


class Artifact:
    """A compiled model on disk.

    Raises BadInput when the folder is no artifact or its manifest is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        where = str(self.path)
        file = self.path / "manifest.json"
        if not file.is_file():
            raise BadInput("there is no manifest.json: this is no artifact of qigen", where)
        try:
            text = file.read_bytes()
            self.manifest: dict[str, Any] = json.loads(text)
            version = self.manifest["manifest_version"]
            self.tensors: dict[str, dict[str, Any]] = {
                t["name"]: t for t in self.manifest["tensors"]
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise BadInput("the manifest is damaged; compile the model again", str(file)) from None
        if version != MANIFEST_VERSION:
            raise BadInput(
                f"the manifest has version {version}, this qigen reads {MANIFEST_VERSION}; "
                "compile the model again",
                str(file),
            )
        if text != _sealed(text[:-_SEAL_BYTES]):
            raise BadInput(
                "the manifest differs from its checksum; compile the model again", str(file)
            )

    @property
    def is_graph(self) -> bool:
        """Whether it is a model of named tensors, not a language model."""
        return self.manifest.get("kind") == "graph"

    @property
    def weights_path(self) -> Path:
        """The packed weights."""
        return self.path / "weights.bin"

    def explain(self) -> list[dict[str, Any]]:
        """What was chosen for every matrix, and why (the manifest's plan).

        The entries of a language model are those of ``ir/plan.py``, with the runners-up; of a graph
        'node', 'kernel' and what that kernel is about.
        """
        kernels: list[dict[str, Any]] = self.manifest["plan"]["kernels"]
        return kernels

    def verify(self, progress: Progress | None = None) -> None:
        """Check every file and tensor against its checksum.

        BadInput names the first that differs.
        """
        for name, expected in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                raise BadInput("the file is missing; compile the model again", str(file))
            if name != "weights.bin" and _hash_file(file) != expected["blake2b"]:
                raise BadInput("the file was changed; compile the model again", str(file))
        data = self._map()
        header = bytes(data[: _HEADER.size])
        (crc,) = struct.unpack("<I", bytes(data[_HEADER.size : _HEADER.size + 4]))
        uid = bytes.fromhex(self.manifest["model_uid"])
        expected_header = _HEADER.pack(MAGIC, ABI_VERSION, HEADER_BYTES, len(data), uid)
        if header != expected_header or crc != zlib.crc32(header):
            raise BadInput("the header is damaged; compile the model again", str(self.weights_path))
        end = HEADER_BYTES
        gaps = [(_HEADER.size + 4, HEADER_BYTES)]
        for done, (name, tensor) in enumerate(self.tensors.items()):
            start, stop = tensor["offset"], tensor["offset"] + tensor["bytes"]
            content = data[start:stop]
            if hashlib.blake2b(content.data, digest_size=16).hexdigest() != tensor["blake2b"]:
                raise BadInput(
                    f"tensor {name} differs from its checksum; compile the model again",
                    str(self.weights_path),
                )
            gaps.append((end, start))
            end = stop
            if progress:
                progress("verify", done + 1, len(self.tensors))
        gaps.append((end, len(data)))
        if any(data[a:b].any() for a, b in gaps):
            raise BadInput("a byte between two tensors was changed; compile the model again",
                           str(self.weights_path))

    def _map(self) -> npt.NDArray[np.uint8]:
        expected = self.manifest["files"]["weights.bin"]["bytes"]
        size = self.weights_path.stat().st_size
        if size != expected:
            raise BadInput(
                f"it has {size} bytes instead of {expected}; compile the model again",
                str(self.weights_path),
            )
        return np.memmap(self.weights_path, np.uint8, mode="r")

    def unpack(self, name: str) -> QuantizedTensor:
        """A matrix of the model by its own name, in its own codes, from the packed weights.

        Raises BadInput if there is no such matrix.
        """
        for tensor in self.tensors.values():
            names = [part["name"] for part in tensor["parts"]]
            if name in names and "packed_by_backend" in tensor:
                rows_, columns = tensor["parts"][0]["shape"]
                data = self._map()[tensor["offset"] : tensor["offset"] + tensor["bytes"]]
                form = GemmForm(by_name(tensor["packed_by_backend"]),
                                tensor.get("packed_for", "f16"))  # fmt: skip
                return form.unpack((rows_, columns), data)
            if name in names and "layout" in tensor:
                fmt, layout = by_name(tensor["format"]), Layout(**tensor["layout"])
                index = names.index(name)
                shape = (tensor["parts"][index]["shape"][0], tensor["parts"][index]["shape"][1])
                data = self._map()[tensor["offset"] : tensor["offset"] + tensor["bytes"]]
                rows, _, _ = packed_shape(fmt, shape, layout)
                start = shared_bytes(fmt, shape[1], layout)
                mine = data[len(names) * start :].reshape(rows, len(names), -1)[:, index]
                shared = data[index * start : (index + 1) * start]
                return unpack(fmt, shape, layout, np.concatenate([shared, mine.reshape(-1)]))
        raise BadInput(f"there is no matrix {name}; see `qigen inspect`", str(self.path))

    def source_blocks(self, name: str) -> npt.NDArray[np.uint8]:
        """uint8 [N, bytes of a row]: the matrix as the source file had it."""
        return to_blocks(self.unpack(name))


def file_entry(file: Path) -> dict[str, Any]:
    """Size and checksum of a file for the manifest; weights.bin has its tensors' instead."""
    entry: dict[str, Any] = {"bytes": file.stat().st_size}
    if file.name != "weights.bin":
        entry["blake2b"] = _hash_file(file)
    return entry


def _hash_file(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
