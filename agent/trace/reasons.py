"""Our own reasons to drop or refuse packets of a pod.

nftables' are the rules that drop or reject, by name, counted in each pod: a `ReasonSource`. Those
of the eBPF programs are numbered, and told one by one (refusals.py).
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from agent.trace.pods import Traced
from redirect import nft
from redirect.base import RedirectError
from redirect.netns import NetnsThread
from redirect.ruleset import FAMILY, TABLE

# Name and text by number, as in bpf/include/reasons.h.
NUMBERED = {
    1: ("captured", "pass: led to the outbound listener"),
    2: ("dns", "pass: led to the DNS listener"),
    3: ("loopback", "pass: to the pod itself, by a loopback address"),
    4: ("self", "pass: to the pod itself, by an address of its own"),
    5: ("data_plane", "pass: a socket of the data plane"),
    6: ("inbound", "pass: led to the inbound listener"),
    7: ("relay", "pass: the data plane's connection to the application"),
    8: ("hbone", "pass: to the HBONE listener"),
    9: ("probe", "pass: the kubelet's connection to a declared port"),
    10: ("unprotected", "pass: not TCP, which is all that the mesh carries"),
    11: ("bypass_inbound", "pass: inbound capture is off for the pod"),
    32: ("no_storage", "deny: no memory for the socket's record"),
    33: (
        "bound_device",
        "deny: the socket is bound to a device, so it would leave past the mesh",
    ),
    34: ("no_listener", "drop: no data plane listens for the pod"),
    35: ("assign", "drop: the kernel refused the listener for the packet"),
    36: ("udp_denied", "deny: datagrams are refused by the namespace's setting"),
    37: ("budget", "deny: as many connections of the pod wait to be accepted as may"),
    38: ("family", "deny: a protocol or an address family that the mesh can't carry"),
    39: ("ipv6_off", "deny: IPv6 is off in the data plane"),
    40: ("not_recorded", "deny: no room to record the connection, so the proxy doesn't know it"),
    41: ("stale", "deny: the socket went elsewhere than its record says, so the proxy refuses it"),
    42: (
        "unknown_destination",
        "deny: no destination on record, as of what dials the proxy's own port",
    ),
    43: ("no_pod", "deny: enrolled, but not described; no program says so any more"),
    44: ("loopback_leak", "deny: led to loopback, and would leave by another device"),
    45: ("raw_socket", "deny: TCP of a raw socket, which would leave past the mesh"),
}


@dataclass(frozen=True)
class Reason:
    # None where the rule's name is all there is.
    number: int | None
    name: str
    count: int


class ReasonSource(Protocol):
    async def counts(self, pods: Sequence[Traced]) -> dict[int, list[Reason]]:
        """Since capture began, by the pod's inode; without those of which nothing can be read."""


class NftablesReasons:
    """Reads the counters of the pod's rules."""

    def __init__(self, visitor: NetnsThread) -> None:
        self._visitor = visitor

    async def counts(self, pods: Sequence[Traced]) -> dict[int, list[Reason]]:
        found = {pod.inode: await self._read(pod) for pod in pods}
        return {inode: reasons for inode, reasons in found.items() if reasons is not None}

    async def _read(self, pod: Traced) -> list[Reason] | None:
        fd = pod.open()
        if fd is None:
            return None
        try:
            objects = await self._visitor.run(fd, _read, subject=pod.key)
        except RedirectError:
            return None
        finally:
            os.close(fd)
        return list(refusing(objects or ()))


def refusing(objects: Iterable[dict[str, Any]]) -> Iterator[Reason]:
    """The rules of a table, as nft's JSON has them, that end a packet's way."""
    for item in objects:
        rule = item.get("rule")
        if rule is None:
            continue
        parts = {name: value for part in rule["expr"] for name, value in part.items()}
        if ("drop" in parts or "reject" in parts) and isinstance(parts.get("counter"), dict):
            yield Reason(None, rule.get("comment", rule["chain"]), parts["counter"]["packets"])


def growth(before: Iterable[Reason], after: Iterable[Reason]) -> Iterator[Reason]:
    """What was met since. Counters that began anew count from zero."""
    known = {(one.number, one.name): one.count for one in before}
    for one in after:
        was = known.get((one.number, one.name), 0)
        more = one.count - was if one.count >= was else one.count
        if more:
            yield replace(one, count=more)


def _read() -> list[dict[str, Any]] | None:
    return nft.read(FAMILY, TABLE, counters=True)
