"""Formats of the KV cache: one row each, with the rounding that every kernel is compared with.

``int8`` has one float32 scale for each head and position, for the key and for the value.

``int4`` and ``int2`` follow KIVI (Liu et al. 2024, arXiv 2402.02750): channels of keys have
outliers that stay in their channel, so keys are rounded per channel over a group of
positions; values per position over a group of channels. A number is ``scale · code + lowest`` with
f16 ``scale`` and ``lowest``. The newest positions stay in f16: a query at position p sees the
first ``sealed(p)`` blocks rounded and the rest, its last ``window`` positions and up to a block
more, as they are. What a query sees follows from its position alone, not from how a prompt was
cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qigen.errors import UsageError

Array = NDArray[Any]

BLOCK = 64
"""Positions of a softmax block; what is rounded, is by whole blocks."""


@dataclass(frozen=True)
class KvFormat:
    """``bits`` a number; ``window`` newest positions stay f16 (0: none, every position is rounded
    when it is written), and so do the ``first`` blocks, which all queries look at much (attention
    sinks, Xiao et al. 2024, arXiv 2309.17453); ``key_group`` positions share the scale of a
    channel of keys, ``value_group`` channels at most that of a value (0: all)."""

    name: str
    bits: int
    window: int = 0
    value_group: int = 0
    key_group: int = BLOCK
    first: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        assert self.window % BLOCK == 0, "the window is whole blocks"

    @property
    def integer(self) -> bool:
        """Whether numbers are codes."""
        return self.bits < 16

    def sealed(self, positions: Array) -> Array:
        """Blocks that queries at ``positions`` see rounded, int64 of the same shape."""
        if not self.window:
            return np.zeros_like(positions, dtype=np.int64)
        return np.maximum(0, (positions.astype(np.int64) + 1 - self.window) // BLOCK)

    def group(self, head_dim: int) -> int:
        """Channels that share the scale of a value: whole groups fill the padded head."""
        most = self.value_group or padded(head_dim)
        return next(g for g in (most, 64, 32, 16) if g <= most and padded(head_dim) % g == 0)

    def block_bytes(self, head_dim: int) -> int:
        """Bytes of a block of positions of one head (templates/cpu/attention.j2)."""
        wide = padded(head_dim)
        if not self.integer:
            return half_block_bytes(head_dim)
        codes = 2 * BLOCK * wide * self.bits // 8
        if not self.window:
            return codes + 2 * 4 * BLOCK
        keys, values = BLOCK // self.key_group, wide // self.group(head_dim)
        return codes + 2 * 2 * wide * keys + 2 * 2 * BLOCK * values

    def window_bytes(self, head_dim: int) -> int:
        """Bytes of a session for the newest positions of one head, and where it notes its state."""
        if not self.window:
            return 0
        return 64 + (self.window // BLOCK + 1 + self.first) * half_block_bytes(head_dim)

    def step_blocks(self, max_tokens: int) -> int:
        """Blocks that the newest positions and ``max_tokens`` more touch at most."""
        return self.window // BLOCK + -(-(max_tokens + BLOCK - 1) // BLOCK) if self.window else 0


def padded(head_dim: int) -> int:
    """Channels of a stored row: whole vectors of 16."""
    return -(-head_dim // 16) * 16


def half_block_bytes(head_dim: int) -> int:
    """Bytes of a block of f16 keys and values of one head."""
    return 2 * BLOCK * (head_dim + padded(head_dim))


KV_FORMATS = {
    row.name: row
    for row in (
        KvFormat("f16", 16, source="IEEE 754 half precision"),
        KvFormat("int8", 8, source="symmetric, a scale for each head and position"),
        KvFormat("int4", 4, window=64, value_group=64, key_group=32, first=1,
                 source="KIVI, arXiv 2402.02750"),
        KvFormat("int2", 2, window=128, value_group=32, source="KIVI, arXiv 2402.02750"),
    )
}
"""The rows by name, the most exact first."""


def kv_format(name: str) -> KvFormat:
    """The row of a name; UsageError lists the names."""
    if name not in KV_FORMATS:
        raise UsageError(f"KV cache {name}: choose one of {', '.join(KV_FORMATS)}")
    return KV_FORMATS[name]


@dataclass(frozen=True)
class Rounded:
    """Codes uint8 and the f16 numbers that they stand for; shapes as :func:`round_groups` says."""

    codes: NDArray[np.uint8]
    scale: NDArray[np.float16]
    lowest: NDArray[np.float16]

    def dequantize(self) -> NDArray[np.float32]:
        """``scale · code + lowest`` in float32; the product is exact: rounded once."""
        result: NDArray[np.float32] = self.codes * np.float32(self.scale) + np.float32(self.lowest)
        return result


def round_groups(x: Array, bits: int, axis: int) -> Rounded:
    """Round ``x`` (finite f16 numbers of any float type and shape) to ``bits`` bits; numbers along
    ``axis`` share a scale.

    lowest is the least of the group, scale = f16((greatest − lowest) / (2^bits − 1)), codes =
    rint((x − lowest) / scale) and at most 2^bits − 1, in float32. A group of equal numbers has
    scale 0 and codes 0. ``scale`` and ``lowest`` keep ``axis`` with size 1.
    """
    x = x.astype(np.float32)
    most = np.float32((1 << bits) - 1)
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    scale = ((high - low) * (np.float32(1) / most)).astype(np.float16)
    s = scale.astype(np.float32)
    inverse = np.divide(np.float32(1), s, out=np.zeros_like(s), where=s > 0)
    codes = np.minimum(np.rint((x - low) * inverse), most)
    return Rounded(codes.astype(np.uint8), scale, low.astype(np.float16))


def round_block(keys: Array, values: Array, fmt: KvFormat) -> tuple[Rounded, Rounded]:
    """A block of one head or several: ``keys, values [BLOCK, heads, head_dim]`` (already f16).

    The codes of the keys are ``[groups, key_group, heads, head_dim]``, those of the values
    ``[BLOCK, heads, groups, channels]`` where the last group may be short: groups are those of the
    padded head.
    """
    head_dim, group = values.shape[-1], fmt.group(values.shape[-1])
    whole = np.full((*values.shape[:-1], padded(head_dim)), np.nan, dtype=np.float32)
    whole[..., :head_dim] = values
    parts = whole.reshape(*values.shape[:-1], -1, group)
    # channels beyond the head repeat one of it, so that they do not change the range
    parts = np.where(np.isnan(parts), parts[..., :1], parts)
    groups = keys.reshape(-1, fmt.key_group, *keys.shape[1:])
    return round_groups(groups, fmt.bits, 1), round_groups(parts, fmt.bits, -1)
