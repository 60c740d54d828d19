"""Pinned maps as another version would have laid them out."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_SYS_BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
_MAP_CREATE, _LOOKUP, _UPDATE, _NEXT_KEY, _PIN, _GET, _INFO = 0, 1, 2, 4, 6, 7, 15

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Layout:
    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


def layout(path: Path) -> Layout:
    """Raises OSError."""
    pinned = _open(path)
    try:
        return _layout(pinned)
    finally:
        os.close(pinned)


def lay_out(path: Path, *, value_size: int) -> None:
    """Pins a hash with such values in the place of the one there, with its entries.

    Programs that run keep theirs: to the next process it looks as if another version had
    ended.
    """
    pinned = _open(path)
    try:
        before = _layout(pinned)
        after = replace(before, value_size=value_size)
        other = _bpf(
            _MAP_CREATE,
            struct.pack(
                "=5I",
                after.kind,
                after.key_size,
                after.value_size,
                after.max_entries,
                after.flags,
            ),
        )
        try:
            _copy(pinned, before, other, after)
            path.unlink()
            name = ctypes.create_string_buffer(bytes(path))
            _bpf(_PIN, struct.pack("=QII", ctypes.addressof(name), other, 0))
        finally:
            os.close(other)
    finally:
        os.close(pinned)


def _copy(source: int, before: Layout, target: int, after: Layout) -> None:
    key = ctypes.create_string_buffer(before.key_size)
    following = ctypes.create_string_buffer(before.key_size)
    value = ctypes.create_string_buffer(max(before.value_size, after.value_size))
    start = 0
    while True:
        try:
            _element(_NEXT_KEY, source, start, following)
        except FileNotFoundError:
            return
        key.raw = following.raw
        start = ctypes.addressof(key)
        _element(_LOOKUP, source, start, value)
        _element(_UPDATE, target, start, value)


def _element(command: int, descriptor: int, key: int, value: ctypes.Array[ctypes.c_char]) -> None:
    _bpf(command, struct.pack("=IIQQQ", descriptor, 0, key, ctypes.addressof(value), 0))


def _open(path: Path) -> int:
    name = ctypes.create_string_buffer(bytes(path))
    return _bpf(_GET, struct.pack("=QII", ctypes.addressof(name), 0, 0))


def _layout(descriptor: int) -> Layout:
    info = ctypes.create_string_buffer(24)
    _bpf(_INFO, struct.pack("=IIQ", descriptor, len(info), ctypes.addressof(info)))
    kind, _, *sizes = struct.unpack("=6I", info.raw)
    return Layout(kind, *sizes)


def _bpf(command: int, attributes: bytes) -> int:
    # The buffer, too, has to live through the call.
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    done = int(_libc.syscall(_SYS_BPF, command, buffer, len(attributes)))
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return done
