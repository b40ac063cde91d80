"""Types of the translated C++, as LLVM sees them. Structs are bytes: fields have offsets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Type:
    """What all types have: the type of a register and that in memory, size and alignment."""

    @property
    def ir(self) -> str:
        raise NotImplementedError

    @property
    def memory(self) -> str:
        return self.ir

    @property
    def size(self) -> int:
        raise NotImplementedError

    @property
    def align(self) -> int:
        return self.size

    @property
    def aggregate(self) -> bool:
        """Whether values are kept in memory."""
        return False


@dataclass(frozen=True)
class Unsized(Type):
    """What has no values in memory: pointers to it count bytes."""

    @property
    def memory(self) -> str:
        return "i8"

    @property
    def size(self) -> int:
        return 1


@dataclass(frozen=True)
class Void(Unsized):
    @property
    def ir(self) -> str:
        return "void"


@dataclass(frozen=True)
class Int(Type):
    bits: int
    signed: bool = True

    @property
    def ir(self) -> str:
        return f"i{self.bits}"

    @property
    def memory(self) -> str:
        return "i8" if self.bits == 1 else self.ir

    @property
    def size(self) -> int:
        return max(1, self.bits // 8)


@dataclass(frozen=True)
class Float(Type):
    bits: int

    @property
    def ir(self) -> str:
        return "float" if self.bits == 32 else "double"

    @property
    def size(self) -> int:
        return self.bits // 8


@dataclass(frozen=True)
class Vector(Type):
    """A vector of the primitives."""

    name: str
    text: str
    bytes: int

    @property
    def ir(self) -> str:
        return self.text

    @property
    def size(self) -> int:
        return self.bytes

    @property
    def align(self) -> int:
        return 64


@dataclass(frozen=True)
class Ptr(Type):
    to: Type

    @property
    def ir(self) -> str:
        return "ptr"

    @property
    def size(self) -> int:
        return 8


@dataclass(frozen=True)
class Array(Type):
    of: Type
    count: int

    @property
    def ir(self) -> str:
        return f"[{self.count} x {self.of.memory}]"

    @property
    def size(self) -> int:
        return self.of.size * self.count

    @property
    def align(self) -> int:
        return self.of.align

    @property
    def aggregate(self) -> bool:
        return True


@dataclass(frozen=True)
class Function(Unsized):
    """The type of a function; ``references`` says which parameters are references."""

    result: Type
    parameters: tuple[Type, ...]
    references: tuple[bool, ...]

    @property
    def ir(self) -> str:
        return "ptr"


@dataclass(frozen=True)
class Named(Type):
    """A thing that exists only while code is translated: a function or a lambda as an argument."""

    thing: Any = field(compare=True)


@dataclass(frozen=True)
class Field:
    name: str
    type: Type
    offset: int
    reference: bool
    default: int | None
    """Token at which its initial value begins."""


@dataclass(eq=False, frozen=True)
class Struct(Type):
    """An instance of a struct: ``layout`` is filled when its members are first asked for."""

    name: str
    layout: dict[str, Any] = field(default_factory=dict)

    @property
    def ir(self) -> str:
        return f"[{self.size} x i8]"

    @property
    def size(self) -> int:
        return int(self.layout["size"])

    @property
    def align(self) -> int:
        return int(self.layout["align"])

    @property
    def aggregate(self) -> bool:
        return True


VOID = Void()
BOOL = Int(1, False)
I32 = Int(32)
U32 = Int(32, False)
I64 = Int(64)
U64 = Int(64, False)
F32 = Float(32)
F64 = Float(64)
CHAR = Int(8)

BASIC: dict[str, Type] = {
    "void": VOID, "bool": BOOL, "char": CHAR, "int": I32, "float": F32, "double": F64,
    "int8_t": Int(8), "int16_t": Int(16), "int32_t": I32, "int64_t": I64,
    "uint8_t": Int(8, False), "uint16_t": Int(16, False), "uint32_t": U32, "uint64_t": U64,
    "size_t": U64, "unsigned": U32,
}  # fmt: skip
