"""Where the running kernel keeps its fields, from its own type information (linux/btf.h).

Header files may belong to another kernel: a program compiled with them reads wrong memory without
a word (design section 8). Nothing here needs more than the standard library.
"""

import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

VMLINUX = Path("/sys/kernel/btf/vmlinux")

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_MEMBER = struct.Struct("=III")
_ENUMERATOR = struct.Struct("=Ii")
_STRUCT, _UNION, _ENUM = 4, 5, 6
# Kinds that only lead to another type: typedef, volatile, const, restrict, type tag.
_NAMES = (8, 9, 10, 11, 18)
# Bytes behind a type's own twelve: so many, and so many for each of its `vlen` entries.
_BEHIND = {
    1: (4, 0),  # int
    3: (12, 0),  # array
    _STRUCT: (0, 12),
    _UNION: (0, 12),
    _ENUM: (0, 8),
    13: (0, 8),  # function prototype
    14: (4, 0),  # variable
    15: (0, 12),  # data section
    17: (4, 0),  # declaration tag
    19: (0, 12),  # enum of 64 bits
}


class UnknownType(Exception):
    """The kernel has no such type or field; the text names it."""


class Btf:
    """Raises OSError when it can't be read, UnknownType when it is none."""

    def __init__(self, path: Path = VMLINUX) -> None:
        self._data = path.read_bytes()
        if len(self._data) < _HEADER.size:
            raise UnknownType(f"{path}: not type information")
        magic, _, _, header, types, type_size, strings, _ = _HEADER.unpack_from(self._data)
        if magic != _MAGIC:
            raise UnknownType(f"{path}: not type information of this machine")
        self._begin = header + types
        self._end = self._begin + type_size
        self._strings = header + strings

    def offset(self, name: str, path: str) -> int:
        """Bytes from the begin of a struct to a field: ("net", "ns.inum"). Anonymous structs and
        unions are looked into; pointers are not followed."""
        at, current = 0, self._find(_STRUCT, name)
        for part in path.split("."):
            found = self._member(current, part)
            if found is None:
                raise UnknownType(f"struct {name} has no {path}")
            at += found[0]
            current = self._resolved(found[1])
        if at % 8:
            raise UnknownType(f"{path} of struct {name} is a bit field")
        return at // 8

    def enum(self, name: str) -> dict[int, str]:
        where = self._find(_ENUM, name)
        _, info, _ = _TYPE.unpack_from(self._data, where)
        entries = (
            _ENUMERATOR.unpack_from(self._data, where + _TYPE.size + i * _ENUMERATOR.size)
            for i in range(info & 0xFFFF)
        )
        return {value: self._string(text) for text, value in entries}

    def _member(self, where: int, wanted: str) -> tuple[int, int] | None:
        """Its place in bits and its type's number."""
        _, info, _ = _TYPE.unpack_from(self._data, where)
        if info >> 24 & 0x1F not in (_STRUCT, _UNION):
            return None
        for i in range(info & 0xFFFF):
            at = where + _TYPE.size + i * _MEMBER.size
            text, kind, place = _MEMBER.unpack_from(self._data, at)
            if info >> 31:
                # The upper byte is a bit field's size.
                place &= 0xFFFFFF
            if text and self._string(text) == wanted:
                return place, kind
            if not text and (inner := self._member(self._resolved(kind), wanted)) is not None:
                return place + inner[0], inner[1]
        return None

    def _resolved(self, number: int) -> int:
        while True:
            where = self._places[number]
            _, info, number = _TYPE.unpack_from(self._data, where)
            if info >> 24 & 0x1F not in _NAMES:
                return where

    def _find(self, kind: int, name: str) -> int:
        try:
            return self._named[kind, name]
        except KeyError:
            raise UnknownType(f"the kernel's type information lacks {name}") from None

    @cached_property
    def _places(self) -> list[int]:
        """By number; 0 is void."""
        return [self._begin, *self._walk()]

    @cached_property
    def _named(self) -> dict[tuple[int, str], int]:
        found: dict[tuple[int, str], int] = {}
        for where in self._places[1:]:
            text, info, _ = _TYPE.unpack_from(self._data, where)
            kind = info >> 24 & 0x1F
            if text and kind in (_STRUCT, _ENUM) and info & 0xFFFF:
                found.setdefault((kind, self._string(text)), where)
        return found

    def _walk(self) -> Iterator[int]:
        where, end, data = self._begin, self._end, self._data
        behind = [_BEHIND.get(kind, (0, 0)) for kind in range(32)]
        info_at = struct.Struct("=I").unpack_from
        while where < end:
            yield where
            (info,) = info_at(data, where + 4)
            fixed, each = behind[info >> 24 & 0x1F]
            where += 12 + fixed + each * (info & 0xFFFF)

    def _string(self, at: int) -> str:
        begin = self._strings + at
        return self._data[begin : self._data.index(b"\0", begin)].decode()
