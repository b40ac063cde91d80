"""The inputs' dimensions: what the model says of them, joined with what --shape asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from qigen.errors import UsageError
from qigen.ir.dims import Sym
from qigen.ir.graph import Dim


@dataclass(frozen=True)
class Size:
    """A dimension as --shape gives it: a number, or a name with an upper limit."""

    value: int | str
    limit: int = 0


Shapes = Mapping[str, Sequence[Size]]


class Dimensions:
    """Names of the open dimensions, their limits, and the numbers that --shape gives them."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.symbols: dict[str, str] = {}  # dim_param -> our name
        self.limits: dict[str, int] = {}
        self.fixed: dict[str, int] = {}  # dim_param -> number that --shape gave it

    def of(
        self, name: str, axis: int, d: onnx.TensorShapeProto.Dimension | None, asked: Size | None
    ) -> Dim:
        at = f"dimension {axis} of input {name}"
        if d is not None and d.HasField("dim_value") and d.dim_value >= 0:
            if asked is not None and isinstance(asked.value, int) and asked.value != d.dim_value:
                raise UsageError(
                    f"--shape makes {at} {asked.value}; the model fixes it to {d.dim_value}",
                    self.where,
                )
            return int(d.dim_value)
        # "?" and the like stand for sizes that have nothing to do with each other
        named = d is not None and re.search(r"\w", d.dim_param)
        parameter = d.dim_param if d is not None and named else f"{name}_{axis}"
        if asked is not None:
            if isinstance(asked.value, int):
                before = self.fixed.setdefault(parameter, asked.value)
                if before != asked.value:
                    raise UsageError(
                        f"--shape makes {at} ({parameter}) {asked.value}, and {before} elsewhere",
                        self.where,
                    )
                return asked.value
            if asked.limit:
                self.limits[self._symbol(parameter)] = asked.limit
        if parameter in self.fixed:
            return self.fixed[parameter]
        return Sym.named(self._symbol(parameter))

    def _symbol(self, parameter: str) -> str:
        if parameter not in self.symbols:
            base = re.sub(r"\W", "_", parameter, flags=re.ASCII)
            base = f"d_{base}" if not base or base[0].isdigit() or base in _RESERVED else base
            name, n = base, 1
            while name in self.symbols.values():
                name, n = f"{base}_{n}", n + 1
            self.symbols[parameter] = name
        return self.symbols[parameter]


# words that the generated code uses
_RESERVED = {
    "int", "long", "float", "double", "auto", "new", "delete", "class", "struct", "c", "s", "step",
    "thread", "threads", "barrier", "min", "max", "mod", "floordiv", "default", "register", "this",
    "if", "else", "for", "while", "do", "return", "true", "false", "half", "bool", "char", "short",
    "template", "operator", "union", "signed", "unsigned",
}  # fmt: skip
