"""Weight formats: the algebra, the catalog of rows, source blocks and the execution layout."""

from __future__ import annotations

from qigen.formats.algebra import Field, Format, Run
from qigen.formats.blocks import from_blocks, to_blocks
from qigen.formats.catalog import (
    CATALOG,
    REPRESENTATIVE,
    by_ggml_type,
    by_name,
    codebook_row,
    dictionary_row,
    int_row,
    masked,
    shared_mask,
    with_byte_table,
    with_columns,
    with_low_rank,
    with_outliers,
)
from qigen.formats.layout import (
    Layout,
    Plane,
    field_offsets,
    field_planes,
    head_bytes,
    kblock_bytes,
    pack,
    packed_bytes,
    packed_shape,
    planes,
    row_block_bytes,
    shared_bytes,
    unpack,
)
from qigen.formats.tensor import QuantizedTensor, validate

__all__ = [
    "CATALOG",
    "REPRESENTATIVE",
    "Field",
    "Format",
    "Layout",
    "Plane",
    "QuantizedTensor",
    "Run",
    "by_ggml_type",
    "by_name",
    "codebook_row",
    "dictionary_row",
    "field_offsets",
    "field_planes",
    "from_blocks",
    "head_bytes",
    "int_row",
    "kblock_bytes",
    "masked",
    "pack",
    "packed_bytes",
    "packed_shape",
    "planes",
    "row_block_bytes",
    "shared_bytes",
    "shared_mask",
    "to_blocks",
    "unpack",
    "validate",
    "with_byte_table",
    "with_columns",
    "with_low_rank",
    "with_outliers",
]
