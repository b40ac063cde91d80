"""Puts object files into a copy of a shared library: the linker of models without a compiler.

The library (``runtime/host``) is the runtime with an empty place for a model's description and a
table of the functions that a model's code may call. The code and data of the objects become two
segments behind its own, their references are resolved here, and pointers in data are added to the
library's relocations. What comes out is an ordinary ELF library, which any loader takes.

System V ABI, AMD64 supplement: relocation types; ELF-64 object file format: the structures.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qigen.errors import ToolchainError

_PAGE = 4096
_ALLOC, _WRITE, _EXEC = 2, 1, 4
_SYMTAB, _RELA, _NOBITS, _NOTE = 2, 4, 8, 7
_PT_LOAD, _PT_DYNAMIC, _PT_PHDR = 1, 2, 6
_DT_RELA, _DT_RELASZ, _DT_RELACOUNT = 7, 8, 0x6FFFFFF9
_RELATIVE = 8
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_IMPORT = struct.Struct("<24sQ")

DESCRIPTION = "qigen_model_description"


@dataclass
class _Section:
    name: str
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    at: int = 0
    """Address in the result."""


@dataclass
class _Object:
    """An ELF file with its sections."""

    data: bytes
    name: str
    sections: list[_Section] = field(default_factory=list)

    def __post_init__(self) -> None:
        data = self.data
        if data[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", data, 18)[0] != 62:
            raise ToolchainError("this is no ELF file for x86-64", self.name)
        offset, = struct.unpack_from("<Q", data, 40)
        _, count, names = struct.unpack_from("<HHH", data, 58)
        rows = [_SECTION.unpack_from(data, offset + i * _SECTION.size) for i in range(count)]
        table = rows[names][4]
        for name, kind, flags, address, at, size, link, info, align, _ in rows:
            text = data[table + name : data.index(b"\0", table + name)].decode()
            self.sections.append(
                _Section(text, kind, flags, address, at, size, link, info, max(1, align))
            )

    def section(self, name: str) -> _Section:
        for section in self.sections:
            if section.name == name:
                return section
        raise ToolchainError(f"it has no section {name}: install qigen again", self.name)

    def symbols(self) -> list[tuple[str, int, int, int, int]]:
        """(name, binding, section, value, size) of all symbols."""
        found = []
        for section in self.sections:
            if section.type != _SYMTAB:
                continue
            strings = self.sections[section.link].offset
            for at in range(section.offset, section.offset + section.size, _SYMBOL.size):
                name, info, _, index, value, size = _SYMBOL.unpack_from(self.data, at)
                start = strings + name
                text = self.data[start : self.data.index(b"\0", start)].decode()
                found.append((text, info >> 4, index, value, size))
        return found

    def kept(self) -> Iterator[_Section]:
        """Sections with code and data that the result needs; nothing here is unwound."""
        for section in self.sections:
            if (section.flags & _ALLOC and section.type != _NOTE and section.size
                    and not section.name.startswith(".eh_frame")):  # fmt: skip
                yield section


class _Image:
    """Bytes from an address on."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.bytes = bytearray()

    def append(self, data: bytes, align: int) -> int:
        self.bytes += bytes(-len(self.bytes) % align)
        self.bytes += data
        return self.address + len(self.bytes) - len(data)

    def holds(self, address: int) -> bool:
        return self.address <= address < self.address + len(self.bytes)


def attach(host: bytes, objects: Sequence[tuple[str, bytes]]) -> bytes:
    """The library ``host`` with the model whose objects (name, content) are given.

    Raises ToolchainError for a symbol that nothing defines and for references that cannot be
    resolved.
    """
    base = _Object(host, "the runtime's library")
    segments = _segments(host)
    top = max(s[3] + s[6] for s in segments if s[0] == _PT_LOAD)
    files = [_Object(data, name) for name, data in objects]

    code = _Image(-(-top // _PAGE) * _PAGE)
    for file in files:
        for section in file.kept():
            if not section.flags & _WRITE:
                section.at = code.append(_content(file, section), section.align)
    data = _Image(-(-(code.address + len(code.bytes)) // _PAGE) * _PAGE)
    for file in files:
        for section in file.kept():
            if section.flags & _WRITE:
                section.at = data.append(_content(file, section), section.align)

    resolve = _Resolver(base, files, data)
    relative: list[tuple[int, int]] = []
    for file in files:
        relative += _relocate(file, resolve, code, data)
    relative += [(slot, target) for target, slot in resolve.slots.items()]

    out = bytearray(host)
    relative += _describe(out, base, resolve.description, data, relative)
    return _finish(out, segments, code, data, relative)


def _content(file: _Object, section: _Section) -> bytes:
    if section.type == _NOBITS:
        return bytes(section.size)
    return file.data[section.offset : section.offset + section.size]


def _segments(data: bytes) -> list[tuple[int, ...]]:
    offset, = struct.unpack_from("<Q", data, 32)
    count, = struct.unpack_from("<H", data, 56)
    return [_SEGMENT.unpack_from(data, offset + i * _SEGMENT.size) for i in range(count)]


class _Resolver:
    """Addresses of symbols: of the objects themselves, and of what the host offers."""

    def __init__(self, base: _Object, files: Sequence[_Object], data: _Image) -> None:
        self.data = data
        self.slots: dict[int, int] = {}
        """Places in ``data`` that hold an address, for code that loads it from memory."""
        self.imports = _imports(base)
        self.globals: dict[str, int] = {}
        self.tables = {id(file): file.symbols() for file in files}
        self.description: tuple[int, int] | None = None
        for file in files:
            for name, binding, index, value, size in self.tables[id(file)]:
                if binding == 0 or index == 0 or index >= 0xFF00:
                    continue
                if name in self.globals:
                    raise ToolchainError(f"{name} is defined twice", file.name)
                self.globals[name] = file.sections[index].at + value
                if name == DESCRIPTION:
                    self.description = self.globals[name], size

    def address(self, file: _Object, symbol: int) -> int:
        name, binding, index, value, _ = self.tables[id(file)][symbol]
        if index and index < 0xFF00:
            return file.sections[index].at + value
        found = self.globals.get(name, self.imports.get(name))
        if found is None or binding == 0:
            raise ToolchainError(f"nothing defines {name}", file.name)
        return found

    def slot(self, address: int) -> int:
        if address not in self.slots:
            self.slots[address] = self.data.append(struct.pack("<Q", address), 8)
        return self.slots[address]


def _imports(base: _Object) -> dict[str, int]:
    """The table ``.qigen_imports`` of the host. Its addresses stand in its relocations."""
    addresses = {}
    for section in base.sections:
        if section.type == _RELA and section.flags & _ALLOC:
            for at in range(section.offset, section.offset + section.size, _RELOCATION.size):
                place, info, addend = _RELOCATION.unpack_from(base.data, at)
                if info & 0xFFFFFFFF == _RELATIVE:
                    addresses[place] = addend
    table = base.section(".qigen_imports")
    found = {}
    for i in range(0, table.size, _IMPORT.size):
        name, stored = _IMPORT.unpack_from(base.data, table.offset + i)
        # a linker may pack relocations; then the address lies in the place itself
        found[name.rstrip(b"\0").decode()] = addresses.get(table.address + i + 24, stored)
    return found


def _relocate(
    file: _Object, resolve: _Resolver, code: _Image, data: _Image
) -> Iterator[tuple[int, int]]:
    """Resolve the references of an object; yields the (place, address) of pointers."""
    for table in file.sections:
        if table.type != _RELA or file.sections[table.info].at == 0:
            continue
        start = file.sections[table.info].at
        for at in range(table.offset, table.offset + table.size, _RELOCATION.size):
            place, info, addend = _RELOCATION.unpack_from(file.data, at)
            kind = info & 0xFFFFFFFF
            target = resolve.address(file, info >> 32)
            place += start
            if kind == 1:  # R_X86_64_64
                if code.holds(place):
                    raise ToolchainError("a pointer lies in read-only data", file.name)
                yield place, target + addend
                continue
            if kind in (9, 41, 42):  # R_X86_64_GOTPCREL and what a linker may shorten
                target = resolve.slot(target)
            elif kind not in (2, 4, 24):  # R_X86_64_PC32, _PLT32, _PC64
                raise ToolchainError(f"relocation type {kind} is unknown", file.name)
            image = code if code.holds(place) else data
            wide = 8 if kind == 24 else 4
            value = target + addend - place
            where = place - image.address
            image.bytes[where : where + wide] = value.to_bytes(wide, "little", signed=True)


def _describe(
    out: bytearray, base: _Object, description: tuple[int, int] | None, data: _Image,
    relative: Sequence[tuple[int, int]],
) -> list[tuple[int, int]]:  # fmt: skip
    """Copy the model's description to its place in the host; gives its pointers there."""
    if description is None:
        raise ToolchainError(f"nothing defines {DESCRIPTION}")
    address, size = description
    place = base.section(".qigen_model")
    if place.size != size:
        raise ToolchainError("the runtime's library is of another version: install qigen again")
    start = address - data.address
    out[place.offset : place.offset + size] = data.bytes[start : start + size]
    return [
        (where - address + place.address, target)
        for where, target in relative
        if address <= where < address + size
    ]


def _finish(
    out: bytearray, segments: list[tuple[int, ...]], code: _Image, data: _Image,
    relative: list[tuple[int, int]],
) -> bytes:  # fmt: skip
    """Append the segments, the relocations and the table of segments."""
    dynamic = next(s for s in segments if s[0] == _PT_DYNAMIC)
    entries: dict[int, tuple[int, int]] = {}
    for at in range(dynamic[2], dynamic[2] + dynamic[5], 16):
        tag, value = struct.unpack_from("<QQ", out, at)
        entries.setdefault(tag, (at, value))
        if tag == 0:
            break
    (at_table, table), (at_size, size) = entries[_DT_RELA], entries[_DT_RELASZ]
    old = _file_offset(segments, table)
    # what is written here replaces what the host's own relocations would store in the description
    places = {place for place, _ in relative}
    kept = [
        row
        for i in range(0, size, _RELOCATION.size)
        if (row := _RELOCATION.unpack_from(out, old + i))[0] not in places
    ]
    relocations = [(place, _RELATIVE, target) for place, target in sorted(relative)]
    relocations += kept
    packed = b"".join(_RELOCATION.pack(*row) for row in relocations)
    new_table = data.append(packed, 8)
    struct.pack_into("<Q", out, at_table + 8, new_table)
    struct.pack_into("<Q", out, at_size + 8, len(packed))
    if _DT_RELACOUNT in entries:
        count = 0
        while count < len(relocations) and relocations[count][1] == _RELATIVE:
            count += 1
        struct.pack_into("<Q", out, entries[_DT_RELACOUNT][0] + 8, count)

    headers = (len(segments) + 2) * _SEGMENT.size
    at_headers = data.append(bytes(headers), 8)
    out += bytes(-len(out) % _PAGE)
    code_offset = len(out)
    out += code.bytes
    out += bytes(-len(out) % _PAGE)
    data_offset = len(out)
    rows = [list(s) for s in segments]
    for offset, image, flags in ((code_offset, code, 5), (data_offset, data, 6)):
        length = len(image.bytes)
        rows.append([_PT_LOAD, flags, offset, image.address, image.address, length, length, _PAGE])
    # loaders want the segments in the order of their addresses, those that are loaded last are
    for segment in rows:
        if segment[0] == _PT_PHDR:
            offset = data_offset + at_headers - data.address
            segment[2:7] = [offset, at_headers, at_headers, headers, headers]
    text = b"".join(_SEGMENT.pack(*segment) for segment in rows)
    where = at_headers - data.address
    data.bytes[where : where + headers] = text
    out += data.bytes
    struct.pack_into("<Q", out, 32, data_offset + where)
    struct.pack_into("<H", out, 56, len(rows))
    return bytes(out)


def _file_offset(segments: Sequence[tuple[int, ...]], address: int) -> int:
    for kind, _, offset, start, _, size, _, _ in segments:
        if kind == _PT_LOAD and start <= address < start + size:
            return offset + address - start
    raise ToolchainError("the runtime's library is damaged: install qigen again")
