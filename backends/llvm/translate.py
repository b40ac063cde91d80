"""The C++ that the templates render, as LLVM IR.

The kernels, the operators and the step of a model are written once, as templates of C++ over the
primitives of an ISA. This is a compiler for just that part of C++: namespaces (names are unique
without them), structs with methods, templates over integers and types, lambdas that are expanded
where they are called, references, arrays, the usual statements. What it does not know raises
Unsupported with the place.

Text goes to IR in one pass: an expression is emitted while it is read. Bodies of functions are read
when something calls them, once for every instance of a template. Locals that never change are SSA
values, others are allocas, which LLVM turns into registers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from qigen.backends.llvm.emit import Emitter
from qigen.backends.llvm.things import (
    LIBRARY,
    FunctionDecl,
    Instance,
    StructDecl,
    Value,
)
from qigen.backends.llvm.tokens import Tokens
from qigen.backends.llvm.types import (
    BOOL,
    F32,
    I32,
    VOID,
    Array,
    Field,
    Named,
    Ptr,
    Struct,
    Type,
    Vector,
)
from qigen.errors import Unsupported

_INTERNAL = frozenset(("static", "inline"))


def _matches(text: list[str]) -> dict[int, int]:
    """For every opening bracket, where it is closed."""
    found: dict[int, int] = {}
    stack: list[int] = []
    for i, token in enumerate(text):
        if token in ("(", "[", "{"):
            stack.append(i)
        elif token in (")", "]", "}"):
            found[stack.pop()] = i
    return found


class Unit:
    """A translation unit; :meth:`translate` gives its IR without the primitives."""

    def __init__(self, tokens: Tokens, primitives: str, prefix: str) -> None:
        self.text = [*tokens.text, "", ""]
        self.place = tokens.place
        self.match = _matches(tokens.text)
        self.prefix = prefix
        self.namespaces = {"std"}
        self.opaque: set[str] = set()
        """Structs that are only declared."""
        self.functions: dict[str, list[FunctionDecl]] = {}
        self.structs: dict[str, StructDecl] = {}
        self.aliases: dict[str, int] = {}
        self.globals: dict[str, tuple[int, bool]] = {}
        self.values: dict[str, Value] = {}
        self.primitives: dict[str, tuple[Type, tuple[Type, ...]]] = {}
        self.vectors = _vectors(primitives)
        self.output: list[str] = []
        self.instances: dict[tuple[Any, ...], Instance] = {}
        self.queue: list[Instance] = []
        self.declared: dict[str, str] = {}
        self.strings = 0
        self._primitives(primitives)

    def _primitives(self, text: str) -> None:
        by_ir: dict[str, Type] = {v.ir: v for v in self.vectors.values()}
        by_ir |= {"ptr": Ptr(VOID), "i32": I32, "float": F32, "void": VOID, "i1": BOOL}
        for result, name, inner in re.findall(
            r"^define internal (.+?) @(\w+)\((.*?)\) (?:alwaysinline|noinline)", text, re.MULTILINE
        ):
            kinds = [re.sub(r" %\w+$", "", p).strip() for p in re.split(r",(?![^<{]*[>}])", inner)]
            if all(k in by_ir for k in (result, *kinds) if k):
                self.primitives[name] = (by_ir[result], tuple(by_ir[k] for k in kinds if k))

    def error(self, message: str, at: int) -> Unsupported:
        file, line = self.place[min(at, len(self.place) - 1)]
        return Unsupported(f"the llvm backend cannot translate {message}", f"{file}:{line}")

    def translate(self) -> str:
        """The IR of all functions and data that other units see, and of what they need."""
        self._declarations(0, len(self.place), False)
        for decls in list(self.functions.values()):
            for decl in decls:
                if decl.body is not None and not decl.template and not decl.internal:
                    self.instance(decl, {})
        for name, (_, exported) in list(self.globals.items()):
            if exported:
                self.global_value(name)
        while self.queue:
            instance = self.queue.pop()
            self.output.append(Emitter(self, instance.env, instance.decl.owner).function(instance))
        return "\n".join([*self.declared.values(), *self.output, ""])

    # ---- declarations ----

    def _declarations(self, at: int, end: int, internal: bool, plain: bool = False) -> None:
        text = self.text
        while at < end:
            token = text[at]
            if token == ";":
                at += 1
            elif token == "namespace":
                open_ = at + 1
                while text[open_] != "{":
                    self.namespaces.add(text[open_])
                    open_ += 1
                close = self.match[open_]
                self._declarations(open_ + 1, close, internal or open_ == at + 1)
                at = close + 1
            elif token == "using":
                if text[at + 2] == "=":
                    self.aliases[text[at + 1]] = at + 3
                at = self.until(at, ";") + 1
            elif token == "static_assert":
                at = self.until(at, ";") + 1
            else:
                at = self._declaration(at, internal, plain)

    def until(self, at: int, *ends: str) -> int:
        """The first of some tokens from ``at`` on that is in no bracket."""
        while self.text[at] not in ends:
            at = self.match.get(at, at) + 1
            if at >= len(self.text):
                raise self.error("a declaration without an end", at)
        return at

    def _template(self, at: int) -> tuple[int, list[tuple[str, str]]]:
        """(token behind ``template <..>``, its parameters)."""
        parameters: list[tuple[str, str]] = []
        at += 2
        first = at
        while True:
            token = self.text[at]
            if token in (",", ">"):
                words = self.text[first:at]
                parameters.append((" ".join(words[:-1]), words[-1]))
                if token == ">":
                    return at + 1, parameters
                first = at + 1
            at = self.match.get(at, at) + 1

    def _declaration(self, at: int, internal: bool, exported: bool) -> int:
        text = self.text
        template: list[tuple[str, str]] = []
        if text[at] == "template":
            at, template = self._template(at)
        if text[at] == "extern" and text[at + 1].startswith('"'):
            at += 2
            exported = True
            if text[at] == "{":
                close = self.match[at]
                self._declarations(at + 1, close, internal, True)
                return close + 1
        if text[at] in ("struct", "class") and text[at + 2] in ("{", ";", ":"):
            if text[at + 2] == ";":
                self.opaque.add(text[at + 1])
                return at + 3
            body = self.until(at, "{")
            self.structs[text[at + 1]] = StructDecl(text[at + 1], body, template)
            return self.match[body] + 2
        decl = self.function_at(at, template)
        if decl is not None:
            decl.internal |= internal
            decl.plain = exported
            known = self.functions.setdefault(decl.name, [])
            for i, other in enumerate(known):
                if len(other.parameters) == len(decl.parameters) and not other.template:
                    if decl.body is not None:
                        known[i] = decl
                    break
            else:
                known.append(decl)
            return (self.match[decl.body] if decl.body else self.until(at, ";")) + 1
        # a variable: its name stands before the initial value or the dimensions
        stop = at
        while text[stop] not in ("=", ";", "{") and not (
            text[stop] == "[" and text[stop + 1] != "["
        ):
            stop = self.match.get(stop, stop) + 1
        name = text[stop - 1]
        value = text[self.until(stop, "=", ";", "{")] != ";"
        if value or name not in self.globals:
            self.globals[name] = (at, exported and value)
        return self.until(stop, ";") + 1

    def function_at(
        self, at: int, template: list[tuple[str, str]], owner: Struct | None = None
    ) -> FunctionDecl | None:
        """The function that is declared at a token; None if that is something else."""
        text, start = self.text, at
        words: set[str] = set()
        while text[at] not in ("=", ";", "{"):
            if text[at] == "(":
                before = text[at - 1]
                if before in ("alignas", "__attribute__"):
                    at = self.match[at] + 1
                    continue
                if text[at + 1] in ("*", "&") or before == "operator":
                    return None
                close = self.match[at]
                tail = close + 1
                while text[tail] in ("const", "noexcept", "override"):
                    tail += 1
                initialisers: dict[str, int] = {}
                while text[tail] == (":" if not initialisers else ","):
                    initialisers[text[tail + 1]] = tail + 2
                    if text[tail + 2] not in ("(", "{"):
                        raise self.error("an initialiser of what is no field", tail + 1)
                    tail = self.match[tail + 2] + 1
                body = tail if text[tail] == "{" else None
                return FunctionDecl(
                    before, start, self.split(at), body, template, owner,
                    owner is not None and before == owner.layout["decl"].name,
                    "static" in words, owner is not None or not words.isdisjoint(_INTERNAL),
                    initialisers=initialisers,
                )  # fmt: skip
            if text[at] == "<":
                depth = 0
                while True:
                    depth += {"<": 1, ">": -1, ">>": -2}.get(text[at], 0)
                    at += 1
                    if depth <= 0:
                        break
                continue
            words.add(text[at])
            at = self.match.get(at, at) + 1
        return None

    def split(self, open_: int) -> list[tuple[int, int]]:
        """Token ranges of what commas part between an opening bracket and its end."""
        close = self.match[open_]
        parts, at, first, angle = [], open_ + 1, open_ + 1, 0
        while at < close:
            token = self.text[at]
            if token == "<" and self.text[at - 1][0].isalpha():
                angle += 1
            elif token == ">" and angle:
                angle -= 1
            elif token == "," and not angle:
                parts.append((first, at))
                first = at + 1
            at = self.match.get(at, at) + 1
        if first < close:
            parts.append((first, close))
        return parts

    # ---- structs ----

    def struct(self, decl: StructDecl, arguments: tuple[Any, ...]) -> Struct:
        """The instance of a struct for template arguments."""
        key = tuple(a.const if isinstance(a, Value) else a for a in arguments)
        if key not in decl.instances:
            suffix = "_".join(map(str, key))
            made = Struct(f"{decl.name}_{suffix}" if suffix else decl.name)
            decl.instances[key] = made
            env = dict(zip((n for _, n in decl.template), arguments, strict=True))
            made.layout.update(decl=decl, env=env, fields={}, statics={}, methods={}, types={},
                               constructors=[])  # fmt: skip
            self._members(made)
        return decl.instances[key]

    def _members(self, made: Struct) -> None:
        layout = made.layout
        decl: StructDecl = layout["decl"]
        text = self.text
        at, end = decl.body + 1, self.match[decl.body]
        size, align = 0, 1
        while at < end:
            if text[at] == ";":
                at += 1
                continue
            if text[at] in ("public", "private", "protected") and text[at + 1] == ":":
                at += 2
                continue
            if text[at] == "using":
                layout["types"][text[at + 1]] = at + 3
                at = self.until(at, ";") + 1
                continue
            template: list[tuple[str, str]] = []
            if text[at] == "template":
                at, template = self._template(at)
            method = self.function_at(at, template, made)
            if method is not None:
                if method.constructor:
                    if method.body is not None:
                        layout["constructors"].append(method)
                else:
                    layout["methods"].setdefault(method.name, []).append(method)
                at = (self.match[method.body] if method.body else self.until(at, ";")) + 1
                continue
            if "operator" in text[at : self.until(at, ";", "{")]:
                at = self.until(at, ";") + 1
                continue
            emitter = Emitter(self, layout["env"], made)
            emitter.at = at
            spec = emitter.specifiers()
            alignment = emitter.alignment
            base, reference = emitter.base_type()
            while True:
                start = emitter.at
                name, kind, is_ref = emitter.declarator(base, reference)
                default = None
                if text[emitter.at] in ("=", "{"):
                    default = emitter.at + (text[emitter.at] == "=")
                    emitter.at = self.until(emitter.at, ",", ";")
                if "static" in spec:
                    layout["statics"][name] = (start, base, default)
                else:
                    stored: Type = Ptr(kind) if is_ref else kind
                    unit = max(stored.align, alignment)
                    size = -(-size // unit) * unit
                    layout["fields"][name] = Field(name, kind, size, is_ref, default)
                    size += stored.size
                    align = max(align, unit)
                if text[emitter.at] == ";":
                    break
                emitter.at += 1
                while text[emitter.at] in ("*", "&"):  # of each name its own
                    emitter.at += 1
            at = emitter.at + 1
        layout["size"], layout["align"] = max(1, -(-size // align) * align), align

    # ---- values and functions ----

    def global_value(self, name: str) -> Value:
        """The constant or the variable of a name."""
        if name in self.values:
            return self.values[name]
        start, exported = self.globals[name]
        emitter = Emitter(self, {}, None)
        emitter.at = start
        emitter.specifiers()
        base, _ = emitter.base_type()
        declared, kind, _ = emitter.declarator(base, False)
        symbol = declared if exported or self.text[emitter.at] == ";" else f"{self.prefix}{name}"
        self.values[name] = Value(kind, f"@{symbol}", True)
        if self.text[emitter.at] == ";":
            self.declared[symbol] = f"@{symbol} = external hidden constant i8"
            return self.values[name]
        emitter.at += self.text[emitter.at] == "="
        if not kind.aggregate and not exported:
            value = emitter.convert(emitter.assignment(), kind)
            if value.const is None and not value.ref.startswith("@") and value.ref != "null":
                # its instructions would be in no function
                raise emitter.error(f"{name} is no constant; write out what it is computed of")
            self.values[name] = value
            return value
        linkage = "hidden" if exported else "internal"
        kind = self.data(symbol, linkage, kind, emitter)
        self.values[name] = Value(kind, f"@{symbol}", True)
        return self.values[name]

    def data(self, symbol: str, linkage: str, kind: Type, emitter: Emitter) -> Type:
        """Emit constant data from the initial value where the emitter is; gives its whole type."""
        if isinstance(kind, Array) and kind.count < 0:
            kind = Array(kind.of, emitter.count_elements())
        parts: list[tuple[int, str, str, int]] = []
        emitter.constant(kind, 0, parts)
        fields, at = [], 0
        for offset, ir, text, size in parts:
            if offset > at:
                fields.append((f"[{offset - at} x i8]", "zeroinitializer"))
            fields.append((ir, text))
            at = offset + size
        if at < kind.size:
            fields.append((f"[{kind.size - at} x i8]", "zeroinitializer"))
        body = ", ".join(f"{ir} {text}" for ir, text in fields)
        types = ", ".join(ir for ir, _ in fields)
        self.output.append(
            f"@{symbol} = {linkage} constant <{{ {types} }}> <{{ {body} }}>, align "
            f"{max(kind.align, emitter.alignment, 16)}"
        )
        return kind

    def string(self, token: str) -> str:
        """The data of a string literal."""
        raw = ast.literal_eval("b" + token) + b"\0"
        name = f"{self.prefix}string{self.strings}"
        self.strings += 1
        text = "".join(f"\\{b:02X}" for b in raw)
        self.output.append(f'@{name} = internal constant [{len(raw)} x i8] c"{text}"')
        return f"@{name}"

    def instance(self, decl: FunctionDecl, env: Mapping[str, Any]) -> Instance:
        """A function for template arguments; its body is emitted later."""
        key = (decl, *(v.const if isinstance(v, Value) else v for v in env.values()))
        found = self.instances.get(key)
        if found is not None:
            return found
        owner = decl.owner
        whole = {**(owner.layout["env"] if owner else {}), **env}
        emitter = Emitter(self, whole, owner)
        emitter.at = decl.start
        result: Type = VOID
        if not decl.constructor:
            emitter.specifiers()
            result, reference = emitter.base_type()
            if reference:
                raise self.error("functions that return references", decl.start)
        parameters = [emitter.parameter(*place) for place in decl.parameters]
        name = f"{owner.name}.{decl.name}" if owner else decl.name
        if env or decl.internal:
            name = f"{name}.{len(self.instances)}"
        exported = not decl.internal and not env
        symbol = name if decl.plain else f"{self.prefix}{name}"
        found = Instance(decl, symbol, result, parameters, whole)
        self.instances[key] = found
        if decl.body is None:
            if not exported:
                raise self.error(f"{decl.name}, which has no body", decl.start)
            self.declared[found.symbol] = f"declare hidden {self.signature(found)}"
        else:
            self.queue.append(found)
        return found

    def signature(self, instance: Instance, names: bool = False) -> str:
        """Result, symbol and parameters as IR."""
        result = instance.result
        parts = []
        if result.aggregate:
            parts.append("ptr noalias nonnull %result" if names else "ptr")
        if instance.decl.owner and not instance.decl.static:
            parts.append("ptr nonnull %this" if names else "ptr")
        for i, (_, kind, reference) in enumerate(instance.parameters):
            if isinstance(kind, Named):
                continue
            ir = "ptr" if reference or kind.aggregate else kind.ir
            parts.append(f"{ir} %arg{i}" if names else ir)
        shown = "void" if result.aggregate else result.ir
        return f"{shown} @{instance.symbol}({', '.join(parts)})"

    def library(self, name: str) -> str:
        """The symbol of a function of the library, declared."""
        result, parameters = LIBRARY[name]
        self.declared[name] = (
            f"declare {result.ir} @{name}({', '.join(p.ir for p in parameters)}) nounwind"
        )
        return name

    def intrinsic(self, text: str) -> None:
        """Declare an intrinsic."""
        self.declared[text] = f"declare {text}"


def _vectors(primitives: str) -> dict[str, Vector]:
    found = re.search(r"^%vq = type \{(.*)\}", primitives, re.MULTILINE)
    wide = 128 if found and "i16" in found[1] else 64
    return {
        "vf": Vector("vf", "<16 x float>", 64), "vi": Vector("vi", "<16 x i32>", 64),
        "vm": Vector("vm", "<16 x i1>", 64), "vq": Vector("vq", "%vq", wide),
        "vb32": Vector("vb32", "%vb32", 128), "vb64": Vector("vb64", "%vb64", 256),
        "vf4": Vector("vf4", "%vf4", 256), "vi4": Vector("vi4", "%vi4", 256),
        "vft": Vector("vft", "%vft", 256 if re.search(r"^%vft .*i32", primitives, re.M) else 64),
    }  # fmt: skip
