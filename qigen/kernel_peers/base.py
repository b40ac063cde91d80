"""What a peer of ``qigen bench-kernel`` is, and the weight that all of them multiply by.

A peer multiplies by the same codes and scales as our kernel, where it knows the format. It is given
many copies of the weight, so that every call reads one that is not in the caches.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qigen.errors import Unsupported
from qigen.formats.algebra import Format
from qigen.tuning.problem import ROWS, random_rows

Array = npt.NDArray[Any]

_NODES = 512  # products of one run at most


class Peer(Protocol):
    """A loaded peer. ``version`` and ``setting`` say what was measured."""

    threads: int
    load_s: float
    about: dict[str, str]

    def run(self) -> int:
        """Multiplies some times in turn by different weights; how many."""

    def result(self) -> Array:
        """float32 [m, n]: x W^T of the last run."""


def shared_codes(format: Format, bits: tuple[int, ...], groups: tuple[int, ...]) -> None:
    """Unsupported unless the format is (code - 2^(bits-1)) * scale with such bits and groups."""
    plain = format.float_kind is None and format.table is None and not format.base3
    symmetric = plain and {(f.name, f.scope) for f in format.fields} == {
        ("codes", "block"), ("d", "block")
    } and format.field("d").number == "f16"  # fmt: skip
    if not symmetric or format.zero != 1 << (format.code_bits - 1):
        raise Unsupported(f"it has nothing like {format.name}; s4g128 and its like are shared")
    if format.code_bits not in bits or format.group not in groups or format.scale_factor != 1.0:
        raise Unsupported(f"it has no {format.code_bits} bits in groups of {format.group}")


def weight(format: Format, n: int, k: int) -> tuple[Array, Array]:
    """(codes uint8 [n, groups, group], scales float16 [n, groups]) of the weight that our kernel
    has."""
    rows = random_rows(format, k)
    codes = rows.fields["codes"].reshape(ROWS, -1, format.group)
    scales = rows.fields["d"].view(np.float16).reshape(ROWS, -1)
    order = np.arange(n) % ROWS
    return codes[order], scales[order]


def copies(nbytes: int, total: int, m: int) -> int:
    """How many weights one run goes through: as many as the caches do not hold, but for products
    so large that computing binds them."""
    return max(1, min(_NODES, -(-total // nbytes), max(4, 1024 // m)))
