"""Weight formats: the algebra, the catalog of rows, source blocks and the execution layout."""

from __future__ import annotations

from qigen.formats.algebra import Field, Format, QuantizedTensor, Run, validate
from qigen.formats.blocks import from_blocks, to_blocks
from qigen.formats.catalog import CATALOG, by_ggml_type, by_name
from qigen.formats.layout import (
    Layout,
    Plane,
    field_offsets,
    field_planes,
    kblock_bytes,
    pack,
    packed_shape,
    planes,
    unpack,
)

__all__ = [
    "CATALOG",
    "Field",
    "Format",
    "Layout",
    "Plane",
    "QuantizedTensor",
    "Run",
    "by_ggml_type",
    "by_name",
    "field_offsets",
    "field_planes",
    "from_blocks",
    "kblock_bytes",
    "pack",
    "packed_shape",
    "planes",
    "to_blocks",
    "unpack",
    "validate",
]
