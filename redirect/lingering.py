"""Ports that nobody listens on any more but that ended connections still hold.

A proxy that shared its ports (SO_REUSEPORT) leaves connections in TIME_WAIT behind that keep its
successor from binding for a minute, unless that one shares them too, which ours never does (seen).
The kernel lets a privileged process end them (SOCK_DESTROY of sock_diag(7)).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING

from redirect.base import RedirectError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from redirect.netns import NetnsThread

_SOCK_DIAG = 4
_BY_FAMILY, _DESTROY = 20, 21
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
# Of an ended connection that owes its peer nothing more: all is acknowledged.
_FIN_WAIT_2, _TIME_WAIT = 5, 6
_LISTEN = 10
_HEADER = struct.Struct("=IHHII")
# inet_diag_req_v2 without its id: family, protocol, extensions, padding, states.
_ASK = struct.Struct("=BBBxI")
# inet_diag_sockid: ports in network order, addresses, interface, cookie.
_ID = 48
# inet_diag_msg before its id: family, state, timer, retransmissions.
_ENTRY = struct.Struct("=BBBB")
# After it: expiry, queues, user; then the inode, 0 where no process has the socket any more.
_INODE = _ENTRY.size + _ID + 16
_BUFFER = 64 * 1024


async def free(threads: NetnsThread, netns_fd: int, ports: Collection[int], *, subject: str) -> int:
    """How many ended connections were made to let go of these ports: none while any of the ports
    has a listener. Raises RedirectError."""
    return await threads.run(netns_fd, lambda: _free(frozenset(ports), subject), subject=subject)


def _free(ports: frozenset[int], subject: str) -> int:
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as diag:
            diag.settimeout(2)
            # Alone first: a pod has few listeners, and may have thousands of the others.
            if any(entry.port in ports for entry in _listed(diag, 1 << _LISTEN)):
                return 0
            ended = list(_listed(diag, 1 << _FIN_WAIT_2 | 1 << _TIME_WAIT))
            mine = [entry for entry in ended if entry.port in ports and not entry.inode]
            return sum(_destroyed(diag, entry) for entry in mine)
    except OSError as exc:
        raise RedirectError(f"{subject}: ended connections on its ports: {exc.strerror}") from exc


class _Entry:
    def __init__(self, payload: bytes) -> None:
        self.family, self.state, _, _ = _ENTRY.unpack_from(payload)
        self.id = payload[_ENTRY.size : _ENTRY.size + _ID]
        (self.port,) = struct.unpack_from("!H", self.id)
        (self.inode,) = struct.unpack_from("=I", payload, _INODE)


def _listed(diag: socket.socket, states: int) -> Iterator[_Entry]:
    for family in (socket.AF_INET, socket.AF_INET6):
        ask = _ASK.pack(family, socket.IPPROTO_TCP, 0, states) + bytes(_ID)
        diag.send(_message(_BY_FAMILY, _REQUEST | _DUMP, ask))
        done = False
        while not done:
            for kind, payload in _messages(diag.recv(_BUFFER)):
                if kind == _NLMSG_ERROR:
                    _raise(payload)
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    done = True
                else:
                    yield _Entry(payload)


def _destroyed(diag: socket.socket, entry: _Entry) -> bool:
    ask = _ASK.pack(entry.family, socket.IPPROTO_TCP, 0, 1 << entry.state) + entry.id
    diag.send(_message(_DESTROY, _REQUEST | _ACK, ask))
    for kind, payload in _messages(diag.recv(_BUFFER)):
        if kind == _NLMSG_ERROR:
            try:
                _raise(payload)
            except OSError as exc:
                # It ended by itself meanwhile.
                if exc.errno != errno.ENOENT:
                    raise
                return False
    return True


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
