"""Policy routing that brings an app's reply to a spoofed source back to the data plane.

Packets with the reply mark look at table 100 first, where everything is local (facts istio-ambient
3.1). All functions work in the network namespace that the calling thread is in.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import socket
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Any

from redirect import rtnetlink
from redirect.base import NotRetryable, RedirectError
from redirect.ruleset import MARK_MASK, REPLY_MARK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TABLE = 100
PREFERENCE = 32764

_LO = 1  # always the first interface of a namespace
_RTN_LOCAL = 2
_RTPROT_STATIC = 4
_SCOPE_HOST, _SCOPE_UNIVERSE = 254, 0
_FR_ACT_TO_TBL = 1
# The attribute FRA_PRIORITY as the kernel tells it of our rule.
_PRIORITY = struct.pack("=HHI", 8, 6, PREFERENCE)
# linux/sockios.h, linux/if.h: struct ifreq with flags.
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1
_IFREQ = struct.Struct("16sH22x")


@dataclass(frozen=True)
class Part:
    """A rule or a route of one family."""

    family: int
    kind: str  # "rule" or "route"

    def __str__(self) -> str:
        version = "IPv4" if self.family == AF_INET else "IPv6"
        if self.kind == "rule":
            mark = f"{REPLY_MARK:#x}/{MARK_MASK:#x}"
            return f"{version} rule {PREFERENCE}: fwmark {mark} lookup {TABLE}"
        return f"{version} route: local default dev lo table {TABLE}"


_ALL = tuple(Part(family, kind) for family in (AF_INET, AF_INET6) for kind in ("rule", "route"))


def wanted(*, ipv6: bool) -> tuple[Part, ...]:
    """What this namespace should have. The IPv6 route can't be where lo has no IPv6."""
    parts = [Part(AF_INET, "rule"), Part(AF_INET, "route")]
    if ipv6 and Path("/proc/sys/net/ipv6").exists():
        parts.append(Part(AF_INET6, "rule"))
        if Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text().strip() != "1":
            parts.append(Part(AF_INET6, "route"))
    return tuple(parts)


def install(*, ipv6: bool) -> tuple[Part, ...]:
    """Adds what is missing and returns it. On failure takes back what it added."""
    parts = wanted(ipv6=ipv6)
    with _netlink() as netlink:
        codes = rtnetlink.change(netlink, [_added(part) for part in parts])
        added = tuple(part for part, code in zip(parts, codes, strict=True) if not code)
        failed = next((code for code in codes if code not in (0, errno.EEXIST)), 0)
        if failed:
            _withdraw(netlink, added)
            raise OSError(failed, os.strerror(failed))
        return added


def remove(parts: tuple[Part, ...] | None = None) -> None:
    """Removes the parts named, or all that are there."""
    with _netlink() as netlink:
        _withdraw(netlink, _ALL if parts is None else parts)


def present() -> tuple[Part, ...]:
    with _netlink() as netlink:
        rules = rtnetlink.dump(netlink, _all_rules())
        parts = []
        for family in (AF_INET, AF_INET6):
            if any(_is_our_rule(family, rule) for rule in rules):
                parts.append(Part(family, "rule"))
            if any(map(_is_our_route, _routes(netlink, family))):
                parts.append(Part(family, "route"))
        return tuple(parts)


def bring_lo_up() -> None:
    """For a namespace that nobody has set up; a pod's own is up."""
    with socket.socket(AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = _IFREQ.pack(b"lo", _IFF_UP)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)


def _withdraw(netlink: socket.socket, parts: Sequence[Part]) -> None:
    for code in rtnetlink.change(netlink, [_deleted(part) for part in parts]):
        # Without IPv6 the kernel knows neither the family nor the table.
        if code not in (0, errno.ENOENT, errno.ESRCH, errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code))


# ---- messages: few and always the same, so each is made once


@functools.cache
def _added(part: Part) -> bytes:
    kind = rtnetlink.NEW_RULE if part.kind == "rule" else rtnetlink.NEW_ROUTE
    return rtnetlink.addition(kind, _message(part))


@functools.cache
def _deleted(part: Part) -> bytes:
    kind = rtnetlink.DELETE_RULE if part.kind == "rule" else rtnetlink.DELETE_ROUTE
    return rtnetlink.deletion(kind, _message(part))


@functools.cache
def _all_rules() -> bytes:
    return rtnetlink.question(rtnetlink.GET_RULE, rtnetlink.RuleMessage())


@functools.cache
def _all_routes(family: int) -> bytes:
    """Of our table."""
    message = rtnetlink.RouteMessage()
    message["family"] = family
    message["attrs"] = [("RTA_TABLE", TABLE)]
    return rtnetlink.question(rtnetlink.GET_ROUTE, message)


def _message(part: Part) -> Any:
    if part.kind == "rule":
        message: Any = rtnetlink.RuleMessage()
        message["action"] = _FR_ACT_TO_TBL
        message["attrs"] = [
            ("FRA_PRIORITY", PREFERENCE),
            ("FRA_FWMARK", REPLY_MARK),
            ("FRA_FWMASK", MARK_MASK),
            ("FRA_TABLE", TABLE),
        ]
    else:
        message = rtnetlink.RouteMessage()
        message["type"] = _RTN_LOCAL
        message["proto"] = _RTPROT_STATIC
        message["scope"] = _SCOPE_HOST if part.family == AF_INET else _SCOPE_UNIVERSE
        message["attrs"] = [("RTA_TABLE", TABLE), ("RTA_OIF", _LO)]
    message["family"] = part.family
    message["table"] = TABLE
    return message


def _routes(netlink: socket.socket, family: int) -> list[bytes]:
    try:
        return rtnetlink.dump(netlink, _all_routes(family))
    except OSError as exc:
        # There is no such table, or no such family, yet.
        if exc.errno in (errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
            return []
        raise


def _is_our_rule(family: int, answer: bytes) -> bool:
    # Decoding costs ten times what looking for the number does, and the kernel has rules too.
    if _PRIORITY not in answer:
        return False
    rule = rtnetlink.decoded(rtnetlink.RuleMessage, answer)
    return bool(
        rule["family"] == family
        and rule.get_attr("FRA_PRIORITY") == PREFERENCE
        and rule.get_attr("FRA_FWMARK") == REPLY_MARK
        and rule.get_attr("FRA_FWMASK") == MARK_MASK
        and rule.get_attr("FRA_TABLE") == TABLE
        and rule["action"] == _FR_ACT_TO_TBL
        and rule["src_len"] == 0
        and rule["dst_len"] == 0
        and not rule["flags"] & 2  # FIB_RULE_INVERT
        and rule.get_attr("FRA_IIFNAME") is None
        and rule.get_attr("FRA_OIFNAME") is None
    )


def _is_our_route(answer: bytes) -> bool:
    route = rtnetlink.decoded(rtnetlink.RouteMessage, answer)
    return bool(
        route.get_attr("RTA_TABLE") == TABLE
        and route["dst_len"] == 0
        and route["type"] == _RTN_LOCAL
        and route.get_attr("RTA_OIF") == _LO
    )


@contextmanager
def _netlink() -> Iterator[socket.socket]:
    """One netlink socket of this namespace; its errors come out as ours."""
    try:
        with rtnetlink.opened() as netlink:
            yield netlink
    except OSError as exc:
        text = exc.strerror or str(exc)
        if exc.errno == errno.EPERM:
            raise NotRetryable(
                "policy routing: not permitted; give the agent CAP_NET_ADMIN"
            ) from exc
        if exc.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
            raise NotRetryable(
                f"policy routing: {text}; the kernel needs IP_MULTIPLE_TABLES"
            ) from exc
        if exc.errno == errno.ENETDOWN:
            raise RedirectError("policy routing: the interface lo is down; bring it up") from exc
        raise RedirectError(f"policy routing: {text}") from exc
