"""The kernel's TCP sockets of the network namespace that the calling thread is in (sock_diag(7)):
listed, looked up one by one, and ended."""

from __future__ import annotations

import errno
import os
import socket
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
_SOCK_DIAG = 4
_BY_FAMILY, _DESTROY = 20, 21
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_INFO, _MARK, _CGROUP_ID = 2, 15, 21
# Of the kernel's states; as bits in a request.
ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT_1, FIN_WAIT_2 = 1, 2, 3, 4, 5
TIME_WAIT, CLOSE_WAIT, LISTEN = 6, 8, 10
_ANY_STATE = 0xFFF
_HEADER = struct.Struct("=IHHII")
# linux/tcp.h, struct tcp_info: bytes received, then bytes sent and those of them sent again.
_SIZES = struct.Struct("=128xQ64xQQ")
# inet_diag_req_v2 without its id: family, protocol, extensions, padding, states.
_ASK = struct.Struct("=BBBxI")
# inet_diag_sockid: ports in network order, addresses, interface, cookie.
ID_SIZE = 48
# inet_diag_msg before its id: family, state, timer, retransmissions.
_BEFORE_ID = struct.Struct("=BBBB")
# After it: expiry, queues, user; then the inode, 0 where no process has the socket any more.
_INODE = _BEFORE_ID.size + ID_SIZE + 16
_ATTRIBUTES = _INODE + 4
_ATTRIBUTE = struct.Struct("=HH")
_BUFFER = 1 << 17
_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One socket as the kernel tells it. `id` holds its ends and the cookie that no other socket
    has until the machine starts anew."""

    family: int
    state: int
    id: bytes
    inode: int = 0
    # 0 without CAP_NET_ADMIN.
    mark: int = 0
    # Inode of the cgroup it was made in; 0 from kernels that don't tell (before 5.8).
    cgroup: int = 0
    # Payload so far; 0 unless asked for.
    sent: int = 0
    received: int = 0

    @property
    def local_port(self) -> int:
        port: int = struct.unpack_from("!H", self.id)[0]
        return port


class NotPossible(OSError):
    """This kernel can't end sockets of others."""


@contextmanager
def opened() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as diag:
        diag.settimeout(_PATIENCE)
        yield diag


def listed(diag: socket.socket, *states: int, sizes: bool = False) -> Iterator[Entry]:
    """Of both families. Raises OSError. To be read to its end before the next request."""
    extensions = 1 << _INFO - 1 if sizes else 0
    wanted = sum(1 << state for state in states)
    for family in (socket.AF_INET, socket.AF_INET6):
        ask = _ASK.pack(family, socket.IPPROTO_TCP, extensions, wanted) + bytes(ID_SIZE)
        diag.send(_message(_BY_FAMILY, _REQUEST | _DUMP, ask))
        done = False
        while not done:
            for kind, payload in _messages(diag.recv(_BUFFER)):
                if kind == _NLMSG_ERROR:
                    _raise(payload)
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    done = True
                else:
                    yield _entry(payload)


def found(diag: socket.socket, family: int, id: bytes) -> Entry | None:
    """That very socket as it is now; None when it is gone. Raises OSError."""
    ask = _ASK.pack(family, socket.IPPROTO_TCP, 0, _ANY_STATE) + id
    diag.send(_message(_BY_FAMILY, _REQUEST, ask))
    for kind, payload in _messages(diag.recv(_BUFFER)):
        if kind != _NLMSG_ERROR:
            return _entry(payload)
        try:
            _raise(payload)
        except OSError as exc:
            # Nobody has these ends, or another socket has: its cookie differs.
            if exc.errno not in (errno.ENOENT, errno.ESTALE):
                raise
    return None


def destroyed(diag: socket.socket, entry: Entry) -> bool:
    """Ends it as if by its owner's kernel: both sides get a reset. False when it had ended by
    itself. Raises NotPossible, OSError."""
    ask = _ASK.pack(entry.family, socket.IPPROTO_TCP, 0, 1 << entry.state) + entry.id
    diag.send(_message(_DESTROY, _REQUEST | _ACK, ask))
    for kind, payload in _messages(diag.recv(_BUFFER)):
        if kind == _NLMSG_ERROR:
            try:
                _raise(payload)
            except OSError as exc:
                if exc.errno == errno.EOPNOTSUPP:
                    raise NotPossible(exc.errno, exc.strerror) from exc
                if exc.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                return False
    return True


def _entry(payload: bytes) -> Entry:
    family, state, _, _ = _BEFORE_ID.unpack_from(payload)
    id = payload[_BEFORE_ID.size : _BEFORE_ID.size + ID_SIZE]
    (inode,) = struct.unpack_from("=I", payload, _INODE)
    mark = cgroup = sent = received = 0
    at = _ATTRIBUTES
    while at + _ATTRIBUTE.size <= len(payload):
        size, kind = _ATTRIBUTE.unpack_from(payload, at)
        if kind == _MARK:
            (mark,) = struct.unpack_from("=I", payload, at + _ATTRIBUTE.size)
        elif kind == _CGROUP_ID:
            (cgroup,) = struct.unpack_from("=Q", payload, at + _ATTRIBUTE.size)
        elif kind == _INFO and size >= _ATTRIBUTE.size + _SIZES.size:
            received, sent, again = _SIZES.unpack_from(payload, at + _ATTRIBUTE.size)
            sent -= again
            # The peer's FIN is counted like a byte.
            received -= state == CLOSE_WAIT
        at += max(_ATTRIBUTE.size, (size + 3) & ~3)
    return Entry(family, state, id, inode, mark, cgroup, sent, max(0, received))


def _message(kind: int, flags: int, payload: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags, 1, 0) + payload


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        if length < _HEADER.size:
            return
        yield kind, data[_HEADER.size : length]
        data = data[(length + 3) & ~3 :]


def _raise(payload: bytes) -> None:
    (code,) = struct.unpack_from("=i", payload)
    if code:
        raise OSError(-code, os.strerror(-code))
