"""Connections made known to connection tracking before there are rules that translate, and those
that are still translated after the rules went (ctnetlink).

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
from redirect.ruleset import MARK_MASK, REPLY_MARK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from redirect.sockets import Address, Connection

# linux/netlink.h, linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h, nf_conntrack_common.h
_NETLINK_NETFILTER = 12
_CT_NEW, _CT_GET, _CT_DELETE, _CT_GET_STATS = 1 << 8, 1 << 8 | 1, 1 << 8 | 2, 1 << 8 | 5
_REQUEST, _ACK, _EXCLUSIVE, _CREATE, _DUMP = 0x1, 0x4, 0x200, 0x400, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NESTED = 0x8000
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _PROTOINFO, _TIMEOUT, _MARK = 1, 2, 3, 4, 7, 8
_TCP = 1
_TCP_STATE = 1
# IPS_SRC_NAT and IPS_DST_NAT
_NAT = 1 << 4 | 1 << 5
# TCP_CONNTRACK_TIME_WAIT and CLOSE
_ENDED = (b"\x07", b"\x08")
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


def translated() -> int:
    """How many connections live by rules of ours: redirected, or of the data plane to an app with
    the client's address. Raises RedirectError."""
    try:
        with _opened() as netlink:
            return sum(_lives_by_us(entry) for _, entry in _listed(netlink))
    except OSError as exc:
        raise RedirectError(f"connections can't be counted: {exc.strerror or exc}") from exc


def forget() -> None:
    """For when the rules went: TCP connections that nobody translates any more. What isn't tracked
    would be remembered as open for days, and a later one of the same addresses and ports be taken
    for it once there are rules again, which would redirect none of it. Raises RedirectError."""
    try:
        with _opened() as netlink:
            for family, entry in list(_listed(netlink)):
                alive = _tcp_state(entry) not in _ENDED
                if _PROTOINFO not in entry or (alive and _status(entry) & _NAT):
                    continue
                body = struct.pack("=BBH", family, 0, 0)
                body += _nested(_TUPLE_ORIG, entry[_TUPLE_ORIG])
                size = _HEADER.size + len(body)
                netlink.send(_HEADER.pack(size, _CT_DELETE, _REQUEST | _ACK, 1, 0) + body)
                code = _answer(netlink)
                if code not in (0, errno.ENOENT):
                    raise OSError(code, os.strerror(code))
    except OSError as exc:
        raise RedirectError(f"old connections can't be forgotten: {exc.strerror or exc}") from exc


def _listed(netlink: socket.socket) -> Iterator[tuple[int, dict[int, bytes]]]:
    """Families and attributes of what is tracked in this namespace. Raises OSError. To be read to
    its end before the next request."""
    body = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
    size = _HEADER.size + len(body)
    netlink.send(_HEADER.pack(size, _CT_GET, _REQUEST | _DUMP, 1, 0) + body)
    while True:
        data = netlink.recv(1 << 18)
        while data:
            length, kind, *_ = _HEADER.unpack_from(data)
            if kind == _NLMSG_ERROR:
                code = -struct.unpack_from("=i", data, _HEADER.size)[0]
                raise OSError(code, os.strerror(code))
            if kind == _NLMSG_DONE:
                return
            yield data[_HEADER.size], _attributes(data[size:length])
            data = data[length + 3 & ~3 :]


def _tcp_state(entry: dict[int, bytes]) -> bytes:
    tcp = _attributes(_attributes(entry.get(_PROTOINFO, b"")).get(_TCP, b""))
    return tcp.get(_TCP_STATE, b"\0")


def _status(entry: dict[int, bytes]) -> int:
    (status,) = struct.unpack("!I", entry.get(_STATUS, bytes(4)))
    return int(status)


def _lives_by_us(entry: dict[int, bytes]) -> bool:
    (mark,) = struct.unpack("!I", entry.get(_MARK, bytes(4)))
    if not _status(entry) & _NAT and mark & MARK_MASK != REPLY_MARK:
        return False
    return _tcp_state(entry) not in _ENDED


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


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= 4:
        size, kind = struct.unpack_from("=HH", data)
        if size < 4:
            break
        found[kind & ~_NESTED] = data[4:size]
        data = data[size + 3 & ~3 :]
    return found


def _nested(kind: int, content: bytes) -> bytes:
    return _attribute(kind | _NESTED, content)


def _attribute(kind: int, content: bytes) -> bytes:
    size = 4 + len(content)
    return struct.pack("=HH", size, kind) + content + bytes(-size % 4)
