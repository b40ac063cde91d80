"""What the readers of quantized checkpoints stand on: raw tensors, packed integers, floats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput
from qigen.formats.algebra import Float32Array
from qigen.frontends.settings import shown

Array = npt.NDArray[Any]

NUMPY_TYPES: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U8": "u1", "U16": "<u2", "U32": "<u4", "BOOL": "u1",
    "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1", "F4": "u1",
}  # fmt: skip
"""safetensors' types as numpy has them; those that it has not as their bits."""

_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor of a safetensors file, whatever its type: ``data`` are its mapped bytes."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    def array(self) -> Array:
        """The numbers, mapped and not copied, in the type of :data:`NUMPY_TYPES`."""
        return self.data.view(NUMPY_TYPES[self.dtype]).reshape(self.shape)

    def bad(self, problem: str) -> BadInput:
        """The error of this tensor."""
        return BadInput(f"tensor '{shown(self.name)}' {problem}", str(self.file))

    def expect(self, shape: tuple[int, ...], *dtypes: str) -> RawTensor:
        """The tensor itself; BadInput unless it has one of the types, and the shape."""
        if self.dtype not in dtypes:
            raise self.bad(f"has the type {shown(self.dtype)}, expected {' or '.join(dtypes)}")
        if self.shape != shape:
            raise self.bad(f"has the shape {list(self.shape)}, expected {list(shape)}")
        return self

    def floats(self) -> Float32Array:
        """float32: the numbers, each exactly; BadInput for other types, NaN and infinity."""
        if self.dtype not in _FLOATS:
            raise self.bad(f"has the type {shown(self.dtype)}, expected {' or '.join(_FLOATS)}")
        values = self.array()
        if self.dtype == "BF16":
            values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        result: Float32Array = values.astype(np.float32)
        wrong = ~np.isfinite(result)
        if wrong.any():
            place = [int(i) for i in np.argwhere(wrong)[0]]
            raise self.bad(
                f"holds a NaN or an infinity at {place}; the file is damaged, quantize again"
            )
        return result


class Module:
    """The tensors of one linear layer, by what follows its name: ``qweight``, ``scales``, ..."""

    def __init__(self, name: str, tensors: Mapping[str, RawTensor]) -> None:
        self.name = name
        self.tensors = tensors
        self.used: set[str] = set()

    def has(self, part: str) -> bool:
        """Whether the layer has a tensor called ``part``."""
        return f"{self.name}.{part}" in self.tensors

    def get(self, part: str, other: str) -> RawTensor:
        """The tensor called ``part``; BadInput naming it (and what it belongs to) if it is gone."""
        name = f"{self.name}.{part}"
        if name not in self.tensors:
            raise BadInput(
                f"tensor '{shown(name)}' is missing, and '{shown(self.name)}.{other}' cannot be "
                "read without it",
                str(self.tensors[f"{self.name}.{other}"].file),
            )
        self.used.add(name)
        return self.tensors[name]


def modules(tensors: Mapping[str, RawTensor], part: str) -> Iterator[Module]:
    """The layers that have a tensor called ``part``."""
    for name in tensors:
        if name.endswith(f".{part}"):
            yield Module(name.removesuffix(f".{part}"), tensors)
