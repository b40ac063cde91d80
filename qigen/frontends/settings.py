"""Checked access to the settings of a model file: GGUF metadata and ``config.json``.

Everything in such a file may be damaged, so every number is taken with its type and range, and
what does not fit raises BadInput that names the file and the key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qigen.errors import BadInput

REQUIRED: Any = object()
"""Default of a setting that the file must have."""

_LARGEST = 2**31 - 1
_SHOWN = 64  # characters of a string from a file in a message


def shown(name: str) -> str:
    """A string from a file as a message may show it: short, on one line."""
    plain = "".join(c if c.isprintable() else "?" for c in name[: _SHOWN + 1])
    return plain if len(plain) <= _SHOWN else plain[: _SHOWN - 3] + "..."


class Settings:
    """The settings of ``where``. A key whose value is None counts as absent (JSON's null)."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def _get(self, key: str, default: Any) -> tuple[Any, bool]:
        value = self.values.get(key)
        if value is not None:
            return value, True
        if default is REQUIRED:
            raise BadInput(f"the setting '{key}' is missing", self.where)
        return default, False

    def bad(self, key: str, expected: str) -> BadInput:
        """The error of a setting that is not what it should be."""
        value: Any = self.values.get(key)
        if isinstance(value, str):
            text = repr(value[:_SHOWN])
        elif isinstance(value, (list, dict, np.ndarray)):
            text = f"{type(value).__name__} of {len(value)}"
        else:
            text = str(value)
        return BadInput(f"the setting '{key}' is {shown(text)}, expected {expected}", self.where)

    def integer(
        self, key: str, default: Any = REQUIRED, *, low: int = 1, high: int = _LARGEST
    ) -> int:
        """A whole number in ``low..high``. A default is returned as it is."""
        value, found = self._get(key, default)
        if not found:
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(key, f"a whole number from {low} to {high}")
        return value

    def number(
        self, key: str, default: Any = REQUIRED, *, low: float = 0.0, high: float = 1e30
    ) -> float:
        """A finite number in ``low..high``. A default is returned as it is."""
        value, found = self._get(key, default)
        if not found:
            return float(value)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or not low <= value <= high
        ):
            raise self.bad(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value, _ = self._get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def text(self, key: str, default: Any = REQUIRED) -> str:
        """A string."""
        value, _ = self._get(key, default)
        if not isinstance(value, str):
            raise self.bad(key, "a string")
        return value

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of ``length`` finite numbers above zero (frequency factors)."""
        value, _ = self._get(key, REQUIRED)
        if not isinstance(value, (list, np.ndarray)) or len(value) != length:
            raise self.bad(key, f"a list of {length} numbers")
        for x in value:
            if isinstance(x, bool) or not isinstance(x, (int, float, np.number)):
                raise self.bad(key, f"a list of {length} numbers")
        return positive([float(x) for x in value], key, self.where)

    def token(self, key: str, vocab_size: int) -> int | None:
        """A token id below ``vocab_size``, or None if the file names none."""
        if key not in self:
            return None
        return self.integer(key, low=0, high=vocab_size - 1)


def positive(values: list[float], name: str, where: str) -> tuple[float, ...]:
    """``values`` as a tuple; BadInput unless all are finite and above zero."""
    if not all(math.isfinite(v) and v > 0.0 for v in values):
        raise BadInput(f"'{name}' must hold finite numbers above zero", where)
    return tuple(values)
