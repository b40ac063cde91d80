"""Weight quantization: from float weights to the rows of the format catalog.

The package can be called: ``qigen.quantize(weight, "u4g128")`` is :func:`quantize`.
"""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import Any

import numpy.typing as npt

from qigen.formats.algebra import Format
from qigen.formats.catalog import by_name
from qigen.formats.tensor import QuantizedTensor
from qigen.quantize.hessian import Statistics
from qigen.quantize.methods import METHODS, Report, quantize_matrix
from qigen.quantize.rtn import quantize_rtn

__all__ = ["METHODS", "Report", "Statistics", "quantize", "quantize_matrix", "quantize_rtn"]


def quantize(
    weight: npt.ArrayLike,
    format: str | Format,
    *,
    method: str = "rtn",
    hessian: npt.ArrayLike | Statistics | None = None,
    **options: Any,
) -> QuantizedTensor:
    """Quantize a matrix of numbers ``[N, K]`` to a format, by its name in ``qigen formats``.

    ``method`` is a row of :data:`METHODS` ("rtn", "clip", "gptq", ...), ``options`` are its own.
    ``hessian`` float [K, K] is the mean of x x^T over inputs x of the matrix, or
    :class:`Statistics` of them; methods that need none weigh their searches by its diagonal.

    Raises BadInput for anything but a matrix of finite numbers and for a Hessian that is none,
    Unsupported for a format or method that there is not or that do not go together, UsageError for
    options that the method does not have and for a Hessian that is missing. Warns where the
    Hessian took more damping than asked for, and of columns that never had an input.
    """
    row = by_name(format) if isinstance(format, str) else format
    tensor, report = quantize_matrix(weight, row, method, hessian, **options)
    for note in report.notes:
        warnings.warn(note, UserWarning, stacklevel=3)
    return tensor


class _Callable(ModuleType):
    # The public function has the name of its package, and importing a part of the package would
    # put the module in the function's place.
    def __call__(self, *arguments: Any, **options: Any) -> QuantizedTensor:
        return quantize(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
