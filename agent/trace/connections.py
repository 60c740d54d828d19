"""From TCP sockets' states to the connections of pods: opened, closed, failed, and whether they
went through the data plane. Decides only; reads nothing by itself."""

import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from agent.trace.tracer import Record
from redirect.base import Ports
from redirect.sockets import Address, Connection, plain

# linux/tcp_states.h
ESTABLISHED, SYN_SENT = 1, 2
# The data plane's end of a captured connection is told within microseconds of the application's.
HOLD_NS = 100_000_000
# Of each kind that is kept; beyond, the oldest are forgotten.
KEPT = 65536

_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(eq=False)
class Seen:
    """A socket of a pod's namespace. `event` is what the last step was."""

    netns: int
    local: Address
    remote: Address
    outbound: bool
    # The data plane's own.
    own: bool
    event: str = "opened"
    time: int = 0
    # When it was asked for, or accepted; None: before the tracer came.
    began: int | None = None
    connect_ns: int | None = None
    rtt_us: int | None = None
    # The data plane's port that it went through; None: past it.
    via: int | None = None
    # Nothing was lost that could tell of its capture.
    sure: bool = True
    sent: int | None = None
    received: int | None = None
    process: str = ""
    pid: int = 0
    # What the application asked for, where capture led its socket elsewhere.
    dialled: Address | None = None
    duration_ns: int | None = None


def ends(record: Record) -> tuple[Address, Address]:
    size = 4 if record["family"] == socket.AF_INET else 16
    local, remote = (bytes.fromhex(record[name])[:size] for name in ("saddr", "daddr"))
    return (plain(local), record["sport"]), (plain(remote), record["dport"])


def asked(address: bytes) -> Address | None:
    """A socket address as connect(2) takes it; None when it wasn't seen."""
    family = int.from_bytes(address[:2], sys.byteorder)
    port = int.from_bytes(address[2:4])
    if family == socket.AF_INET:
        return plain(address[4:8]), port
    return (plain(address[8:24]), port) if family == socket.AF_INET6 else None


class Connections:
    """`feed` every record, `due` now and then; both give what is to be told, in order.

    `own` knows the data plane's cgroups by number.
    """

    def __init__(self, own: Callable[[int], bool], ports: Ports) -> None:
        self._own = own
        self._ports = ports
        self._own_ports = (ports.outbound, ports.inbound_plaintext, ports.inbound_hbone)
        self._sure = True
        self._dialling: dict[int, Record] = {}
        self._live: dict[tuple[int, Address, Address], Seen] = {}
        # Applications' connections by their own end, until it is known whether they were caught.
        self._held: dict[tuple[int, Address], Seen] = {}
        # What 15001 accepted, by the client.
        self._caught: dict[tuple[int, Address], Seen] = {}
        # What 15006 accepted and hasn't been delivered to an application, by the client's address.
        self._plaintext: dict[tuple[int, object], list[Seen]] = defaultdict(list)

    def already_open(
        self, netns: int, found: Iterable[Connection], listening: set[int], now: int
    ) -> Iterator[Seen]:
        """Those not known yet, of one namespace."""
        new = []
        for one in found:
            inbound = one.local[1] in listening
            own = self._own(one.cgroup) or (inbound and one.local[1] in self._own_ports)
            seen = Seen(netns, one.local, one.remote, not inbound, own, "open", now)
            seen.sent, seen.received = one.sent, one.received
            if (netns, one.local, one.remote) not in self._live:
                new.append(seen)
        # The data plane's first: the others are judged by them.
        for seen in sorted(new, key=lambda seen: not seen.own):
            self._remember(seen)
            if seen.own:
                self._leg(seen)
            else:
                self._judge(seen)
            yield seen

    def lost(self) -> None:
        """Records are missing: what isn't seen needn't be absent any more."""
        self._sure = False
        for seen in self._held.values():
            seen.sure = False

    def feed(self, record: Record) -> Iterator[Seen]:
        if record["after"] == SYN_SENT:
            _keep(self._dialling, record["sk"], record)
        elif record["after"] == ESTABLISHED:
            yield from self._opened(record)
        else:
            yield from self._closed(record)

    def due(self, now: int) -> Iterator[Seen]:
        """What was held back for long enough: nobody caught it."""
        for key, seen in list(self._held.items()):
            if now - seen.time < HOLD_NS:
                return
            del self._held[key]
            yield seen

    def _opened(self, record: Record) -> Iterator[Seen]:
        seen = self._seen(record)
        known = self._live.get((seen.netns, seen.local, seen.remote))
        if known is not None and known.event == "open":
            # It was listed while it was opening.
            return
        self._remember(seen)
        if seen.own:
            caught = self._leg(seen)
            yield seen
            if caught is not None:
                yield caught
        elif self._judge(seen) or not seen.outbound:
            yield seen
        else:
            _keep(self._held, (seen.netns, seen.local), seen)

    def _closed(self, record: Record) -> Iterator[Seen]:
        seen = self._seen(record)
        known = self._live.pop((seen.netns, seen.local, seen.remote), None)
        if known is not None:
            if self._held.pop((known.netns, known.local), None) is known:
                yield known
            self._forget(known)
            seen.began, seen.via, seen.outbound = known.began, known.via, known.outbound
            seen.connect_ns, seen.process, seen.pid = known.connect_ns, known.process, known.pid
            seen.own, seen.dialled, seen.sure = known.own, known.dialled, known.sure
        elif record["before"] != SYN_SENT:
            # It was never told as open: half closed when we came, given up by its client before
            # it was one, or lost.
            return
        seen.event = "failed" if record["before"] == SYN_SENT else "closed"
        if seen.began is not None:
            seen.duration_ns = seen.time - seen.began
        seen.sent, seen.received = record["sent"], record["received"]
        yield seen

    def _seen(self, record: Record) -> Seen:
        local, remote = ends(record)
        dial = self._dialling.pop(record["sk"], None)
        outbound = record["before"] == SYN_SENT
        own = self._own(record["cgroup"]) or (not outbound and local[1] in self._own_ports)
        seen = Seen(record["netns"], local, remote, outbound, own, time=record["time"])
        seen.sure = self._sure
        if dial is not None:
            seen.began, seen.process, seen.pid = dial["time"], dial["comm"], dial["pid"]
            seen.connect_ns = seen.time - seen.began
            if self._led(seen):
                seen.dialled = asked(bytes.fromhex(dial["dialled"]))
        elif record["after"] == ESTABLISHED:
            seen.began = seen.time
        if record["after"] == ESTABLISHED:
            seen.rtt_us = record["srtt"]
        return seen

    def _leg(self, leg: Seen) -> Seen | None:
        """Notes a connection of the data plane; the application's that it settles."""
        client = (leg.netns, leg.remote)
        if leg.outbound:
            return None
        if leg.local[1] == self._ports.outbound:
            _keep(self._caught, client, leg)
            if (seen := self._held.pop(client, None)) is not None:
                seen.via = self._ports.outbound
                return seen
        elif leg.local[1] not in (self._ports.inbound_hbone, self._ports.dns):
            # eBPF leaves the address that the client asked for in the accepted socket.
            waiting = self._plaintext[leg.netns, leg.remote[0]]
            if len(waiting) < KEPT:
                waiting.append(leg)
        return None

    def _judge(self, seen: Seen) -> bool:
        """Whether it is known by now that it was caught; sets `via`."""
        if seen.outbound:
            if self._led(seen) or (seen.netns, seen.local) in self._caught:
                seen.via = self._ports.outbound
        else:
            peer = self._live.get((seen.netns, seen.remote, seen.local))
            if peer is not None and peer.own:
                # Plaintext has a connection of its own right before; tunnels are shared.
                waiting = self._plaintext.pop((seen.netns, seen.remote[0]), [])
                seen.via = self._ports.inbound_hbone
                if waiting:
                    waiting.pop(0)
                    seen.via = self._ports.inbound_plaintext
                if waiting:
                    self._plaintext[seen.netns, seen.remote[0]] = waiting
        return seen.via is not None

    def _led(self, seen: Seen) -> bool:
        """eBPF has it connect to the listener itself."""
        host, port = seen.remote
        return not seen.own and seen.outbound and host.is_loopback and port == self._ports.outbound

    def _remember(self, seen: Seen) -> None:
        self._live[seen.netns, seen.local, seen.remote] = seen
        if len(self._live) > KEPT:
            self._forget(self._live.pop(next(iter(self._live))))

    def _forget(self, seen: Seen) -> None:
        client = (seen.netns, seen.remote)
        if self._caught.get(client) is seen:
            del self._caught[client]
        waiting = self._plaintext.get((seen.netns, seen.remote[0]), [])
        if seen in waiting:
            waiting.remove(seen)
        if not waiting:
            self._plaintext.pop((seen.netns, seen.remote[0]), None)


def _keep(table: dict[_K, _V], key: _K, value: _V) -> None:
    table[key] = value
    if len(table) > KEPT:
        del table[next(iter(table))]
