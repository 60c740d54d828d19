"""Type information as a kernel has it, small enough to be written by hand."""

from __future__ import annotations

import struct

INT, POINTER, STRUCT, UNION, ENUM, TYPEDEF = 1, 2, 4, 5, 6, 8


class MadeBtf:
    """Types get numbers from 1 in the order of the calls."""

    def __init__(self) -> None:
        self._types = b""
        self._strings = b"\0"
        self._count = 0

    def integer(self, name: str, size: int) -> int:
        return self._add(name, INT, 0, size, struct.pack("=I", size * 8))

    def pointer(self, to: int) -> int:
        return self._add("", POINTER, 0, to, b"")

    def typedef(self, name: str, to: int) -> int:
        return self._add(name, TYPEDEF, 0, to, b"")

    def struct(
        self, name: str, *members: tuple[str, int, int], kind: int = STRUCT, bits: bool = False
    ) -> int:
        """Members: name, type, place in bits (with `bits` the size of a bit field above it)."""
        body = b"".join(struct.pack("=III", self._text(n), t, at) for n, t, at in members)
        flag = 1 << 31 if bits else 0
        return self._add(name, kind, flag | len(members), 64, body)

    def enum(self, name: str, **values: int) -> int:
        body = b"".join(struct.pack("=Ii", self._text(n), value) for n, value in values.items())
        return self._add(name, ENUM, len(values), 4, body)

    def image(self) -> bytes:
        header = struct.pack(
            *("=HBBIIIII", 0xEB9F, 1, 0, 24, 0),
            *(len(self._types), len(self._types), len(self._strings)),
        )
        return header + self._types + self._strings

    def _add(self, name: str, kind: int, info: int, size: int, body: bytes) -> int:
        self._types += struct.pack("=III", self._text(name), kind << 24 | info, size) + body
        self._count += 1
        return self._count

    def _text(self, name: str) -> int:
        if not name:
            return 0
        at = len(self._strings)
        self._strings += name.encode() + b"\0"
        return at
