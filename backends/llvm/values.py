"""Values and places: memory, constants, conversions by the rules of C++."""

from __future__ import annotations

import struct as binary

from qigen.backends.llvm.code import Code
from qigen.backends.llvm.things import Value
from qigen.backends.llvm.types import (
    BOOL,
    F32,
    F64,
    I32,
    I64,
    VOID,
    Array,
    Field,
    Float,
    Int,
    Ptr,
    Type,
)


def float_text(value: float, bits: int) -> str:
    """A float constant as LLVM reads it: the bits of the double."""
    if bits == 32:
        value = binary.unpack("<f", binary.pack("<f", value))[0]
    return f"0x{binary.unpack('<Q', binary.pack('<d', value))[0]:016X}"


class Values(Code):
    """Loads, stores, addresses of members and elements, conversions."""

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
