"""Somebody else's program on a cgroup: it lets everything pass, and stands where a socket load
balancer would."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "foreign_lb"
# enum bpf_attach_type of linux/bpf.h.
CONNECT4, SENDMSG6 = 10, 15
# It runs before those of child cgroups.
PREORDER = 1 << 6

_SYS_BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
_PROG_LOAD, _LINK_CREATE = 5, 28
_CGROUP_SOCK_ADDR = 18
# r0 = 1; exit
_PASS = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0)

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def foreign_program(
    cgroup: Path, at: int = CONNECT4, *, name: str = NAME, flags: int = 0
) -> Iterator[None]:
    """Attached until the end of `with`. Raises OSError."""
    program = _load(at, name)
    try:
        target = os.open(cgroup, os.O_RDONLY | os.O_CLOEXEC)
        try:
            link = _bpf(_LINK_CREATE, struct.pack("=IIII", program, target, at, flags))
        finally:
            os.close(target)
    finally:
        os.close(program)
    try:
        yield
    finally:
        os.close(link)


def _load(at: int, name: str) -> int:
    code, license_ = ctypes.create_string_buffer(_PASS), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        _CGROUP_SOCK_ADDR,
        len(_PASS) // 8,
        ctypes.addressof(code),
        ctypes.addressof(license_),
        *(0, 0, 0, 0, 0),
        name.encode(),
        0,
        at,
    )
    return _bpf(_PROG_LOAD, attributes)


def _bpf(command: int, attributes: bytes) -> int:
    # The buffer, too, has to live through the call.
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    made = int(_libc.syscall(_SYS_BPF, command, buffer, len(attributes)))
    if made < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return made
