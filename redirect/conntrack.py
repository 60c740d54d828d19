"""Connections made known to connection tracking before there are rules that translate
(ctnetlink).

Without that the next packet of an older connection would pass for the first of a new one, and be
redirected to a listener that knows nothing of it: the connection would break (seen).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING

from redirect.base import RedirectError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from redirect.sockets import Address, Connection

# linux/netlink.h, linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h, nf_conntrack_common.h
_NETLINK_NETFILTER = 12
_CT_NEW, _CT_GET_STATS = 1 << 8, 1 << 8 | 5
_REQUEST, _ACK, _EXCLUSIVE, _CREATE = 0x1, 0x4, 0x200, 0x400
_NLMSG_ERROR = 2
_NESTED = 0x8000
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _PROTOINFO, _TIMEOUT = 1, 2, 3, 4, 7
_TCP = 1
_STATE_ESTABLISHED = 3
# Both directions seen, assured, confirmed: no packet of it is a first one.
_SEEN = 1 << 1 | 1 << 2 | 1 << 3
# IP_CT_TCP_FLAG_BE_LIBERAL, as value and mask: its sequence numbers aren't known here.
_LIBERAL = b"\x08\x08"
# The kernel's own for an established connection (nf_conntrack_tcp_timeout_established).
_FIVE_DAYS = 432_000
_HEADER = struct.Struct("=IHHII")


def keep(spared: Iterable[Connection]) -> int:
    """How many weren't known yet; whatever is known stays as it is. Raises RedirectError."""
    count = 0
    try:
        with _opened() as netlink:
            for one in spared:
                netlink.send(_entry(one.local, one.remote))
                code = _answer(netlink)
                if code not in (0, errno.EEXIST):
                    raise OSError(code, os.strerror(code))
                count += code == 0
    except OSError as exc:
        raise RedirectError(f"older connections can't be kept: {exc.strerror or exc}") from exc
    return count


def usable() -> bool:
    """The kernel has ctnetlink, and lets us."""
    body = struct.pack("=BBH", socket.AF_INET, 0, 0)
    size = _HEADER.size + len(body)
    try:
        with _opened() as netlink:
            netlink.send(_HEADER.pack(size, _CT_GET_STATS, _REQUEST | _ACK, 1, 0) + body)
            return _answer(netlink) == 0
    except OSError:
        return False


def _opened() -> socket.socket:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    netlink.settimeout(5.0)
    return netlink


def _answer(netlink: socket.socket) -> int:
    data = netlink.recv(1 << 16)
    _, kind, *_ = _HEADER.unpack_from(data)
    if kind != _NLMSG_ERROR:
        return 0
    code: int = struct.unpack_from("=i", data, _HEADER.size)[0]
    return -code


def _entry(local: Address, remote: Address) -> bytes:
    family = socket.AF_INET if local[0].version == 4 else socket.AF_INET6
    tcp = _attribute(1, bytes([_STATE_ESTABLISHED])) + _attribute(4, _LIBERAL)
    tcp += _attribute(5, _LIBERAL)
    body = struct.pack("=BBH", family, 0, 0)
    body += _nested(_TUPLE_ORIG, _tuple(local, remote))
    body += _nested(_TUPLE_REPLY, _tuple(remote, local))
    body += _attribute(_STATUS, struct.pack("!I", _SEEN))
    body += _nested(_PROTOINFO, _nested(_TCP, tcp))
    body += _attribute(_TIMEOUT, struct.pack("!I", _FIVE_DAYS))
    flags = _REQUEST | _ACK | _CREATE | _EXCLUSIVE
    return _HEADER.pack(_HEADER.size + len(body), _CT_NEW, flags, 1, 0) + body


def _tuple(source: Address, destination: Address) -> bytes:
    first = 1 if source[0].version == 4 else 3
    addresses = _attribute(first, source[0].packed) + _attribute(first + 1, destination[0].packed)
    ports = _attribute(1, bytes([socket.IPPROTO_TCP]))
    ports += _attribute(2, struct.pack("!H", source[1]))
    ports += _attribute(3, struct.pack("!H", destination[1]))
    return _nested(1, addresses) + _nested(2, ports)


def _nested(kind: int, content: bytes) -> bytes:
    return _attribute(kind | _NESTED, content)


def _attribute(kind: int, content: bytes) -> bytes:
    size = 4 + len(content)
    return struct.pack("=HH", size, kind) + content + bytes(-size % 4)
