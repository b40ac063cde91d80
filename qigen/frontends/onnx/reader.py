"""Reading of ONNX files: protobuf, external data, checks; nothing is understood yet."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
import onnx.checker
import onnx.external_data_helper
import onnx.inliner
from google.protobuf.message import DecodeError

from qigen.errors import BadInput, Unsupported

MIN_OPSET, MAX_OPSET = 7, onnx.defs.onnx_opset_version()
DOMAINS = ("", "ai.onnx", "com.microsoft")


def read_model(path: str | Path) -> onnx.ModelProto:
    """The model in a file, with its external data, checked and with its own functions inlined.

    Raises BadInput for a damaged file, external data that is missing or lies outside of the file's
    folder, cycles, undefined inputs and wrong attributes; Unsupported for opsets and domains that
    are not known.
    """
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
    return prepare_model(model, path)


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
    _load_external_data(model, path)
    try:
        onnx.checker.check_model(model, full_check=False)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        message = _first_line(error)
        if "No Op registered" in message or "No opset import" in message:
            message = f"an operator is not known in its opset: {message}"
            raise Unsupported(message, where) from None
        raise BadInput(f"the model contradicts itself: {message}", where) from None
    if model.functions:
        try:
            model = onnx.inliner.inline_local_functions(model)
        except Exception as error:  # the inliner raises what its C++ raises
            raise BadInput(f"its functions cannot be inlined: {_first_line(error)}", where) from None
    return model


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
    """Bring external tensors into memory. Files must lie in or below the model's folder."""
    folder = path.resolve().parent
    for tensor in onnx.external_data_helper._get_all_tensors(model):
        if not onnx.external_data_helper.uses_external_data(tensor):
            continue
        info = onnx.external_data_helper.ExternalDataInfo(tensor)
        file = Path(info.location)
        resolved = (folder / file).resolve()
        if file.is_absolute() or not resolved.is_relative_to(folder):
            raise BadInput(
                f"tensor {tensor.name} asks for data outside of the model's folder "
                f"({info.location}); this is refused",
                str(path),
            )
        if not resolved.is_file():
            raise BadInput(
                f"the external data of tensor {tensor.name} is missing: put {info.location} "
                "beside the model",
                str(path),
            )
        try:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except Exception as error:  # ValueError, OSError or the checker's
            raise BadInput(
                f"the external data of tensor {tensor.name} cannot be read: {_first_line(error)}",
                str(path),
            ) from None
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
