"""Rules and routes of the network namespace that the calling thread is in: messages by pyroute2, a
socket of our own.

The package's IPRoute costs 3.5 ms for what a pod needs, an event loop for each socket among them,
and its front door imports sixty kinds of sockets, a database and a file server: five megabytes of
every agent (both measured).
"""

from __future__ import annotations

import importlib.util
import os
import socket
import struct
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PACKAGE = "pyroute2"

# linux/rtnetlink.h, linux/netlink.h
NEW_ROUTE, DELETE_ROUTE, GET_ROUTE = 24, 25, 26
NEW_RULE, DELETE_RULE, GET_RULE = 32, 33, 34
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP, _EXCLUSIVE, _CREATE = 0x1, 0x4, 0x300, 0x200, 0x400
_SOL_NETLINK, _STRICT = 270, 12
_HEADER = struct.Struct("=IHHII")
_BUFFER = 1 << 16
_PATIENCE = 5.0


def _load() -> tuple[Any, Any]:
    """Imports two modules of the package past its front door, which stays closed for nobody else:
    a later `import pyroute2` is as usual."""
    spec = None if _PACKAGE in sys.modules else importlib.util.find_spec(_PACKAGE)
    if spec is not None:
        sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    try:
        from pyroute2.netlink.rtnl.fibmsg import fibmsg
        from pyroute2.netlink.rtnl.rtmsg import rtmsg
    finally:
        if spec is not None:
            del sys.modules[_PACKAGE]
    return fibmsg, rtmsg


# An untyped library: mappings of fields, with `get_attr`.
RuleMessage, RouteMessage = _load()


def addition(kind: int, message: Any) -> bytes:
    """Fails with EEXIST where the very thing is there."""
    return _encode(kind, _REQUEST | _ACK | _CREATE | _EXCLUSIVE, message)


def deletion(kind: int, message: Any) -> bytes:
    return _encode(kind, _REQUEST | _ACK, message)


def question(kind: int, message: Any) -> bytes:
    return _encode(kind, _REQUEST | _DUMP, message)


@contextmanager
def opened() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(_PATIENCE)
        # What is asked for is what is told: without it the kernel tells routes of all tables.
        netlink.setsockopt(_SOL_NETLINK, _STRICT, 1)
        yield netlink


def change(netlink: socket.socket, messages: Sequence[bytes]) -> list[int]:
    """Sends all at once; the error number of each, 0 where it was done. Raises OSError."""
    if messages:
        netlink.send(b"".join(messages))
    codes: list[int] = []
    while len(codes) < len(messages):
        codes += [_code(answer) for kind, answer in _read(netlink) if kind == _NLMSG_ERROR]
    return codes


def dump(netlink: socket.socket, message: bytes) -> list[bytes]:
    """Each answer with its header, as the classes of messages take it. Raises OSError."""
    netlink.send(message)
    found: list[bytes] = []
    while True:
        for kind, answer in _read(netlink):
            # The end of a dump holds an error like that of a refusal (NLM_F_DUMP without data).
            if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                if code := _code(answer):
                    raise OSError(code, os.strerror(code))
                return found
            found.append(answer)


def decoded(message: Any, answer: bytes) -> Any:
    """`message`: its class."""
    made = message(answer)
    made.decode()
    return made


def _encode(kind: int, flags: int, message: Any) -> bytes:
    message["header"]["type"], message["header"]["flags"] = kind, flags
    message["header"]["sequence_number"] = 1
    message.encode()
    return bytes(message.data)


def _read(netlink: socket.socket) -> Iterator[tuple[int, bytes]]:
    data = netlink.recv(_BUFFER)
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        if length < _HEADER.size:
            return
        yield kind, data[:length]
        data = data[(length + 3) & ~3 :]


def _code(answer: bytes) -> int:
    return -int(struct.unpack_from("=i", answer, _HEADER.size)[0])
