"""Emitted lines and the tokens that they come from: the ground of :class:`.emit.Emitter`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qigen.backends.llvm.things import FunctionDecl, Instance, Value
from qigen.backends.llvm.types import Struct, Type
from qigen.errors import Unsupported

if TYPE_CHECKING:
    from qigen.backends.llvm.calls import Returns
    from qigen.backends.llvm.translate import Unit


class Code(ABC):
    """Tokens from ``at`` on, and the lines, labels and stack places of one function."""

    def __init__(self, unit: Unit, env: Mapping[str, Any], owner: Struct | None) -> None:
        self.unit = unit
        self.text = unit.text
        self.at = 0
        self.owner = owner
        self.scopes: list[dict[str, Any]] = [dict(env), {}]
        self.lines: list[str] = []
        self.entry: list[str] = []
        self.count = 0
        self.label = "entry"
        self.closed = False
        self.loops: list[tuple[str, str]] = []  # (continue, break)
        self.returns: list[Returns] = []
        self.alignment = 0
        self.fixed: bool | None = None  # of a pointer type just read: whether itself is const
        self.angle = 0  # inside template arguments, > ends the expression
        self.instance: Instance | None = None

    # ---- emitting ----

    def error(self, message: str) -> Unsupported:
        return self.unit.error(message, self.at)

    def name(self) -> str:
        self.count += 1
        return f"%t{self.count}"

    def line(self, text: str) -> None:
        if self.closed:  # code that nothing reaches
            self.block(self.new_label())
        self.lines.append("  " + text)

    def make(self, text: str) -> str:
        name = self.name()
        self.line(f"{name} = {text}")
        return name

    def new_label(self) -> str:
        self.count += 1
        return f"b{self.count}"

    def block(self, label: str) -> None:
        if not self.closed:
            self.lines.append(f"  br label %{label}")
        self.lines.append(f"{label}:")
        self.label = label
        self.closed = False

    def jump(self, label: str) -> None:
        if not self.closed:
            self.lines.append(f"  br label %{label}")
            self.closed = True

    def branch(self, condition: str, yes: str, no: str) -> None:
        self.line(f"br i1 {condition}, label %{yes}, label %{no}")
        self.closed = True

    def alloca(self, kind: Type, alignment: int = 0) -> str:
        name = self.name()
        align = max(kind.align, alignment)
        self.entry.append(f"  {name} = alloca {kind.memory}, align {align}")
        return name

    # ---- tokens ----

    def accept(self, token: str) -> bool:
        if self.text[self.at] == token:
            self.at += 1
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise self.error(f"'{self.text[self.at]}' where '{token}' was expected")

    # ---- what the layers above read: expressions, calls and statements contain each other ----

    @abstractmethod
    def expression(self) -> Value:
        """An expression with its commas."""

    @abstractmethod
    def assignment(self) -> Value:
        """An expression without commas."""

    @abstractmethod
    def conditional(self) -> Value:
        """An expression without assignments."""

    @abstractmethod
    def arguments(self) -> list[Value]:
        """The arguments at an opening bracket."""

    @abstractmethod
    def identifier(self) -> Value:
        """What a name stands for, called if it is called."""

    @abstractmethod
    def call_named(self, name: str, decls: list[FunctionDecl], this: Value | None) -> Value:
        """A call of one of the functions of a name."""

    @abstractmethod
    def call_pointer(self, value: Value) -> Value:
        """A call of what a pointer points at."""

    @abstractmethod
    def initialise(self, target: Value, kind: Type) -> None:
        """Store what is written here (a list in braces or an expression)."""

    @abstractmethod
    def construct(self, target: Value, kind: Struct) -> None:
        """``T x;``, or ``T(..)`` at the opening bracket."""

    @abstractmethod
    def statement(self) -> None:
        """A statement."""
