"""Names and types: what a name is, specifiers, declarators, template arguments."""

from __future__ import annotations

from typing import Any

from qigen.backends.llvm.things import AUTO, StructDecl
from qigen.backends.llvm.types import (
    BASIC,
    VOID,
    Array,
    Function,
    Named,
    Ptr,
    Type,
)
from qigen.backends.llvm.values import Values

_SKIPPED = frozenset(("const", "volatile", "typename", "struct", "class", "explicit", "inline",
                      "static", "constexpr", "extern"))  # fmt: skip


class Names(Values):
    """Reads types and declarators."""

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
        other = type(self)(self.unit, {}, self.owner)
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
