"""Names in expressions and calls: functions, templates, lambdas, primitives, the C library."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from qigen.backends.llvm.expressions import Expressions
from qigen.backends.llvm.things import (
    LIBRARY,
    FunctionDecl,
    Instance,
    Lambda,
    StructDecl,
    Value,
)
from qigen.backends.llvm.types import (
    F32,
    F64,
    I32,
    U64,
    VOID,
    Array,
    Function,
    Int,
    Named,
    Ptr,
    Struct,
    Type,
    Void,
)

_SHIFTS = {"vi_srl": "lshr", "vi_sll": "shl", "vi_sra": "ashr"}


class Calls(Expressions):
    """Reads what a name stands for, and calls."""

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
        if name not in self.unit.functions:
            if f"{name}_1" in self.unit.primitives:  # one for every value of its parameter
                (number,) = self.template_arguments()
                return self.primitive(f"{name}_{number.const}")
            if name in self.unit.primitives:
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
        returns = Returns(self.new_label())
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


class Returns:
    """Where the returns of a lambda that is expanded go; the first one decides the type."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.place: Value | None = None

    def add(self, emitter: Calls) -> None:
        if not emitter.accept(";"):
            value = emitter.rvalue(emitter.expression())
            emitter.expect(";")
            if self.place is None:
                self.place = Value(value.type, emitter.alloca(value.type), True)
            emitter.store(self.place.ref, value, self.place.type)
        emitter.jump(self.label)
