"""Maps and links that the data plane pinned, by the kernel's own calls: bcc opens none by its path.

The layouts of bpf(2)'s arguments are linux/bpf.h's, `union bpf_attr`.
"""

import ctypes
import os
import platform
import struct
from dataclasses import dataclass
from pathlib import Path

_CALL = {"x86_64": 321, "aarch64": 280}
_OBJ_GET = 7
_OBJ_GET_INFO_BY_FD = 15
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class MapInfo:
    value_size: int
    max_entries: int


def opened(path: Path) -> int:
    """A descriptor, the caller's to close. Raises OSError."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _bpf(_OBJ_GET, struct.pack("=QII", ctypes.addressof(name), 0, 0))


def map_info(fd: int) -> MapInfo:
    """Raises OSError."""
    # type, id, key_size, value_size, max_entries
    return MapInfo(*struct.unpack_from("=12xII", _info(fd)))


def linked_netns(path: Path) -> int:
    """Inode of the network namespace that a pinned link is attached to; 0: it is gone. Raises
    OSError."""
    fd = opened(path)
    try:
        # type, id, program, and behind a hole what depends on the type
        (inode,) = struct.unpack_from("=16xI", _info(fd))
    finally:
        os.close(fd)
    return int(inode)


def _info(fd: int) -> bytes:
    answer = ctypes.create_string_buffer(128)
    _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, len(answer), ctypes.addressof(answer)))
    return answer.raw


def _bpf(command: int, arguments: bytes) -> int:
    attributes = ctypes.create_string_buffer(arguments, len(arguments))
    call = _CALL[platform.machine()]
    result = _libc.syscall(call, command, attributes, len(arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)
