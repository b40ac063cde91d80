"""Budgets as a user gives them: ``bits=3.5``, ``bytes=80M``, ``latency=5ms``, ``kl=0.02``,
``error=0.01``, ``cosine=0.99``."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from qigen.errors import UsageError

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_TIMES = {"us": 1.0, "ms": 1e3, "s": 1e6}
_UNITS = {
    "bits": "a number of bits a weight, such as 3.5",
    "bytes": "a size, such as 80M or 64MiB",
    "latency": "a time with its unit, such as 5ms or 800us",
    "kl": "a divergence in nats a token, such as 0.02",
    "error": "the squared error of the outputs over their square, such as 0.01",
    "cosine": "a cosine below 1, such as 0.99",
}


@dataclass(frozen=True)
class Budget:
    """What may be spent; None where nothing is said.

    ``bits`` stored bits a weight, on average over the matrices that are chosen for, scales
    included; ``bytes`` of all matrices as they are packed; ``us`` the predicted time of a token's
    products; ``kl`` the expected divergence of a language model, in nats a token; ``error`` of the
    outputs of other models, squared and relative to their square.
    """

    bits: float | None = None
    bytes: int | None = None
    us: float | None = None
    kl: float | None = None
    error: float | None = None

    @property
    def hurt(self) -> float | None:
        """What may be lost: ``kl`` or ``error``."""
        return self.error if self.kl is None else self.kl

    def check(self, measure: str) -> None:
        """UsageError for a divergence of a model that has no tokens, and for an error of one that
        has; ``measure`` is 'kl' or 'error'."""
        if measure == "kl" and self.error is not None:
            raise UsageError("budgets of error and cosine are for ONNX models; of a language model "
                             "give kl=0.02 or the like")
        if measure == "error" and self.kl is not None:
            raise UsageError("a budget of kl is for language models; of an ONNX model give "
                             "error=0.01 or cosine=0.99")

    @property
    def text(self) -> str:
        """The budget as it can be given on the command line."""
        parts = {
            "bits": self.bits and f"{self.bits:g}", "bytes": self.bytes and f"{self.bytes}",
            "latency": self.us and f"{self.us:g}us", "kl": self.kl and f"{self.kl:g}",
            "error": self.error and f"{self.error:g}",
        }  # fmt: skip
        return ",".join(f"{name}={value}" for name, value in parts.items() if value)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Several budgets are separated by commas; all of them are kept. UsageError for a name or a
        unit that there is not, for the same twice, and for amounts that are not above 0."""
        found: dict[str, float] = {}
        for part in text.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if name not in _UNITS:
                near = difflib.get_close_matches(name, _UNITS, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise UsageError(f"--budget {part.strip()}: {hint}a budget is of "
                                 f"{', '.join(_UNITS)}, as in bits=3.5")
            if name in found:
                raise UsageError(f"--budget {text} says {name} twice; give it once")
            amount = _amount(name, value) if equals else None
            if amount is None or not (amount > 0 and math.isfinite(amount)) or (
                    name == "cosine" and amount >= 1):
                raise UsageError(f"--budget {part.strip()}: {name} takes {_UNITS[name]}")
            found[name] = amount
        size, error = found.get("bytes"), found.get("error")
        if "cosine" in found:  # of y and y + e, where e has nothing to do with y
            most = found["cosine"] ** -2 - 1
            error = most if error is None else min(error, most)
        return cls(found.get("bits"), None if size is None else int(size), found.get("latency"),
                   found.get("kl"), error)


def _amount(name: str, value: str) -> float | None:
    parts = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*([a-z]*)", value.lower())
    if parts is None:
        return None
    number, unit = float(parts[1]), parts[2]
    factor: float | None
    if name == "bytes":
        factor = _SIZES.get(unit.removesuffix("b"))
    elif name == "latency":
        factor = _TIMES.get(unit)
    else:
        factor = 1 if not unit else None
    return None if factor is None else number * factor
