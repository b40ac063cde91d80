"""Scalings of rotary embeddings that several containers have: numbers to divide frequencies by."""

from __future__ import annotations

import math
from dataclasses import replace

from qigen.frontends.model import RopeConfig


def yarn_attention(factor: float) -> float:
    """What YaRN multiplies cosine and sine by, for a context ``factor`` times as long."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def yarn(
    rope: RopeConfig,
    factor: float,
    context: int,
    *,
    fast: float,
    slow: float,
    truncate: bool,
    attn_factor: float,
) -> RopeConfig:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): pairs that turn more than ``fast`` times in
    ``context`` positions keep their frequency, those that turn fewer than ``slow`` times are
    slowed down by ``factor``, and between them goes a ramp. Its ends are whole pairs if
    ``truncate``.
    """
    dim = rope.rotary_dim

    def pair(turns: float) -> float:
        return dim * math.log(context / (turns * 2.0 * math.pi)) / (2.0 * math.log(rope.base))

    low, high = pair(fast), pair(slow)
    if truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, dim - 1.0)
    high = high + 0.001 if low == high else high
    factors = []
    for i in range(dim // 2):
        kept = 1.0 - min(max((i - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / ((1.0 - kept) / factor + kept))
    return replace(rope, factors=tuple(factors), attn_factor=attn_factor)
