"""Reading of ONNX files: protobuf, external data, checks; nothing is understood yet."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import onnx.checker
import onnx.external_data_helper
import onnx.inliner
from google.protobuf.message import (  # type: ignore[import-untyped, unused-ignore]
    DecodeError,
    Message,
)

from qigen.errors import BadInput, Unsupported
from qigen.ir.types import PACKED_BITS, of_onnx

MIN_OPSET, MAX_OPSET = 7, onnx.defs.onnx_opset_version()
MAX_INLINED_NODES = 1_000_000
MAX_CALL_DEPTH = 64
DOMAINS = ("", "ai.onnx", "com.microsoft")


def read_model(path: str | Path) -> onnx.ModelProto:
    """The model in a file, with its external data, checked and with its own functions inlined.

    Raises BadInput for a damaged file, external data that is missing or lies outside of the file's
    folder, cycles, undefined inputs and wrong attributes; Unsupported for opsets and domains that
    are not known.
    """
    return prepare_model(parse_model(path), Path(path))


def parse_model(path: str | Path) -> onnx.ModelProto:
    """The protobuf in a file, unchecked and without external data. BadInput if there is none."""
    path = Path(path)
    where = str(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"it cannot be read: {error.strerror}", where) from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, ValueError, RecursionError) as error:
        raise BadInput(
            f"it is no ONNX model or is truncated ({_first_line(error)}); export it again", where
        ) from None
    if not model.HasField("graph") or (not model.graph.node and not model.graph.output):
        raise BadInput("it is no ONNX model: there is no graph in it", where)
    if not _is_text(model):
        raise BadInput("a name in it is no text; the file is damaged, export it again", where)
    return model


def _is_text(message: Any) -> bool:
    """Whether all strings of a protobuf are UTF-8: the others are bytes to Python."""
    for field, value in message.ListFields():
        rows = [value] if isinstance(value, (str, bytes, Message)) else value
        if field.type == field.TYPE_STRING and not all(isinstance(row, str) for row in rows):
            return False
        if field.type == field.TYPE_MESSAGE and not all(map(_is_text, rows)):
            return False
    return True


def prepare_model(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """As :func:`read_model`, for a model that is in memory; ``path`` is where it came from."""
    where = str(path)
    versions = opsets(model)
    version = versions.get("", 0)
    if version and not MIN_OPSET <= version <= MAX_OPSET:
        raise Unsupported(
            f"opset {version} is not supported; export the model with opset {MIN_OPSET} to "
            f"{MAX_OPSET}",
            where,
        )
    for domain, number in versions.items():
        if not 0 < number < 1 << 31:
            raise BadInput(f"opset {number} of {domain or 'ai.onnx'} cannot be", where)
    _load_external_data(model, path)
    try:
        onnx.checker.check_model(model, full_check=False)
    except MemoryError:
        raise
    except Exception as error:  # ValidationError, InferenceError, what its C++ raises
        message = _first_line(error)
        if "No Op registered" in message or "No opset import" in message:
            message = f"an operator is not known in its opset: {message}"
            raise Unsupported(message, where) from None
        raise BadInput(f"the model contradicts itself: {message}", where) from None
    if model.functions:
        _check_functions(model, where)
        try:
            model = onnx.inliner.inline_local_functions(model)
        except Exception as error:  # the inliner raises what its C++ raises
            message = f"its functions cannot be inlined: {_first_line(error)}"
            raise BadInput(message, where) from None
    return model


def _check_functions(model: onnx.ModelProto, where: str) -> None:
    """Refuse functions that call themselves, or each other so often that nothing can hold them."""
    bodies = {(f.domain, f.name, f.overload): f.node for f in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}
    open_calls: set[tuple[str, str, str]] = set()

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            total += called(key) if key in bodies else 1
            total += sum(size(a.g.node) for a in node.attribute if a.HasField("g"))
            if total > MAX_INLINED_NODES:
                raise Unsupported(
                    f"its functions would become more than {MAX_INLINED_NODES} nodes", where
                )
        return total

    def called(key: tuple[str, str, str]) -> int:
        if key in open_calls:
            raise BadInput(f"function {_shown(key[1])} calls itself", where)
        if len(open_calls) > MAX_CALL_DEPTH:
            raise Unsupported(f"functions call each other more than {MAX_CALL_DEPTH} deep", where)
        if key not in sizes:
            open_calls.add(key)
            sizes[key] = size(bodies[key])
            open_calls.remove(key)
        return sizes[key]

    size(model.graph.node)
    for key in bodies:
        called(key)


def opsets(model: onnx.ModelProto) -> dict[str, int]:
    """Version of every operator set that the model imports; the default domain is ''."""
    return {
        "" if entry.domain == "ai.onnx" else entry.domain: entry.version
        for entry in model.opset_import
    }


def checksum(model: onnx.ModelProto) -> str:
    """SHA-256 of the model as read, external data included."""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _load_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Bring external tensors into memory. Files must lie in or below the model's folder.

    No more is read than a tensor's shape asks for, so that no file can be read many times over.
    """
    folder = path.resolve().parent
    for tensor in onnx.external_data_helper._get_all_tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        fields = {entry.key: entry.value for entry in tensor.external_data}
        file = _external_file(tensor, folder, fields.get("location", ""), str(path))
        expected = _stored_bytes(tensor, str(path))
        try:
            offset = int(fields.get("offset") or 0)
            length = int(fields.get("length") or expected)
        except ValueError:
            offset = length = -1
        if offset < 0 or length != expected:
            raise BadInput(
                f"the external data of tensor {_shown(tensor.name)} does not fit its shape: "
                f"{expected} bytes, not {_shown(fields.get('length', ''))} from "
                f"{_shown(fields.get('offset', ''))}",
                str(path),
            )
        data = b""
        try:
            with file.open("rb") as stream:
                if offset + length <= file.stat().st_size:
                    stream.seek(offset)
                    data = stream.read(length)
        except OSError as error:
            raise BadInput(f"it cannot be read: {error.strerror}", str(file)) from None
        if len(data) != length:
            raise BadInput(
                f"it is too short for tensor {_shown(tensor.name)}: {length} bytes from {offset}",
                str(file),
            )
        tensor.raw_data = data
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _external_file(tensor: onnx.TensorProto, folder: Path, location: str, where: str) -> Path:
    """The file that a location names, links followed; BadInput if it is not in the folder."""
    shown = _shown(location)
    try:
        file = (folder / location).resolve()
        inside = not Path(location).is_absolute() and file.is_relative_to(folder)
        found = inside and file.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, links in a circle
        inside, found = True, False
    if not inside:
        raise BadInput(
            f"tensor {_shown(tensor.name)} asks for data outside of the model's folder ({shown}); "
            "this is refused",
            where,
        )
    if not found:
        raise BadInput(
            f"the external data of tensor {_shown(tensor.name)} is missing: put {shown or 'it'} "
            "beside the model",
            where,
        )
    return file


def _stored_bytes(tensor: onnx.TensorProto, where: str) -> int:
    """Bytes of a tensor in a file."""
    element = of_onnx(tensor.data_type, f"tensor {_shown(tensor.name)}")
    if any(size < 0 for size in tensor.dims):
        raise BadInput(f"tensor {_shown(tensor.name)} has a negative size", where)
    bits = PACKED_BITS.get(element.name, 8 * element.bytes)
    return (math.prod(int(size) for size in tensor.dims) * bits + 7) // 8


def _shown(text: str) -> str:
    """What a file says, fit for a message."""
    printable = "".join(c if c.isprintable() else "?" for c in text[:80])
    return printable + ("..." if len(text) > 80 else "")
