"""Weight quantization: from float weights to the rows of the format catalog.

The package can be called: ``qigen.quantize(weight, "u4g128")`` is :func:`quantize`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import Format, QuantizedTensor
from qigen.formats.catalog import by_name
from qigen.quantize.rtn import quantize_rtn

__all__ = ["quantize", "quantize_rtn"]

METHODS = ("rtn",)


def quantize(weight: ArrayLike, format: str | Format, *, method: str = "rtn") -> QuantizedTensor:
    """Quantize a matrix of numbers ``[N, K]`` to a format, by its name in ``qigen formats``.

    ``method`` is "rtn", round to nearest. Raises BadInput for anything but a matrix of finite
    numbers, Unsupported for a format or method that there is not.
    """
    if method not in METHODS:
        raise Unsupported(
            f"quantization method '{method}' is not known; there is {', '.join(METHODS)}"
        )
    row = by_name(format) if isinstance(format, str) else format
    try:
        matrix = np.ascontiguousarray(weight, np.float32)
    except (TypeError, ValueError):
        raise BadInput("the weight is not a matrix of numbers", "weight") from None
    return quantize_rtn(matrix, row)


class _Callable(ModuleType):
    # The public function has the name of its package, and importing a part of the package would
    # put the module in the function's place.
    def __call__(self, *arguments: Any, **options: Any) -> QuantizedTensor:
        return quantize(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
