"""SpQR checkpoints: codes of 3 bits in tiles of 16 rows by 16 columns, outliers in CSR.

``dense_weights`` int64 has a word for every row of a tile, the 16 rows of a tile one after the
other, tiles along K first. From the lowest bit: 3 bits of the scale ``s``, 3 of the zero ``z``, 16
codes of 3 bits, and 8 bits of what the tile shares: rows 2i and 2i + 1 both have byte i of four
f16, ``scale of s, scale of z, zero of s, zero of z``. S and Z are f16, as the kernels compute them:

    S = scale_s * (s - zero_s)    Z = scale_z * (z - zero_z)    W = S * (code - Z) + outlier

``row_offsets`` int32 ``[N + 1]`` cut ``col_vals`` int32 into rows: a column in the lower half of a
word, an f16 in the upper one. ``in_perm`` is of the quantizer; columns lie in the model's order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from qigen.errors import Unsupported
from qigen.formats.algebra import Array
from qigen.formats.catalog import OUTLIER_BLOCK, by_name
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends.checkpoints.grouped import PackedMatrix, no_row
from qigen.frontends.checkpoints.raw import Module, RawTensor, modules
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import Settings

_TILE = 16
_SHARED = 3 * (2 + _TILE)  # the first bit of what a tile shares


def read(
    tensors: Mapping[str, RawTensor], settings: Settings
) -> tuple[dict[str, SourceTensor], set[str]]:
    """The matrices of an SpQR checkpoint, and the names of the tensors that they consist of."""
    bits, tile = settings.integer("bits", 3), (settings.integer("beta1", _TILE),
                                               settings.integer("beta2", _TILE))
    if bits != 3 or tile != (_TILE, _TILE):
        raise Unsupported(
            f"SpQR with {bits} bits in tiles of {tile[0]} x {tile[1]} is not known; its kernels "
            "have 3 bits in tiles of 16 x 16", settings.where,
        )  # fmt: skip
    result: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for module in modules(tensors, "dense_weights"):
        result[f"{module.name}.weight"] = _layer(module)
        if module.has("in_perm"):
            module.get("in_perm", "dense_weights")
        used |= module.used
    return result, used


def _layer(module: Module) -> SourceTensor:
    dense = module.get("dense_weights", "row_offsets")
    offsets = module.get("row_offsets", "dense_weights")
    if len(offsets.shape) != 1 or offsets.dtype != "I32" or offsets.shape[0] < 2:
        raise offsets.bad(f"is {offsets.dtype}{list(offsets.shape)}, expected I32[N + 1]")
    n = offsets.shape[0] - 1
    words: Array = dense.expect(dense.shape, "I64").array().reshape(-1).view(np.uint64)
    if not words.size or n % _TILE or words.size % n:
        raise no_row(dense, "spqr", f"{words.size} words for {n} rows of outliers (their order "
                     "for a GPU, PTCSR, is not read: convert with the storage 'csr')")
    k = _TILE * words.size // n
    tiles = words.reshape(n // _TILE, k // _TILE, _TILE)
    rows, columns, values = _outliers(module, offsets.array().astype(np.int64), n, k)
    blocks = -(-k // OUTLIER_BLOCK)
    place = rows * blocks + columns // OUTLIER_BLOCK
    most = int(np.bincount(place, minlength=1).max()) if place.size else 0
    # few different numbers, as each is a kernel of its own
    count = next(c for c in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
                 if c >= most)
    row = by_name(f"h3g16_o{count}")
    shared = _shared(dense, tiles)

    def read(first: int, last: int) -> QuantizedTensor:
        a, b = first // _TILE, -(-last // _TILE)
        part = tiles[a:b].transpose(0, 2, 1).reshape(-1, k // _TILE)[first - a * _TILE :]
        part = part[: last - first]
        small = [(part >> np.uint64(3 * i) & np.uint64(7)).astype(np.uint8)
                 for i in range(2 + _TILE)]
        of = np.arange(first, last) // _TILE
        scale_s, scale_z, zero_s, zero_z = (shared[i][of] for i in range(4))
        scale = scale_s * (small[0].astype(np.float16) - zero_s)
        zero = scale_z * (small[1].astype(np.float16) - zero_z)
        codes = np.stack(small[2:], axis=-1).reshape(last - first, k)
        fields = {
            "codes": _blocks(codes, OUTLIER_BLOCK),
            "d": _blocks(scale.view(np.uint16), OUTLIER_BLOCK // _TILE),
            "z": _blocks(zero.view(np.uint16), OUTLIER_BLOCK // _TILE),
            "oc": np.zeros((last - first, blocks, count), np.uint8),
            "ov": np.zeros((last - first, blocks, count), np.uint16),
        }
        mine = slice(*np.searchsorted(rows, (first, last)))
        at = place[mine]
        # the number of each outlier in its block: rows and columns ascend
        slot = np.arange(at.size) - np.searchsorted(at, at)
        where = rows[mine] - first, columns[mine] // OUTLIER_BLOCK, slot
        fields["oc"][where] = columns[mine] % OUTLIER_BLOCK
        fields["ov"][where] = values[mine]
        return QuantizedTensor(row, (last - first, k), fields)

    return PackedMatrix(dense.file, f"{module.name}.weight", (n, k), row, dense.data, read)


def _blocks(array: Array, size: int) -> Array:
    """``array`` [n, count] in blocks [n, nblocks, size], the last one filled up with zeros."""
    n, count = array.shape
    full = np.zeros((n, -(-count // size) * size), array.dtype)
    full[:, :count] = array
    return full.reshape(n, -1, size)


def _shared(dense: RawTensor, tiles: Array) -> npt.NDArray[np.float16]:
    """float16 [4, tile rows, tile columns]: the numbers of every tile in the order of their bits.

    Two rows have a copy of each byte: BadInput if they differ, or a number is not finite.
    """
    parts = (tiles >> np.uint64(_SHARED) & np.uint64(0xFF)).astype(np.uint8)
    if (parts[..., 0::2] != parts[..., 1::2]).any():
        at = [int(i) for i in np.argwhere(parts[..., 0::2] != parts[..., 1::2])[0]]
        raise dense.bad(f"has two copies of the numbers of tile {at[:2]} that differ; the file is "
                        "damaged, quantize again")
    numbers = np.ascontiguousarray(parts[..., 0::2]).view("<f2")
    if not np.isfinite(numbers).all():
        at = [int(i) for i in np.argwhere(~np.isfinite(numbers))[0]]
        raise dense.bad(f"holds a NaN or an infinity in tile {at[:2]}; the file is damaged, "
                        "quantize again")
    return np.ascontiguousarray(np.moveaxis(numbers, -1, 0)).astype(np.float16)


def _outliers(module: Module, offsets: Array, n: int, k: int) -> tuple[Array, Array, Array]:
    """(rows int64, columns int64, f16 bits uint16) of the outliers, in the order of the file."""
    pairs = module.get("col_vals", "dense_weights")
    words: Array = pairs.expect(pairs.shape, "I32").array().reshape(-1).view(np.uint32)
    where = module.get("row_offsets", "dense_weights")
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != words.size:
        raise where.bad(f"does not ascend from 0 to the {words.size} outliers of "
                        f"'{pairs.name}'")
    rows = np.repeat(np.arange(n), np.diff(offsets))
    columns = (words & np.uint32(0xFFFF)).astype(np.int64)
    if (columns >= k).any():
        at = int(np.argmax(columns >= k))
        raise pairs.bad(f"puts an outlier of row {int(rows[at])} in column {int(columns[at])}, but "
                        f"there are {k} columns")
    back = (np.diff(columns) <= 0) & (np.diff(rows) == 0)
    if back.any():
        at = int(np.argmax(back))
        raise pairs.bad(f"has outliers of row {int(rows[at])} whose columns do not ascend "
                        f"({int(columns[at])}, then {int(columns[at + 1])}); sort them")
    values = (words >> np.uint32(16)).astype(np.uint16)
    infinite = (values & 0x7C00) == 0x7C00
    if infinite.any():
        raise pairs.bad(f"holds a NaN or an infinity at {int(np.argmax(infinite))}; the file is "
                        "damaged, quantize again")
    return rows, columns, values
