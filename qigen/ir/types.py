"""Element types of tensors: one row a type, with its name in numpy, C++, qigen.h and ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from qigen.errors import Unsupported


@dataclass(frozen=True)
class ElementType:
    """``number`` is the type's in qigen.h, ``onnx`` that of onnx.TensorProto; ``c`` its C++ type in
    generated code. Types below a byte take a whole one at run time."""

    name: str
    numpy: np.dtype[Any]
    c: str
    number: int
    onnx: int

    @property
    def bytes(self) -> int:
        """Bytes of an element in memory."""
        return int(self.numpy.itemsize)

    @property
    def floating(self) -> bool:
        """Whether it has a fraction."""
        return self.name[0] == "f" or self.name == "bf16"


_ROWS: tuple[tuple[str, Any, str, int, int], ...] = (
    ("f32", np.float32, "float", 1, 1),
    ("i32", np.int32, "int32_t", 2, 6),
    ("i64", np.int64, "int64_t", 3, 7),
    ("f64", np.float64, "double", 4, 11),
    ("f16", np.float16, "half", 5, 10),
    ("bf16", ml_dtypes.bfloat16, "bfloat16", 6, 16),
    ("i8", np.int8, "int8_t", 7, 3),
    ("u8", np.uint8, "uint8_t", 8, 2),
    ("i16", np.int16, "int16_t", 9, 5),
    ("u16", np.uint16, "uint16_t", 10, 4),
    ("u32", np.uint32, "uint32_t", 11, 12),
    ("u64", np.uint64, "uint64_t", 12, 13),
    ("bool", np.bool_, "bool", 13, 9),
    ("f8e4m3fn", ml_dtypes.float8_e4m3fn, "f8e4m3fn", 14, 17),
    ("f8e4m3fnuz", ml_dtypes.float8_e4m3fnuz, "f8e4m3fnuz", 15, 18),
    ("f8e5m2", ml_dtypes.float8_e5m2, "f8e5m2", 16, 19),
    ("f8e5m2fnuz", ml_dtypes.float8_e5m2fnuz, "f8e5m2fnuz", 17, 20),
    ("f8e8m0", ml_dtypes.float8_e8m0fnu, "f8e8m0", 18, 24),
    ("f4e2m1", ml_dtypes.float4_e2m1fn, "f4e2m1", 19, 23),
    ("i4", ml_dtypes.int4, "int4", 20, 22),
    ("u4", ml_dtypes.uint4, "uint4", 21, 21),
    ("i2", ml_dtypes.int2, "int2", 22, 26),
    ("u2", ml_dtypes.uint2, "uint2", 23, 25),
)

TYPES: dict[str, ElementType] = {
    name: ElementType(name, np.dtype(numpy), c, number, onnx)
    for name, numpy, c, number, onnx in _ROWS
}

PACKED_BITS = {"i4": 4, "u4": 4, "f4e2m1": 4, "i2": 2, "u2": 2}
"""Bits of an element in files where several share a byte."""

_BY_NUMPY = {t.numpy: t for t in TYPES.values()}
_BY_ONNX = {t.onnx: t for t in TYPES.values()}


def of_array(array: np.ndarray[Any, Any], where: str = "") -> ElementType:
    """The type of a numpy array; Unsupported if tensors cannot have it."""
    found = _BY_NUMPY.get(array.dtype)
    if found is None:
        raise Unsupported(f"tensors of {array.dtype} have no kernels", where)
    return found


def of_onnx(number: int, where: str = "") -> ElementType:
    """The type with a number of onnx.TensorProto; Unsupported if there is none (strings, ...)."""
    found = _BY_ONNX.get(number)
    if found is None:
        import onnx

        names = {v: k for k, v in onnx.TensorProto.DataType.items()}
        raise Unsupported(f"tensors of {names.get(number, number)} have no kernels", where)
    return found
