"""What names of the translated C++ stand for: values, functions, structs, lambdas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qigen.backends.llvm.types import (
    F32,
    F64,
    I32,
    VOID,
    Function,
    Named,
    Ptr,
    Struct,
    Type,
)

AUTO = Named("auto")
"""The type that an initial value decides."""

LIBRARY: dict[str, tuple[Type, tuple[Type, ...]]] = {
    "expf": (F32, (F32,)), "cos": (F64, (F64,)), "sin": (F64, (F64,)),
    "qigen_barrier_wait": (VOID, (Ptr(VOID), I32)),
}  # fmt: skip
"""Functions of the library that hosts a model which translated code calls."""


@dataclass
class Value:
    """What an expression gives: a register or constant, or (``lvalue``) where it is stored.

    ``const`` is the number of a constant. Aggregates are always where they are stored.
    """

    type: Type
    ref: str
    lvalue: bool = False
    const: int | float | None = None


@dataclass(eq=False)
class FunctionDecl:
    name: str
    start: int
    """Token at which specifiers and the result's type begin."""
    parameters: list[tuple[int, int]]
    body: int | None
    template: list[tuple[str, str]]
    owner: Struct | None = None
    constructor: bool = False
    static: bool = False
    internal: bool = False
    plain: bool = False
    """Whether its symbol is its name, as in C."""
    initialisers: Mapping[str, int] = field(default_factory=dict)
    """Of a constructor: the brackets of the fields that it gives values before its body."""


@dataclass(eq=False)
class StructDecl:
    name: str
    body: int
    template: list[tuple[str, str]]
    instances: dict[tuple[Any, ...], Struct] = field(default_factory=dict)


@dataclass(eq=False)
class Lambda:
    parameters: list[tuple[int, int]]
    body: int
    scopes: list[dict[str, Any]]


@dataclass(eq=False)
class Instance:
    decl: FunctionDecl
    symbol: str
    result: Type
    parameters: list[tuple[str, Type, bool]]
    env: dict[str, Any]

    @property
    def type(self) -> Function:
        passed = [(t, r) for _, t, r in self.parameters if not isinstance(t, Named)]
        return Function(self.result, tuple(t for t, _ in passed), tuple(r for _, r in passed))
