"""Bodies of functions: statements, emitted as IR while they are read.

The layers below, from the ground: ``code`` (lines and tokens), ``values`` (memory, conversions),
``names`` (types), ``expressions``, ``calls``, ``initial`` (initial values).
"""

from __future__ import annotations

from qigen.backends.llvm.initial import Initial
from qigen.backends.llvm.things import AUTO, Instance, Lambda, Value
from qigen.backends.llvm.types import (
    I64,
    VOID,
    Array,
    Named,
    Ptr,
    Struct,
    Type,
)


class Emitter(Initial):
    """Reads tokens from ``at`` on and emits the IR of one function (or evaluates constants)."""

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
