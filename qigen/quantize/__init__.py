"""Weight quantization: from float weights to the rows of the format catalog."""

from __future__ import annotations

from qigen.quantize.rtn import quantize_rtn

__all__ = ["quantize_rtn"]
