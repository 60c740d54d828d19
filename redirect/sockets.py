"""TCP connections of the network namespace that the calling thread is in, by sock_diag(7)."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING

from redirect.base import RedirectError

if TYPE_CHECKING:
    from collections.abc import Iterator

Address = tuple[IPv4Address | IPv6Address, int]

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_INET_DIAG_MARK = 15
# Established, SYN sent, FIN wait 1 and 2, close wait: those that carry bytes or are about to.
_STATES = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI48x")
_MESSAGE = struct.Struct("=4B2H16s16s")
_MESSAGE_SIZE = 72
_ATTRIBUTE = struct.Struct("=HH")


@dataclass(frozen=True)
class Connection:
    local: Address
    remote: Address
    mark: int = 0


def connections() -> list[Connection]:
    """Raises RedirectError. Marks are 0 without CAP_NET_ADMIN."""
    found: list[Connection] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(5.0)
            for family in (socket.AF_INET, socket.AF_INET6):
                body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _STATES)
                size = _HEADER.size + len(body)
                header = _HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
                netlink.sendto(header + body, (0, 0))
                found += _answers(netlink)
    except OSError as exc:
        raise RedirectError(f"connections can't be listed: {exc.strerror or exc}") from exc
    return found


def _answers(netlink: socket.socket) -> Iterator[Connection]:
    while True:
        data = netlink.recv(1 << 17)
        while data:
            size, kind, *_ = _HEADER.unpack_from(data)
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                code = -struct.unpack_from("=i", data, _HEADER.size)[0]
                raise OSError(code, "sock_diag refused")
            yield _connection(data[_HEADER.size : size])
            data = data[(size + 3) & ~3 :]


def _connection(message: bytes) -> Connection:
    family, _, _, _, sport, dport, source, destination = _MESSAGE.unpack_from(message)
    length = 4 if family == socket.AF_INET else 16
    mark, rest = 0, message[_MESSAGE_SIZE:]
    while len(rest) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(rest)
        if kind == _INET_DIAG_MARK:
            mark = struct.unpack_from("=I", rest, _ATTRIBUTE.size)[0]
        rest = rest[max(4, (size + 3) & ~3) :]
    return Connection(
        (_plain(source[:length]), socket.ntohs(sport)),
        (_plain(destination[:length]), socket.ntohs(dport)),
        mark,
    )


def _plain(packed: bytes) -> IPv4Address | IPv6Address:
    """Listeners of both families see IPv4 clients as mapped addresses."""
    found = ip_address(packed)
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found
