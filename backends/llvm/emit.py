"""Bodies of functions: statements and expressions, emitted as IR while they are read."""

from __future__ import annotations

import math
import struct as binary
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qigen.backends.llvm.things import (
    AUTO,
    LIBRARY,
    FunctionDecl,
    Instance,
    Lambda,
    StructDecl,
    Value,
)
from qigen.backends.llvm.types import (
    BASIC,
    BOOL,
    F32,
    F64,
    I32,
    I64,
    U32,
    U64,
    VOID,
    Array,
    Field,
    Float,
    Function,
    Int,
    Named,
    Ptr,
    Struct,
    Type,
    Void,
)
from qigen.errors import Unsupported

if TYPE_CHECKING:
    from qigen.backends.llvm.translate import Unit

_SKIPPED = frozenset(("const", "volatile", "typename", "struct", "class", "explicit", "inline",
                      "static", "constexpr", "extern"))  # fmt: skip
_LEVELS: tuple[tuple[str, ...], ...] = (
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<", ">", "<=", ">="), ("<<", ">>"),
    ("+", "-"), ("*", "/", "%"),
)  # fmt: skip
_ASSIGN = frozenset(("=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>="))
_SHIFTS = {"vi_srl": "lshr", "vi_sll": "shl", "vi_sra": "ashr"}


def float_text(value: float, bits: int) -> str:
    """A float constant as LLVM reads it: the bits of the double."""
    if bits == 32:
        value = binary.unpack("<f", binary.pack("<f", value))[0]
    return f"0x{binary.unpack('<Q', binary.pack('<d', value))[0]:016X}"


class Emitter:
    """Reads tokens from ``at`` on and emits the IR of one function (or evaluates constants)."""

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
        self.returns: list[_Returns] = []
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

    # ---- names ----

    def local(self, name: str) -> Any:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def named_type(self, name: str) -> Type | StructDecl | None:
        """The type of a name; a StructDecl for a template of structs."""
        found = self.local(name)
        if found is not None:
            return found if isinstance(found, Type) and not isinstance(found, Named) else None
        if name in BASIC:
            return BASIC[name]
        if name in self.unit.vectors:
            return self.unit.vectors[name]
        if self.owner is not None:
            if name == self.owner.layout["decl"].name:
                return self.owner
            if name in self.owner.layout["types"]:
                return self.type_at(self.owner.layout["types"][name])
        if name in self.unit.aliases:
            return self.type_at(self.unit.aliases[name])
        decl = self.unit.structs.get(name)
        if decl is None:
            return VOID if name in self.unit.opaque else None
        return decl if decl.template else self.unit.struct(decl, ())

    def type_at(self, at: int) -> Type:
        other = Emitter(self.unit, {}, self.owner)
        other.scopes = self.scopes
        other.at = at
        kind, reference = other.base_type()
        return other.declarator(kind, reference)[1]

    def is_type(self) -> bool:
        """Whether a type begins here."""
        at = self.at
        text = self.text
        if text[at] in _SKIPPED or text[at] in ("alignas", "auto", "__attribute__"):
            return True
        if text[at] == "[" and text[at + 1] == "[":
            return True
        while text[at + 1] == "::" and text[at] in self.unit.namespaces:
            at += 2
        if not text[at] or not (text[at][0].isalpha() or text[at][0] == "_"):
            return False
        if text[at - 1] == "::" and text[at] == "atomic":
            return True
        return self.named_type(text[at]) is not None and text[at + 1] not in ("::", "(", "{")

    def specifiers(self) -> set[str]:
        """Skip what may stand before a type; the words that were there, and ``alignment``."""
        self.alignment = 0
        return self._specifiers()

    def _specifiers(self) -> set[str]:
        words: set[str] = set()
        text = self.text
        while True:
            token = text[self.at]
            if token == "[" and text[self.at + 1] == "[":
                self.at = self.unit.match[self.at] + 1
            elif token == "__attribute__":
                words |= set(text[self.at : self.unit.match[self.at + 1]])
                self.at = self.unit.match[self.at + 1] + 1
            elif token == "alignas":
                end = self.unit.match[self.at + 1]
                self.at += 2
                self.alignment = int(self.number(self.conditional()))
                self.at = end + 1
            elif token in _SKIPPED:
                words.add(token)
                self.at += 1
                if token == "extern" and text[self.at].startswith('"'):
                    self.at += 1
            else:
                return words

    def base_type(self) -> tuple[Type, bool]:
        """A type with its stars, AUTO for ``auto``; and whether it is a reference."""
        self._specifiers()
        text = self.text
        while text[self.at + 1] == "::" and text[self.at] in self.unit.namespaces:
            self.at += 2
        name = text[self.at]
        kind: Type
        if name in ("auto", "atomic"):
            self.at += 1
            kind = AUTO if name == "auto" else VOID
            if name == "atomic":
                self.at += 1
                self.base_type()
                self.expect(">")
        else:
            found = self.named_type(name)
            if found is None:
                raise self.error(f"the type {name}")
            self.at += 1
            if isinstance(found, StructDecl):
                kind = self.unit.struct(found, tuple(self.template_arguments()))
            else:
                kind = found
        reference = False
        self.fixed = None
        while True:
            token = text[self.at]
            if token == "*":
                kind = Ptr(kind)
                self.fixed = False
            elif token == "&":
                reference = True
            elif token == "const":
                self.fixed = True if self.fixed is not None else None
            else:
                return kind, reference
            self.at += 1

    def template_arguments(self) -> list[Any]:
        self.expect("<")
        found: list[Any] = []
        while not self.accept(">"):
            if self.is_type():
                found.append(self.base_type()[0])
            else:
                self.angle += 1
                value = self.conditional()
                self.angle -= 1
                if value.const is None:
                    raise self.error("a template argument that is no constant")
                found.append(value)
            self.accept(",")
        return found

    def declarator(self, base: Type, reference: bool) -> tuple[str, Type, bool]:
        """Name ('' if there is none), type and whether it is a reference, of what is declared."""
        text = self.text
        if text[self.at] == "(" and text[self.at + 1] in ("*", "&"):
            pointer = text[self.at + 1] == "*"
            self.at += 2
            self.accept("const")
            name = ""
            if text[self.at] != ")":
                name = text[self.at]
                self.at += 1
            self.expect(")")
            kind: Type
            if text[self.at] == "(":
                places = self.unit.split(self.at)
                close = self.unit.match[self.at]
                parameters = [self.parameter(*place) for place in places]
                kind = Function(
                    base, tuple(p[1] for p in parameters), tuple(p[2] for p in parameters)
                )
                self.at = close + 1
            else:
                kind = self.dimensions(base)
            return (name, Ptr(kind), False) if pointer else (name, kind, True)
        name = ""
        token = text[self.at]
        if token and (token[0].isalpha() or token[0] == "_"):
            name = token
            self.at += 1
        return name, self.dimensions(base), reference

    def dimensions(self, base: Type) -> Type:
        sizes = []
        while self.text[self.at] == "[" and self.text[self.at + 1] != "[":
            end = self.unit.match[self.at]
            if end == self.at + 1:
                sizes.append(-1)
            else:
                self.at += 1
                sizes.append(int(self.number(self.conditional())))
            self.at = end + 1
        for size in reversed(sizes):
            base = Array(base, size)
        return base

    def parameter(self, start: int, end: int) -> tuple[str, Type, bool]:
        """Name, type and whether it is a reference, of a parameter at a place."""
        before = self.at
        self.at = start
        self.specifiers()
        bound = self.local(self.text[self.at])
        if isinstance(bound, Named):
            self.at += 1
            name, kind, reference = self.text[end - 1], bound, False
        else:
            base, is_ref = self.base_type()
            name, kind, reference = self.declarator(base, is_ref)  # type: ignore[assignment]
            if isinstance(kind, Array) and not reference:
                kind = Ptr(kind.of)  # type: ignore[assignment]
        self.at = before
        return name, kind, reference

    # ---- functions ----

    def function(self, instance: Instance) -> str:
        """The definition of a function."""
        decl = instance.decl
        self.instance = instance
        scope = self.scopes[-1]
        for i, (name, kind, reference) in enumerate(instance.parameters):
            if isinstance(kind, Named):
                scope[name] = kind
            elif reference or kind.aggregate:
                scope[name] = Value(kind, f"%arg{i}", True)
            elif name:
                place = self.alloca(kind)
                self.store(place, Value(kind, f"%arg{i}"), kind)
                scope[name] = Value(kind, place, True)
        assert decl.body is not None
        if decl.constructor:
            self.first_values(decl)
        self.at = decl.body
        self.statement()
        if not self.closed:
            self.line("ret void" if instance.result == VOID or instance.result.aggregate
                      else "unreachable")  # fmt: skip
        words = set(self.text[decl.start : decl.parameters[0][0] if decl.parameters else decl.body])
        attributes = "nounwind"
        if "always_inline" in words:
            attributes += " alwaysinline"
        elif "noinline" in words:
            attributes += " noinline"
        exported = not decl.internal and not (decl.template or decl.owner)
        linkage = "internal" if not exported else "" if decl.plain else "hidden"
        head = f"define {linkage} {self.unit.signature(instance, True)} {attributes} {{"
        return "\n".join([head, "entry:", *self.entry, *self.lines, "}"])

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

    # ---- statements ----

    def statement(self) -> None:
        text = self.text
        token = text[self.at]
        if token == "{":
            end = self.unit.match[self.at]
            self.at += 1
            self.scopes.append({})
            while self.at < end:
                self.statement()
            self.scopes.pop()
            self.at = end + 1
        elif token == ";":
            self.at += 1
        elif token == "if":
            self.if_statement()
        elif token == "for":
            self.for_statement()
        elif token == "while":
            self.while_statement()
        elif token == "return":
            self.return_statement()
        elif token in ("break", "continue"):
            self.at += 1
            self.jump(self.loops[-1][token == "break"])
            self.expect(";")
        elif token == "static_assert" or (token == "using" and text[self.at + 1] == "namespace"):
            self.at = self.unit.until(self.at, ";") + 1
        elif self.is_type():
            self.declaration()
        else:
            self.expression()
            self.expect(";")

    def skip_statement(self) -> None:
        token = self.text[self.at]
        if token == "{":
            self.at = self.unit.match[self.at] + 1
        elif token in ("if", "for", "while"):
            self.at += 1 + (self.text[self.at + 1] == "constexpr")
            self.at = self.unit.match[self.at] + 1
            self.skip_statement()
            if token == "if" and self.accept("else"):
                self.skip_statement()
        else:
            self.at = self.unit.until(self.at, ";") + 1

    def if_statement(self) -> None:
        self.at += 1 + (self.text[self.at + 1] == "constexpr")
        self.expect("(")
        condition = self.rvalue(self.expression())
        self.expect(")")
        if condition.const is not None:
            if condition.const:
                self.scoped_statement()
                if self.accept("else"):
                    self.skip_statement()
            else:
                self.skip_statement()
                if self.accept("else"):
                    self.scoped_statement()
            return
        yes, no, end = self.new_label(), self.new_label(), self.new_label()
        self.branch(self.truth(condition), yes, no)
        self.block(yes)
        self.scoped_statement()
        self.jump(end)
        self.block(no)
        if self.accept("else"):
            self.scoped_statement()
        self.block(end)

    def scoped_statement(self) -> None:
        self.scopes.append({})
        self.statement()
        self.scopes.pop()

    def while_statement(self) -> None:
        self.at += 1
        test, body, end = self.new_label(), self.new_label(), self.new_label()
        self.block(test)
        self.expect("(")
        condition = self.truth(self.rvalue(self.expression()))
        self.expect(")")
        self.branch(condition, body, end)
        self.block(body)
        self.loops.append((test, end))
        self.scoped_statement()
        self.loops.pop()
        self.jump(test)
        self.block(end)

    def for_statement(self) -> None:
        self.at += 1
        close = self.unit.match[self.at]
        self.at += 1
        self.scopes.append({})
        first = self.at
        colon = first
        while colon < close and self.text[colon] not in (":", ";"):
            colon = self.unit.match.get(colon, colon) + 1
        if self.text[colon] == ":":
            self.range_for(colon, close)
        else:
            self.statement()
            test, body, step, end = (self.new_label() for _ in range(4))
            self.block(test)
            if self.text[self.at] != ";":
                self.branch(self.truth(self.rvalue(self.expression())), body, end)
            else:
                self.jump(body)
            self.expect(";")
            increment = self.at
            self.at = close + 1
            self.block(body)
            self.loops.append((step, end))
            self.scoped_statement()
            self.loops.pop()
            after = self.at
            self.block(step)
            self.at = increment
            if self.at < close:
                self.expression()
            self.at = after
            self.jump(test)
            self.block(end)
        self.scopes.pop()

    def range_for(self, colon: int, close: int) -> None:
        start = self.at
        self.at = colon + 1
        array = self.expression()
        if not isinstance(array.type, Array):
            raise self.error("a loop over what is no array")
        counter = self.alloca(I64)
        self.line(f"store i64 0, ptr {counter}, align 8")
        test, body, step, end = (self.new_label() for _ in range(4))
        self.block(test)
        index = self.make(f"load i64, ptr {counter}, align 8")
        more = self.make(f"icmp slt i64 {index}, {array.type.count}")
        self.branch(more, body, end)
        self.block(body)
        element = self.element(array, Value(I64, index))
        self.at = start
        self.specifiers()
        base, reference = self.base_type()
        if base == AUTO:
            base = element.type
        name, kind, is_ref = self.declarator(base, reference)
        if is_ref or kind.aggregate:
            self.scopes[-1][name] = element
        else:
            place = self.alloca(kind)
            self.store(place, element, kind)
            self.scopes[-1][name] = Value(kind, place, True)
        self.at = close + 1
        self.loops.append((step, end))
        self.scoped_statement()
        self.loops.pop()
        self.block(step)
        following = self.make(f"add nsw i64 {index}, 1")
        self.line(f"store i64 {following}, ptr {counter}, align 8")
        self.jump(test)
        self.block(end)

    def return_statement(self) -> None:
        self.at += 1
        if self.returns:
            self.returns[-1].add(self)
            return
        assert self.instance is not None
        result = self.instance.result
        if self.text[self.at] == ";":
            self.line("ret void")
        elif result.aggregate:
            self.initialise(Value(result, "%result", True), result)
            self.line("ret void")
        elif result == VOID:
            self.expression()
            self.line("ret void")
        else:
            value = self.convert(self.expression(), result)
            self.line(f"ret {result.ir} {value.ref}")
        self.closed = True
        self.expect(";")

    def declaration(self) -> None:
        words = self.specifiers()
        alignment = self.alignment
        base, reference = self.base_type()
        constant = "constexpr" in words or (
            "const" in words if self.fixed is None else self.fixed  # of a pointer, not its target
        )
        while True:
            if base == AUTO and self.text[self.at + 1] == "=" and self.text[self.at + 2] == "[":
                name = self.text[self.at]
                self.scopes[-1][name] = Named(self.closure())
            else:
                self.variable(base, reference, constant, words, alignment)
            if self.accept(";"):
                return
            self.expect(",")

    def closure(self) -> Lambda:
        """``name = [..](..) {..}``, all of which is seen by reference."""
        self.at += 2
        self.at = self.unit.match[self.at] + 1
        parameters = self.unit.split(self.at)
        self.at = self.unit.match[self.at] + 1
        made = Lambda(parameters, self.at, list(self.scopes))
        self.at = self.unit.match[self.at] + 1
        return made

    def variable(
        self, base: Type, reference: bool, constant: bool, words: set[str], alignment: int
    ) -> None:
        scope = self.scopes[-1]
        name, kind, is_ref = self.declarator(base, reference)
        assigned = self.accept("=")
        if is_ref:
            scope[name] = self.place_of(self.assignment())
            return
        if kind in (AUTO, Ptr(AUTO)):
            value = self.rvalue(self.assignment())
            kind = value.type
            scope[name] = self.keep(value, kind, constant)
            return
        if isinstance(kind, Array) and assigned and words & {"constexpr", "static"}:
            symbol = f"{self.unit.prefix}data{len(self.unit.output)}_{self.count}"
            self.alignment = alignment
            whole = self.unit.data(symbol, "internal", kind, self)
            scope[name] = Value(whole, f"@{symbol}", True)
            return
        if isinstance(kind, Array) and kind.count < 0:
            kind = Array(kind.of, self.count_elements())
        if assigned and not kind.aggregate and self.text[self.at] != "{":
            value = self.convert(self.assignment(), kind)
            if constant:
                scope[name] = value
                return
            place = self.alloca(kind, alignment)
            self.store(place, value, kind)
            scope[name] = Value(kind, place, True)
            return
        place = self.alloca(kind, alignment)
        target = Value(kind, place, True)
        if assigned or self.text[self.at] == "{":
            self.initialise(target, kind)
        elif isinstance(kind, Struct):
            self.construct(target, kind)
        scope[name] = target

    def keep(self, value: Value, kind: Type, constant: bool) -> Value:
        if constant or kind.aggregate:
            return value
        place = self.alloca(kind)
        self.store(place, value, kind)
        return Value(kind, place, True)

    def construct(self, target: Value, kind: Struct) -> None:
        """``T x;``, or ``T(..)`` at the opening bracket."""
        arguments = self.arguments() if self.text[self.at] == "(" else []
        constructors = kind.layout["constructors"]
        found = [c for c in constructors if len(c.parameters) == len(arguments)]
        if found:
            self.call(self.unit.instance(found[0], {}), arguments, target)
        elif arguments:
            raise self.error(f"a constructor of {kind.name} with {len(arguments)} arguments")

    # ---- initial values ----

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

    # ---- memory ----

    def offset(self, place: str, offset: int) -> str:
        if not offset:
            return place
        return self.make(f"getelementptr inbounds i8, ptr {place}, i64 {offset}")

    def member(self, base: Value, f: Field) -> Value:
        """A field of the struct that lies at ``base``."""
        place = self.offset(base.ref, f.offset)
        if f.reference:
            place = self.make(f"load ptr, ptr {place}, align 8")
        return Value(f.type, place, True)

    def element(self, base: Value, index: Value) -> Value:
        """An element of an array, or of what a pointer points at."""
        if base.lvalue and isinstance(base.type, Array):
            of, pointer = base.type.of, base.ref
        else:
            value = self.rvalue(base)
            if not isinstance(value.type, Ptr):
                raise self.error("an index into what is no array")
            of, pointer = value.type.to, value.ref
        if index.const is not None and not isinstance(index.const, float):
            return Value(of, self.offset(pointer, int(index.const) * of.size), True)
        wide = self.convert(index, I64)
        place = self.make(f"getelementptr inbounds {of.memory}, ptr {pointer}, i64 {wide.ref}")
        return Value(of, place, True)

    def rvalue(self, value: Value) -> Value:
        """The value where a place was meant; arrays become pointers to their first element."""
        if not value.lvalue:
            return value
        kind = value.type
        if isinstance(kind, Array):
            return Value(Ptr(kind.of), value.ref)
        if kind.aggregate:
            return value
        ref = self.make(f"load {kind.memory}, ptr {value.ref}, align {min(kind.align, 16)}")
        if kind == BOOL:
            ref = self.make(f"trunc i8 {ref} to i1")
        return Value(kind, ref)

    def store(self, place: str, value: Value, kind: Type) -> None:
        if kind.aggregate:
            if not value.lvalue or value.type.size != kind.size:
                raise self.error("an assignment of different structs")
            self.unit.intrinsic("void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)")
            self.line(f"call void @llvm.memcpy.p0.p0.i64(ptr {place}, ptr {value.ref}, "
                      f"i64 {kind.size}, i1 false)")  # fmt: skip
            return
        converted = self.convert(value, kind)
        ref = converted.ref
        if kind == BOOL:
            ref = self.make(f"zext i1 {ref} to i8")
        self.line(f"store {kind.memory} {ref}, ptr {place}, align {min(kind.align, 16)}")

    def place_of(self, value: Value) -> Value:
        """The value as something with an address."""
        if value.lvalue:
            return value
        place = self.alloca(value.type)
        self.store(place, value, value.type)
        return Value(value.type, place, True)

    # ---- conversions ----

    def number(self, value: Value) -> int | float:
        if value.const is None:
            raise self.error("what should be a constant")
        return value.const

    def constant_value(self, number: int | float, kind: Type) -> Value:
        if isinstance(kind, Float):
            return Value(kind, float_text(float(number), kind.bits), const=float(number))
        assert isinstance(kind, Int)
        if kind == BOOL:
            truth = int(bool(number))
            return Value(kind, "true" if truth else "false", const=truth)
        whole = int(number) & ((1 << kind.bits) - 1)
        if kind.signed and whole >> (kind.bits - 1):
            whole -= 1 << kind.bits
        return Value(kind, str(whole), const=whole)

    def truth(self, value: Value) -> str:
        return self.convert(value, BOOL).ref

    def convert(self, value: Value, to: Type) -> Value:
        """The value as another type, by the rules of C++."""
        value = self.rvalue(value)
        kind = value.type
        if kind == to:
            return value
        if value.const is not None and isinstance(to, (Int, Float)):
            return self.constant_value(value.const, to)
        if isinstance(to, Ptr):
            if value.const == 0:
                return Value(to, "null")
            if isinstance(kind, Ptr):
                return Value(to, value.ref)
        if to == BOOL:
            if isinstance(kind, Ptr):
                return Value(BOOL, self.make(f"icmp ne ptr {value.ref}, null"))
            if isinstance(kind, Int):
                return Value(BOOL, self.make(f"icmp ne {kind.ir} {value.ref}, 0"))
            if isinstance(kind, Float):
                return Value(BOOL, self.make(f"fcmp une {kind.ir} {value.ref}, 0.0"))
        if isinstance(kind, Int) and isinstance(to, Int):
            if kind.bits == to.bits:
                return Value(to, value.ref)
            op = "trunc" if to.bits < kind.bits else "sext" if kind.signed else "zext"
            return Value(to, self.make(f"{op} {kind.ir} {value.ref} to {to.ir}"))
        if isinstance(kind, Int) and isinstance(to, Float):
            op = "sitofp" if kind.signed else "uitofp"
            return Value(to, self.make(f"{op} {kind.ir} {value.ref} to {to.ir}"))
        if isinstance(kind, Float) and isinstance(to, Int):
            op = "fptosi" if to.signed else "fptoui"
            return Value(to, self.make(f"{op} {kind.ir} {value.ref} to {to.ir}"))
        if isinstance(kind, Float) and isinstance(to, Float):
            op = "fpext" if to.bits > kind.bits else "fptrunc"
            return Value(to, self.make(f"{op} {kind.ir} {value.ref} to {to.ir}"))
        if to == VOID:
            return Value(VOID, "")
        raise self.error(f"the conversion of {kind} to {to}")

    def promoted(self, kind: Type) -> Type:
        return I32 if isinstance(kind, Int) and kind.bits < 32 else kind

    def common(self, a: Type, b: Type) -> Type:
        """The type in which C++ computes with two operands."""
        if isinstance(a, Float) or isinstance(b, Float):
            bits = max(t.bits for t in (a, b) if isinstance(t, Float))
            return F64 if bits == 64 else F32
        a, b = self.promoted(a), self.promoted(b)
        if not isinstance(a, Int) or not isinstance(b, Int):
            if a == b or isinstance(b, Ptr):
                return b
            if isinstance(a, Ptr):
                return a
            raise self.error(f"an operation on {a} and {b}")
        if a.bits != b.bits:
            return a if a.bits > b.bits else b
        return a if not a.signed else b

    # ---- expressions ----

    def expression(self) -> Value:
        value = self.assignment()
        while self.accept(","):
            value = self.assignment()
        return value

    def assignment(self) -> Value:
        left = self.conditional()
        op = self.text[self.at]
        if op not in _ASSIGN:
            return left
        self.at += 1
        if not left.lvalue:
            raise self.error("an assignment to what has no place")
        if op == "=":
            if self.text[self.at] == "{":
                self.initialise(left, left.type)
                return left
            right = self.assignment()
            self.store(left.ref, right, left.type)
            return left
        right = self.assignment()
        self.store(left.ref, self.operate(op[:-1], self.rvalue(left), right), left.type)
        return left

    def conditional(self) -> Value:
        condition = self.binary(0)
        if self.text[self.at] != "?":
            return condition
        self.at += 1
        condition = self.rvalue(condition)
        if condition.const is not None:
            # both are read, one is kept
            yes = self.assignment()
            self.expect(":")
            no = self.conditional()
            return yes if condition.const else no
        yes_label, no_label, end = self.new_label(), self.new_label(), self.new_label()
        self.branch(self.truth(condition), yes_label, no_label)
        self.block(yes_label)
        a, a_lines, a_label = self.captured(self.assignment)
        self.lines.append("")  # stands for what is emitted behind
        hole = len(self.lines) - 1
        self.expect(":")
        self.closed = True
        self.block(no_label)
        b, b_lines, b_label = self.captured(self.conditional)
        kind = a.type if a.type == b.type else self.common_value(a, b)
        a, a_more, _ = self.captured_from(a_label, lambda: self.convert_to(a, kind))
        self.lines[hole] = "\n".join([*a_lines, *a_more, f"  br label %{end}"])
        self.label = b_label
        self.lines += b_lines
        b = self.convert_to(b, kind)
        self.block(end)
        ir = "ptr" if kind.aggregate else kind.ir
        name = self.make(f"phi {ir} [ {a.ref}, %{a_label} ], [ {b.ref}, %{b_label} ]")
        return Value(kind, name, kind.aggregate)

    def convert_to(self, value: Value, kind: Type) -> Value:
        return value if kind.aggregate else self.convert(value, kind)

    def common_value(self, a: Value, b: Value) -> Type:
        if isinstance(a.type, Ptr) or isinstance(b.type, Ptr):
            return a.type if isinstance(a.type, Ptr) and b.const == 0 else b.type
        return self.common(a.type, b.type)

    def captured(self, read: Any) -> tuple[Value, list[str], str]:
        """A value, the lines that compute it, and the block in which they end."""
        lines, self.lines = self.lines, []
        value = self.rvalue(read())
        found, self.lines = self.lines, lines
        return value, found, self.label

    def captured_from(self, label: str, read: Any) -> tuple[Value, list[str], str]:
        before, self.label = self.label, label
        found = self.captured(read)
        self.label = before
        return found

    def binary(self, level: int) -> Value:
        if level == len(_LEVELS):
            return self.unary()
        left = self.binary(level + 1)
        while True:
            op = self.text[self.at]
            if op not in _LEVELS[level] or (self.angle and op in (">", ">>")):
                return left
            self.at += 1
            if op in ("&&", "||"):
                left = self.logical(op, left, level + 1)
            else:
                left = self.operate(op, left, self.binary(level + 1))

    def logical(self, op: str, left: Value, level: int) -> Value:
        left = self.convert(left, BOOL)
        if left.const is not None:
            right, lines, label = self.captured(lambda: self.binary(level))
            if bool(left.const) == (op == "&&"):
                self.lines += lines
                self.label = label
                return self.convert(right, BOOL)
            return left
        before = self.label
        more, end = self.new_label(), self.new_label()
        yes, no = (more, end) if op == "&&" else (end, more)
        self.branch(left.ref, yes, no)
        self.block(more)
        right = self.convert(self.binary(level), BOOL)
        last = self.label
        self.block(end)
        skipped = "false" if op == "&&" else "true"
        name = self.make(f"phi i1 [ {skipped}, %{before} ], [ {right.ref}, %{last} ]")
        return Value(BOOL, name)

    def operate(self, op: str, left: Value, right: Value) -> Value:
        left, right = self.rvalue(left), self.rvalue(right)
        if isinstance(left.type, Ptr) or isinstance(right.type, Ptr):
            return self.pointer_operation(op, left, right)
        if op in ("<<", ">>"):
            kind = self.promoted(left.type)
            right = self.convert(right, kind)
        else:
            kind = self.common(left.type, right.type)
        left, right = self.convert(left, kind), self.convert(right, kind)
        if left.const is not None and right.const is not None:
            folded = self.fold(op, left.const, right.const, kind)
            if folded is not None:
                return folded
        compares = ("==", "!=", "<", ">", "<=", ">=")
        if isinstance(kind, Float):
            ops = {"+": "fadd", "-": "fsub", "*": "fmul", "/": "fdiv"}
            if op in ops:
                return Value(kind, self.make(f"{ops[op]} {kind.ir} {left.ref}, {right.ref}"))
            test = dict(zip(compares, ("oeq", "une", "olt", "ogt", "ole", "oge"), strict=True))
            return Value(BOOL, self.make(f"fcmp {test[op]} {kind.ir} {left.ref}, {right.ref}"))
        if not isinstance(kind, Int):
            raise self.error(f"{op} on {kind}")
        sign = "s" if kind.signed else "u"
        wrap = " nsw" if kind.signed else ""
        if op in compares:
            tests = ("eq", "ne", f"{sign}lt", f"{sign}gt", f"{sign}le", f"{sign}ge")
            test = dict(zip(compares, tests, strict=True))
            return Value(BOOL, self.make(f"icmp {test[op]} {kind.ir} {left.ref}, {right.ref}"))
        ops = {"+": f"add{wrap}", "-": f"sub{wrap}", "*": f"mul{wrap}", "/": f"{sign}div",
               "%": f"{sign}rem", "&": "and", "|": "or", "^": "xor", "<<": "shl",
               ">>": "ashr" if kind.signed else "lshr"}  # fmt: skip
        return Value(kind, self.make(f"{ops[op]} {kind.ir} {left.ref}, {right.ref}"))

    def fold(self, op: str, a: int | float, b: int | float, kind: Type) -> Value | None:
        """The constant of an operation on constants; None for floats, which LLVM rounds."""
        compares = {"==": a == b, "!=": a != b, "<": a < b, ">": a > b, "<=": a <= b, ">=": a >= b}
        if op in compares:
            return self.constant_value(compares[op], BOOL)
        if not isinstance(kind, Int) or (op in "/%" and b == 0):
            return None
        x, y = int(a), int(b)
        quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) if y else 0
        results = {"+": x + y, "-": x - y, "*": x * y, "/": quotient, "%": x - quotient * y,
                   "&": x & y, "|": x | y, "^": x ^ y, "<<": x << max(0, y), ">>": x >> max(0, y)}
        return self.constant_value(results[op], kind)

    def pointer_operation(self, op: str, left: Value, right: Value) -> Value:
        if op in ("==", "!=", "<", ">", "<=", ">="):
            a, b = self.convert(left, Ptr(VOID)), self.convert(right, Ptr(VOID))
            test = {"==": "eq", "!=": "ne", "<": "ult", ">": "ugt", "<=": "ule", ">=": "uge"}[op]
            return Value(BOOL, self.make(f"icmp {test} ptr {a.ref}, {b.ref}"))
        if op == "+" and isinstance(right.type, Ptr):
            left, right = right, left
        assert isinstance(left.type, Ptr)
        if op == "+" or (op == "-" and isinstance(right.type, Int)):
            if op == "-":
                right = self.operate("-", self.constant_value(0, I64), self.convert(right, I64))
            return Value(left.type, self.element(left, right).ref)
        raise self.error(f"{op} on pointers")

    def unary(self) -> Value:
        token = self.text[self.at]
        if token in ("-", "+", "!", "~", "*", "&", "++", "--"):
            self.at += 1
            value = self.unary()
            if token == "*":
                return self.element(value, self.constant_value(0, I64))
            if token == "&":
                place = self.place_of(value)
                return Value(Ptr(place.type), place.ref)
            if token in ("++", "--"):
                self.step(value, token)
                return value
            value = self.rvalue(value)
            if token == "!":
                truth = self.convert(value, BOOL)
                if truth.const is not None:
                    return self.constant_value(not truth.const, BOOL)
                return Value(BOOL, self.make(f"xor i1 {truth.ref}, true"))
            kind = self.promoted(value.type)
            value = self.convert(value, kind)
            if token == "+":
                return value
            if isinstance(kind, Float):
                if value.const is not None:
                    return self.constant_value(-value.const, kind)
                return Value(kind, self.make(f"fneg {kind.ir} {value.ref}"))
            other = self.constant_value(0 if token == "-" else -1, kind)
            return self.operate("-" if token == "-" else "^", other, value)
        return self.postfix(self.primary())

    def step(self, place: Value, token: str) -> None:
        value = self.operate(token[0], place, self.constant_value(1, I32))
        self.store(place.ref, value, place.type)

    def postfix(self, value: Value) -> Value:
        while True:
            token = self.text[self.at]
            if token == "[":
                self.at += 1
                angle, self.angle = self.angle, 0
                index = self.rvalue(self.expression())
                self.angle = angle
                self.expect("]")
                value = self.element(value, index)
            elif token in (".", "->"):
                self.at += 1
                if token == "->":
                    value = self.element(value, self.constant_value(0, I64))
                value = self.access(value)
            elif token in ("++", "--"):
                self.at += 1
                before = self.rvalue(value)
                self.step(value, token)
                value = before
            elif token == "(":
                value = self.call_pointer(self.rvalue(value))
            else:
                return value

    def access(self, value: Value) -> Value:
        """``.name`` at the name."""
        kind = value.type
        if not isinstance(kind, Struct):
            raise self.error(f"a member of {kind}")
        name = self.text[self.at]
        self.at += 1
        fields = kind.layout["fields"]
        if name in fields:
            return self.member(value, fields[name])
        if name in kind.layout["methods"]:
            return self.method(value, kind, name)
        return self.static_member(kind, name)

    def method(self, this: Value, kind: Struct, name: str) -> Value:
        if (kind.name, name) == ("Barrier", "wait"):
            arguments = self.arguments()
            symbol = self.unit.library("qigen_barrier_wait")
            thread = self.convert(arguments[0], I32)
            self.line(f"call void @{symbol}(ptr {this.ref}, i32 {thread.ref})")
            return Value(VOID, "")
        return self.call_named(name, kind.layout["methods"][name], this)

    def static_member(self, kind: Struct, name: str) -> Value:
        found = kind.layout["statics"].get(name)
        if found is None:
            raise self.error(f"{kind.name}::{name}")
        start, base, default = found
        other = Emitter(self.unit, kind.layout["env"], kind)
        other.at = start
        _, declared, _ = other.declarator(base, False)
        other.at = default
        return other.convert(other.assignment(), declared)

    def primary(self) -> Value:
        token = self.text[self.at]
        if token == "(":
            self.at += 1
            angle, self.angle = self.angle, 0
            value = self.expression()
            self.angle = angle
            self.expect(")")
            return value
        if token[:1].isdigit() or (token[:1] == "." and token[1:2].isdigit()):
            self.at += 1
            return self.literal(token)
        if token.startswith('"'):
            self.at += 1
            return Value(Ptr(BASIC["char"]), self.unit.string(token))
        if token in ("true", "false"):
            self.at += 1
            return self.constant_value(token == "true", BOOL)
        if token == "nullptr":
            self.at += 1
            return Value(Ptr(VOID), "null", const=0)
        if token in ("static_cast", "reinterpret_cast", "const_cast"):
            return self.cast()
        if token == "sizeof":
            self.at += 2
            size = self.type_here().size
            self.expect(")")
            return self.constant_value(size, U64)
        if token == "this":
            self.at += 1
            assert self.owner is not None
            return Value(Ptr(self.owner), "%this")
        if token[:1].isalpha() or token[:1] == "_":
            return self.identifier()
        raise self.error(f"'{token}'")

    def type_here(self) -> Type:
        base, reference = self.base_type()
        return self.declarator(base, reference)[1]

    def cast(self) -> Value:
        bits = self.text[self.at] == "reinterpret_cast"
        self.at += 1
        self.expect("<")
        kind = self.type_here()
        self.expect(">")
        self.expect("(")
        angle, self.angle = self.angle, 0
        value = self.expression()
        self.angle = angle
        self.expect(")")
        if bits:
            return Value(kind, self.rvalue(value).ref)
        return self.convert(value, kind)

    def literal(self, token: str) -> Value:
        lower = token.lower()
        if lower.startswith("0x"):
            digits = lower.rstrip("ul")
            number, suffix = int(digits, 16), lower[len(digits) :]
            kind: Type = I32 if number < 1 << 31 else U32 if number < 1 << 32 else U64
        elif any(c in lower for c in ".e") or lower.endswith("f"):
            if lower.endswith("f"):
                return self.constant_value(float(lower[:-1]), F32)
            return self.constant_value(float(lower), F64)
        else:
            digits = lower.rstrip("ul")
            number, suffix = int(digits), lower[len(digits) :]
            kind = I32 if number < 1 << 31 else I64
        if "l" in suffix:
            kind = U64 if "u" in suffix or kind == U64 else I64
        elif "u" in suffix:
            kind = U32 if number < 1 << 32 else U64
        return self.constant_value(number, kind)

    def identifier(self) -> Value:
        text = self.text
        while text[self.at + 1] == "::" and text[self.at] in self.unit.namespaces:
            self.at += 2
        name = text[self.at]
        kind = self.named_type(name)
        if kind is not None:
            self.at += 1
            if isinstance(kind, StructDecl):
                kind = self.unit.struct(kind, tuple(self.template_arguments()))
            return self.of_type(kind)
        self.at += 1
        found = self.local(name)
        if isinstance(found, Value):
            return found
        if isinstance(found, Named):
            return self.call_thing(found.thing)
        if self.owner is not None:
            layout = self.owner.layout
            if name in layout["fields"]:
                return self.member(Value(self.owner, "%this", True), layout["fields"][name])
            if name in layout["statics"]:
                return self.static_member(self.owner, name)
            if name in layout["methods"]:
                this = Value(self.owner, "%this", True)
                return self.call_named(name, layout["methods"][name], this)
        if name in self.unit.globals:
            return self.unit.global_value(name)
        if name == "INT32_MIN":
            return self.constant_value(-(1 << 31), I32)
        if name == "INFINITY":
            return self.constant_value(math.inf, F32)
        if name in _SHIFTS:
            return self.shift(name)
        if name in self.unit.primitives and name not in self.unit.functions:
            return self.primitive(name)
        if name in self.unit.functions:
            return self.call_named(name, self.unit.functions[name], None)
        return self.builtin(name)

    def of_type(self, kind: Type) -> Value:
        """``T::member``, ``T(..)`` or ``T{..}``."""
        if self.accept("::"):
            if not isinstance(kind, Struct):
                raise self.error(f"a member of {kind}")
            name = self.text[self.at]
            self.at += 1
            if name in kind.layout["methods"]:
                return self.call_named(name, kind.layout["methods"][name], None)
            return self.static_member(kind, name)
        if self.text[self.at] == "(" and not isinstance(kind, Struct):
            self.at += 1
            value = self.convert(self.expression(), kind)
            self.expect(")")
            return value
        target = Value(kind, self.alloca(kind), True)
        if self.text[self.at] == "(":
            assert isinstance(kind, Struct)
            self.construct(target, kind)
        else:
            self.initialise(target, kind)
        return target

    # ---- calls ----

    def arguments(self) -> list[Value]:
        """The arguments at an opening bracket; a list in braces is a Value of type Named."""
        close = self.unit.match[self.at]
        self.at += 1
        angle, self.angle = self.angle, 0
        found: list[Value] = []
        while self.at < close:
            if self.text[self.at] == "{":
                found.append(Value(Named(self.at), ""))
                self.at = self.unit.match[self.at] + 1
            else:
                found.append(self.argument())
            self.accept(",")
        self.angle = angle
        self.at = close + 1
        return found

    def argument(self) -> Value:
        """An argument: names of functions and lambdas are themselves."""
        name = self.text[self.at]
        if self.text[self.at + 1] in (",", ")"):
            found = self.local(name)
            if isinstance(found, Named):
                self.at += 1
                return Value(found, "")
            if found is None and name in self.unit.functions:
                self.at += 1
                return Value(Named(self.unit.functions[name][0]), "")
        return self.assignment()

    def primitive(self, name: str) -> Value:
        if self.text[self.at] != "(":
            raise self.error(f"{name} as a value")
        result, kinds = self.unit.primitives[name]
        arguments = self.arguments()
        parts = [
            f"{kind.ir} {self.convert(a, kind).ref}"
            for kind, a in zip(kinds, arguments, strict=True)
        ]
        text = f"call {result.ir} @{name}({', '.join(parts)})"
        if result == VOID:
            self.line(text)
            return Value(VOID, "")
        return Value(result, self.make(text))

    def shift(self, name: str) -> Value:
        (count,) = self.template_arguments()
        (value,) = self.arguments()
        vector = self.unit.vectors["vi"]
        ref = self.convert(value, vector).ref
        text = f"{_SHIFTS[name]} {vector.ir} {ref}, splat (i32 {count.const})"
        return Value(vector, self.make(text))

    def builtin(self, name: str) -> Value:
        """Functions of the C and C++ libraries."""
        if self.text[self.at] != "(":
            raise self.error(name)
        if name == "memcpy":
            to, source, size = self.arguments()
            target, origin = self.convert(to, Ptr(VOID)), self.convert(source, Ptr(VOID))
            bytes_ = self.convert(size, U64)
            self.unit.intrinsic("void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)")
            self.line(f"call void @llvm.memcpy.p0.p0.i64(ptr {target.ref}, ptr {origin.ref}, "
                      f"i64 {bytes_.ref}, i1 false)")  # fmt: skip
            return Value(VOID, "")
        if name == "memset":
            to, byte, size = self.arguments()
            target, filled = self.convert(to, Ptr(VOID)), self.convert(byte, Int(8, False))
            bytes_ = self.convert(size, U64)
            self.unit.intrinsic("void @llvm.memset.p0.i64(ptr, i8, i64, i1)")
            self.line(f"call void @llvm.memset.p0.i64(ptr {target.ref}, i8 {filled.ref}, "
                      f"i64 {bytes_.ref}, i1 false)")  # fmt: skip
            return Value(VOID, "")
        arguments = [self.rvalue(a) for a in self.arguments()]
        kind = F64 if any(a.type == F64 for a in arguments) else F32
        values = [self.convert(a, kind) for a in arguments]
        intrinsics = {"sqrt": "sqrt", "fmax": "maxnum", "fmin": "minnum", "fabs": "fabs",
                      "nearbyint": "nearbyint"}  # fmt: skip
        operands = ", ".join(f"{kind.ir} {v.ref}" for v in values)
        if name in intrinsics:
            symbol = f"llvm.{intrinsics[name]}.f{kind.bits}"
            types = ", ".join(kind.ir for _ in values)
            self.unit.intrinsic(f"{kind.ir} @{symbol}({types})")
        else:
            symbol = f"{name}f" if kind == F32 else name
            if symbol not in LIBRARY:
                raise self.error(f"{symbol}()")
            self.unit.library(symbol)
        return Value(kind, self.make(f"call {kind.ir} @{symbol}({operands})"))

    def call_thing(self, thing: Any) -> Value:
        """A call of what a parameter or a variable stands for."""
        if isinstance(thing, FunctionDecl):
            return self.call(self.unit.instance(thing, {}), self.arguments(), None)
        assert isinstance(thing, Lambda)
        return self.expand(thing)

    def expand(self, thing: Lambda) -> Value:
        """The body of a lambda in place of its call."""
        arguments = self.arguments()
        after = self.at
        scopes, self.scopes = self.scopes, [*thing.scopes, {}]
        for place, argument in zip(thing.parameters, arguments, strict=True):
            name, kind, reference = self.parameter(*place)
            if reference or kind.aggregate:
                self.scopes[-1][name] = self.place_of(argument)
            else:
                slot = self.alloca(kind)
                self.store(slot, argument, kind)
                self.scopes[-1][name] = Value(kind, slot, True)
        returns = _Returns(self.new_label())
        self.returns.append(returns)
        self.at = thing.body
        self.statement()
        self.returns.pop()
        self.block(returns.label)
        self.scopes = scopes
        self.at = after
        if returns.place is None:
            return Value(VOID, "")
        return self.rvalue(returns.place)

    def call_pointer(self, value: Value) -> Value:
        kind = value.type
        if not isinstance(kind, Ptr) or not isinstance(kind.to, Function):
            raise self.error(f"a call of {kind}")
        signature = kind.to
        arguments = self.arguments()
        parts = self.passed(
            [("", t, r) for t, r in zip(signature.parameters, signature.references, strict=True)],
            arguments,
        )
        text = f"call {signature.result.ir} {value.ref}({', '.join(parts)})"
        if signature.result == VOID:
            self.line(text)
            return Value(VOID, "")
        return Value(signature.result, self.make(text))

    def call_named(self, name: str, decls: list[FunctionDecl], this: Value | None) -> Value:
        explicit: list[Any] = []
        if self.text[self.at] == "<" and any(d.template for d in decls):
            explicit = self.template_arguments()
        if self.text[self.at] != "(":
            instance = self.unit.instance(decls[0], self.bindings(decls[0], explicit, []))
            return Value(Ptr(instance.type), f"@{instance.symbol}")
        arguments = self.arguments()
        fitting = [d for d in decls if len(d.parameters) == len(arguments)]
        if not fitting:
            raise self.error(f"a call of {name} with {len(arguments)} arguments")
        decl = fitting[0]
        env = self.bindings(decl, explicit, arguments)
        return self.call(self.unit.instance(decl, env), arguments, this)

    def bindings(
        self, decl: FunctionDecl, explicit: list[Any], arguments: list[Value]
    ) -> dict[str, Any]:
        """Template parameters of a call: given, or found from the arguments."""
        env = {name: value for (_, name), value in zip(decl.template, explicit, strict=False)}
        for kind, name in decl.template[len(explicit) :]:
            for (start, end), argument in zip(decl.parameters, arguments, strict=False):
                words = self.text[start:end]
                if kind == "int" and words[-3:-1] == ["[", name]:
                    if isinstance(argument.type, Named):
                        count = len(self.unit.split(argument.type.thing))
                    elif isinstance(argument.type, Array):
                        count = argument.type.count
                    else:
                        continue
                    env[name] = self.constant_value(count, I32)
                elif kind in ("class", "typename") and name in words:
                    env[name] = self.rvalue(argument).type
                elif kind == "int" and f"< {name} >" in " ".join(words):
                    of = argument.type
                    while isinstance(of, Ptr | Array):
                        of = of.to if isinstance(of, Ptr) else of.of
                    if isinstance(of, Struct) and len(of.layout["decl"].template) == 1:
                        (env[name],) = of.layout["env"].values()
            if name not in env:
                raise self.error(f"the template argument {name} of {decl.name}")
        return env

    def passed(
        self, parameters: list[tuple[str, Type, bool]], arguments: list[Value]
    ) -> Iterator[str]:
        """Operands of a call."""
        for (_, kind, reference), argument in zip(parameters, arguments, strict=True):
            if isinstance(kind, Named):
                continue
            if isinstance(argument.type, Named):
                thing = argument.type.thing
                if isinstance(thing, FunctionDecl):
                    yield f"ptr @{self.unit.instance(thing, {}).symbol}"
                    continue
                target = Value(kind, self.alloca(kind), True)
                before, self.at = self.at, thing
                self.initialise(target, kind)
                self.at = before
                yield f"ptr {target.ref}"
            elif reference:
                place = argument
                if not argument.lvalue or (argument.type != kind and not kind.aggregate):
                    place = self.place_of(self.convert(argument, kind))
                yield f"ptr {place.ref}"
            elif kind.aggregate:
                copy = self.alloca(kind)
                self.store(copy, argument, kind)
                yield f"ptr {copy}"
            else:
                yield f"{kind.ir} {self.convert(argument, kind).ref}"

    def call(self, instance: Instance, arguments: list[Value], this: Value | None) -> Value:
        decl = instance.decl
        parts = list(self.passed(instance.parameters, arguments))
        if decl.owner is not None and not decl.static:
            assert this is not None
            parts.insert(0, f"ptr {this.ref}")
        result = instance.result
        if result.aggregate:
            target = self.alloca(result)
            parts.insert(0, f"ptr {target}")
            self.line(f"call void @{instance.symbol}({', '.join(parts)})")
            return Value(result, target, True)
        text = f"call {result.ir} @{instance.symbol}({', '.join(parts)})"
        if isinstance(result, Void):
            self.line(text)
            return Value(VOID, "")
        return Value(result, self.make(text))


class _Returns:
    """Where the returns of a lambda that is expanded go; the first one decides the type."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.place: Value | None = None

    def add(self, emitter: Emitter) -> None:
        if not emitter.accept(";"):
            value = emitter.rvalue(emitter.expression())
            emitter.expect(";")
            if self.place is None:
                self.place = Value(value.type, emitter.alloca(value.type), True)
            emitter.store(self.place.ref, value, self.place.type)
        emitter.jump(self.label)
