"""AQLM checkpoints: vectors of weights as sums of entries of codebooks.

With B books of b bits (``num_codebooks``, ``nbits_per_codebook``) and vectors of v weights along K
(``in_group_size``; ``out_group_size`` is 1):

* ``codes`` int8 or int16 ``[N, K / v, B]``, the bits of unsigned numbers below ``2^b``;
* ``codebooks`` ``[B, 2^b, 1, v]`` and ``scales`` ``[N, 1, 1, 1]``, f16.

    W[n, v * j : v * j + v] = scales[n] * sum over books of codebooks[i, codes[n, j, i]]
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qigen.errors import Unsupported
from qigen.formats.algebra import Array
from qigen.formats.catalog import by_name
from qigen.formats.grouped import bits_of, narrowest
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends.checkpoints.grouped import PackedMatrix, no_row
from qigen.frontends.checkpoints.raw import Module, RawTensor, modules
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import Settings

_VECTORS = (4, 8, 16)
_FLOATS = ("F16", "BF16", "F32")


def read(
    tensors: Mapping[str, RawTensor], settings: Settings
) -> tuple[dict[str, SourceTensor], set[str]]:
    """The matrices of an AQLM checkpoint, and the names of the tensors that they consist of."""
    books = settings.integer("num_codebooks", high=64)
    bits = settings.integer("nbits_per_codebook", high=16)
    vector = settings.integer("in_group_size", 8)
    rows = settings.integer("out_group_size", 1)
    if rows != 1 or vector not in _VECTORS or books > 4 or bits < 4:
        raise Unsupported(
            f"AQLM with {books} books of {bits} bits for {rows} x {vector} weights has no row in "
            "the format catalog; known are 1 to 4 books of 4 to 16 bits for 4, 8 or 16 weights of "
            "a row",
            settings.where,
        )
    result: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for module in modules(tensors, "codebooks"):
        result[f"{module.name}.weight"] = _layer(module, books, bits, vector)
        used |= module.used
    return result, used


def _layer(module: Module, books: int, bits: int, vector: int) -> SourceTensor:
    codes = module.get("codes", "codebooks")
    if len(codes.shape) != 3:
        raise codes.bad(f"has the shape {list(codes.shape)}, expected [N, K / {vector}, {books}]")
    n, vectors = codes.shape[:2]
    codes.expect((n, vectors, books), "I8" if bits <= 8 else "I16")
    stored: Array = codes.array().view(np.uint8 if bits <= 8 else np.uint16)
    if bits not in (8, 16) and stored.size and int(stored.max()) >> bits:
        at = [int(i) for i in np.argwhere(stored >> stored.dtype.type(bits))[0]]
        raise codes.bad(
            f"names entry {int(stored[tuple(at)])} at {at}, but books of {bits} bits have "
            f"{1 << bits} entries"
        )
    book = module.get("codebooks", "codes").expect((books, 1 << bits, 1, vector), *_FLOATS)
    scale = module.get("scales", "codes").expect((n, 1, 1, 1), *_FLOATS)
    entries, scales = book.floats(), scale.floats().reshape(n, 1, 1)
    for tensor, values in ((book, entries), (scale, scales)):
        if narrowest(values) != "f16":
            raise no_row(tensor, "aqlm", "numbers that are no f16")
    row = by_name(f"aqlm_{books}x{bits}{'' if vector == 8 else f'v{vector}'}")
    k, per = vector * vectors, row.block // vector

    def read(first: int, last: int) -> QuantizedTensor:
        nblocks = -(-k // row.block)
        blocks = np.zeros((last - first, nblocks * per, books), row.field("codes").dtype)
        blocks[:, :vectors] = stored[first:last]
        fields = {
            "codes": blocks.reshape(last - first, nblocks, per * books),
            "d": bits_of(scales[first:last], row.field("d")),
            "book": bits_of(entries.reshape(1, 1, -1), row.field("book")),
        }
        return QuantizedTensor(row, (last - first, k), fields)

    return PackedMatrix(codes.file, f"{module.name}.weight", (n, k), row, codes.data, read)
