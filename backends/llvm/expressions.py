"""Expressions: operators, conditions, casts, literals, members."""

from __future__ import annotations

from typing import Any

from qigen.backends.llvm.names import Names
from qigen.backends.llvm.things import Value
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
    Float,
    Int,
    Ptr,
    Struct,
    Type,
)

_LEVELS: tuple[tuple[str, ...], ...] = (
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<", ">", "<=", ">="), ("<<", ">>"),
    ("+", "-"), ("*", "/", "%"),
)  # fmt: skip
_ASSIGN = frozenset(("=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>="))


class Expressions(Names):
    """Reads expressions and emits them while they are read."""

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
        other = type(self)(self.unit, kind.layout["env"], kind)
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
