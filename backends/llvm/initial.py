"""Initial values: lists in braces, constructors, constant data."""

from __future__ import annotations

from qigen.backends.llvm.calls import Calls
from qigen.backends.llvm.things import FunctionDecl, Value
from qigen.backends.llvm.types import (
    BOOL,
    I64,
    Array,
    Field,
    Float,
    Int,
    Ptr,
    Struct,
    Type,
)


class Initial(Calls):
    """Reads initial values, for places and as constant data."""

    def count_elements(self) -> int:
        return len(self.unit.split(self.at))

    def initialise(self, target: Value, kind: Type) -> None:
        """Store what is written here (a list in braces or an expression)."""
        if self.text[self.at] != "{":
            value = self.assignment()
            self.store(target.ref, value, kind)
            return
        close = self.unit.match[self.at]
        empty = close == self.at + 1
        if isinstance(kind, Array):
            places = self.unit.split(self.at)
            if len(places) < kind.count:
                self.zero(target.ref, kind)
            for i, (start, _) in enumerate(places):
                self.at = start
                self.initialise(self.element(target, Value(I64, str(i), const=i)), kind.of)
        elif isinstance(kind, Struct):
            places = self.unit.split(self.at)
            fields = list(kind.layout["fields"].values())
            if len(places) < len(fields):
                self.zero(target.ref, kind)
            for i, f in enumerate(fields):
                start = places[i][0] if i < len(places) else f.default
                if start is None:
                    continue
                self.at = start
                if f.reference:
                    value = self.place_of(self.assignment())
                    place = self.offset(target.ref, f.offset)
                    self.line(f"store ptr {value.ref}, ptr {place}, align 8")
                else:
                    self.initialise(self.member(target, f), f.type)
        elif empty:
            self.store(target.ref, self.zero_of(kind), kind)
        else:
            self.at += 1
            self.store(target.ref, self.assignment(), kind)
        self.at = close + 1

    def constant(self, kind: Type, offset: int, parts: list[tuple[int, str, str, int]]) -> None:
        """Append the constant that is written here, as (offset, IR type, text, size)."""
        braces = self.text[self.at] == "{"
        close = self.unit.match[self.at] if braces else -1
        if isinstance(kind, Array):
            for i, (start, _) in enumerate(self.unit.split(self.at)):
                self.at = start
                self.constant(kind.of, offset + i * kind.of.size, parts)
        elif isinstance(kind, Struct):
            places = self.unit.split(self.at)
            for i, f in enumerate(kind.layout["fields"].values()):
                start = places[i][0] if i < len(places) else f.default
                if start is not None:
                    self.at = start
                    self.constant(f.type, offset + f.offset, parts)
        else:
            if braces:
                self.at += 1
            value = self.convert(self.assignment(), kind)
            if value.const is None and not value.ref.startswith("@") and value.ref != "null":
                raise self.error("data that is no constant")
            ref = value.ref
            if kind == BOOL:
                ref = str(int(bool(value.const)))
            parts.append((offset, kind.memory, ref, kind.size))
        if braces:
            self.at = close + 1

    def zero(self, place: str, kind: Type) -> None:
        self.unit.intrinsic("void @llvm.memset.p0.i64(ptr, i8, i64, i1)")
        self.line(f"call void @llvm.memset.p0.i64(ptr align {kind.align} {place}, i8 0, "
                  f"i64 {kind.size}, i1 false)")  # fmt: skip

    def zero_of(self, kind: Type) -> Value:
        if isinstance(kind, Int):
            return self.constant_value(0, kind)
        if isinstance(kind, Float):
            return self.constant_value(0.0, kind)
        return Value(kind, "null" if isinstance(kind, Ptr) else "zeroinitializer")

    def construct(self, target: Value, kind: Struct) -> None:
        """``T x;``, or ``T(..)`` at the opening bracket."""
        arguments = self.arguments() if self.text[self.at] == "(" else []
        constructors = kind.layout["constructors"]
        found = [c for c in constructors if len(c.parameters) == len(arguments)]
        if found:
            self.call(self.unit.instance(found[0], {}), arguments, target)
        elif arguments:
            raise self.error(f"a constructor of {kind.name} with {len(arguments)} arguments")

    def first_values(self, constructor: FunctionDecl) -> None:
        """The values that a constructor gives fields before its body, or else their own."""
        assert self.owner is not None
        this = Value(self.owner, "%this", True)
        fields: dict[str, Field] = self.owner.layout["fields"]
        for name, self.at in constructor.initialisers.items():
            if name not in fields:
                raise self.error(f"an initialiser of {name}, which is no field")
        for name, f in fields.items():
            at = constructor.initialisers.get(name, f.default)
            if at is None:
                continue
            self.at = at
            bracket = name in constructor.initialisers and self.text[at] == "("
            if bracket and isinstance(f.type, Struct) and not f.reference:
                self.construct(self.member(this, f), f.type)
                continue
            self.at += bracket
            if f.reference:
                place = self.offset(this.ref, f.offset)
                self.line(f"store ptr {self.place_of(self.assignment()).ref}, ptr {place}, align 8")
            elif bracket and self.text[self.at] == ")":
                self.zero(self.member(this, f).ref, f.type)
            else:
                self.initialise(self.member(this, f), f.type)
