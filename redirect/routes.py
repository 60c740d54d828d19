"""Policy routing that brings an app's reply to a spoofed source back to the data plane.

Packets with the reply mark look at table 100 first, where everything is local (facts istio-ambient
3.1). All functions work in the network namespace that the calling thread is in.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Any

from redirect.base import NotRetryable, RedirectError
from redirect.rtnetlink import IPRoute, NetlinkError
from redirect.ruleset import MARK_MASK, REPLY_MARK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TABLE = 100
PREFERENCE = 32764

_LO = 1  # always the first interface of a namespace
_RTN_LOCAL = 2
_SCOPE_HOST = 254
_FR_ACT_TO_TBL = 1


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
    with _netlink() as netlink:
        present = _present(netlink)
        missing = [part for part in wanted(ipv6=ipv6) if part not in present]
        added: list[Part] = []
        try:
            for part in missing:
                _change(netlink, "add", part)
                added.append(part)
        except NetlinkError:
            _withdraw(netlink, added)
            raise
        return tuple(added)


def remove(parts: tuple[Part, ...] | None = None) -> None:
    """Removes the parts named, or all that are there."""
    with _netlink() as netlink:
        present = _present(netlink)
        _withdraw(netlink, [p for p in present if parts is None or p in parts])


def present() -> tuple[Part, ...]:
    with _netlink() as netlink:
        return _present(netlink)


def bring_lo_up() -> None:
    """For a namespace that nobody has set up; a pod's own is up."""
    with _netlink() as netlink:
        netlink.link("set", index=_LO, state="up")


def _withdraw(netlink: Any, parts: list[Part]) -> None:
    for part in parts:
        try:
            _change(netlink, "del", part)
        except NetlinkError as exc:
            if exc.code not in (errno.ENOENT, errno.ESRCH):
                raise


def _change(netlink: Any, command: str, part: Part) -> None:
    if part.kind == "rule":
        change: Callable[..., Any] = netlink.rule
        fields: dict[str, Any] = {
            "priority": PREFERENCE,
            "fwmark": REPLY_MARK,
            "fwmask": MARK_MASK,
            "table": TABLE,
            "action": "to_tbl",
        }
    else:
        change = netlink.route
        fields = {
            "dst": "default",
            "type": "local",
            "scope": "host" if part.family == AF_INET else "universe",
            "oif": _LO,
            "table": TABLE,
        }
    try:
        change(command, family=part.family, **fields)
    except NetlinkError as exc:
        if command == "add" and exc.code == errno.EEXIST:
            return
        raise


def _present(netlink: Any) -> tuple[Part, ...]:
    parts = []
    for family in (AF_INET, AF_INET6):
        if any(_is_our_rule(rule) for rule in netlink.get_rules(family=family)):
            parts.append(Part(family, "rule"))
        routes = netlink.get_routes(family=family, table=TABLE)
        if any(_is_our_route(route) for route in routes):
            parts.append(Part(family, "route"))
    return tuple(parts)


def _is_our_rule(rule: Any) -> bool:
    return bool(
        rule.get_attr("FRA_PRIORITY") == PREFERENCE
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


def _is_our_route(route: Any) -> bool:
    return bool(
        route.get_attr("RTA_TABLE") == TABLE
        and route["dst_len"] == 0
        and route["type"] == _RTN_LOCAL
        and route.get_attr("RTA_OIF") == _LO
    )


@contextmanager
def _netlink() -> Iterator[Any]:
    """One netlink socket of this namespace; its errors come out as ours."""
    socket: Any = IPRoute  # untyped library
    try:
        with socket() as netlink:
            yield netlink
    except NetlinkError as exc:
        if exc.code == errno.EPERM:
            raise NotRetryable(
                "policy routing: not permitted; give the agent CAP_NET_ADMIN"
            ) from exc
        if exc.code in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
            raise NotRetryable(
                f"policy routing: {exc}; the kernel needs IP_MULTIPLE_TABLES"
            ) from exc
        if exc.code == errno.ENETDOWN:
            raise RedirectError("policy routing: the interface lo is down; bring it up") from exc
        raise RedirectError(f"policy routing: {exc}") from exc
