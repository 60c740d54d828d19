"""What each noun of `underpass trace` makes of the kernel's records: rows, which are plain
dictionaries and go out as JSON as they are; agent/cli/trace.py puts them into words."""

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, ClassVar, Protocol

from agent.trace.btf import Btf, UnknownType
from agent.trace.connections import Connections, Seen
from agent.trace.dns import Lookup, Lookups
from agent.trace.latency import Latencies
from agent.trace.node import Node
from agent.trace.packet import end, parse, protocol
from agent.trace.pods import Traced
from agent.trace.reasons import NUMBERED, NftablesReasons, Reason, ReasonSource, growth
from agent.trace.refusals import Refusal, Refusals, UnknownLayout
from agent.trace.tracer import Record
from redirect.base import RedirectError
from redirect.netns import NetnsThread
from redirect.sockets import Connection, connections, listening

Row = dict[str, Any]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    # Either end's; None: all.
    port: int | None = None
    # Also the data plane's own sockets.
    every: bool = False

    def takes(self, own: bool, ports: Iterable[int]) -> bool:
        return (self.every or not own) and (self.port is None or self.port in ports)


class View(Protocol):
    program: ClassVar[str]

    async def look(self, pods: Sequence[Traced], now: int) -> list[Row]:
        """What can be seen by asking: at the start, when the tracer is ready, every second."""

    def poll(self, note: Note) -> Iterator[Row]:
        """What can be read all the time, many times a second; `note` says what is to be known of
        it."""

    def ready(self) -> None:
        """From now on nothing is missed."""

    def lost(self) -> None:
        """Records didn't find room."""

    def feed(self, record: Record) -> Iterator[Row]: ...

    def due(self, now: int) -> Iterator[Row]:
        """What waited for something that didn't come."""

    def summary(self) -> Iterator[Row]:
        """At the end."""


class _View:
    """Nothing but records."""

    def __init__(self, node: Node, visitor: NetnsThread, wanted: Wanted) -> None:
        self.node = node
        self.visitor = visitor
        self.wanted = wanted

    async def look(self, pods: Sequence[Traced], now: int) -> list[Row]:
        return []

    def poll(self, note: Note) -> Iterator[Row]:
        return iter(())

    def ready(self) -> None:
        pass

    def lost(self) -> None:
        pass

    def due(self, now: int) -> Iterator[Row]:
        return iter(())

    def summary(self) -> Iterator[Row]:
        return iter(())

    def row(self, netns: int, moment: int, event: str) -> Row:
        pod = self.node.pods.get(netns)
        return {
            "time": wall(moment),
            "event": event,
            "pod": pod.key if pod else "",
            "pod_uid": pod.uid if pod else "",
        }


class ConnectionsView(_View):
    """Already open, opened, closed, failed."""

    program: ClassVar[str] = "tcp"

    def __init__(self, node: Node, visitor: NetnsThread, wanted: Wanted) -> None:
        super().__init__(node, visitor, wanted)
        self._state = Connections(node.is_own, node.ports)
        self._looked: set[int] = set()

    async def look(self, pods: Sequence[Traced], now: int) -> list[Row]:
        rows: list[Row] = []
        for pod in pods:
            if pod.inode in self._looked:
                continue
            self._looked.add(pod.inode)
            there, ports = await _sockets(self.visitor, pod)
            found = list(self._state.already_open(pod.inode, there, ports, now))
            if self.node.rewrites and found:
                await self._name(pod, found)
            rows += self._rows(found)
        return rows

    async def _name(self, pod: Traced, found: Iterable[Seen]) -> None:
        """What those asked for that were led to the listener before we came."""
        known = await asyncio.to_thread(self.node.dialled)
        for seen in found:
            if seen.outbound and not seen.own and (told := known.get((pod.uid, seen.local[1]))):
                host, _, port = told.rpartition(":")
                seen.dialled = ip_address(host.strip("[]")), int(port)

    def ready(self) -> None:
        self._looked.clear()

    def lost(self) -> None:
        self._state.lost()

    def feed(self, record: Record) -> Iterator[Row]:
        return self._rows(self._state.feed(record))

    def due(self, now: int) -> Iterator[Row]:
        return self._rows(self._state.due(now))

    def _rows(self, found: Iterable[Seen]) -> Iterator[Row]:
        for seen in found:
            if self.wanted.takes(seen.own, _ports(seen)):
                yield self.row(seen.netns, seen.time, seen.event) | _connection(seen)


class LatencyView(_View):
    """How long each connection took to be made, and a summary of them."""

    program: ClassVar[str] = "tcp"

    def __init__(self, node: Node, visitor: NetnsThread, wanted: Wanted) -> None:
        super().__init__(node, visitor, wanted)
        self._state = Connections(node.is_own, node.ports)
        self._kinds: dict[tuple[str, str, str], Latencies] = {}

    def feed(self, record: Record) -> Iterator[Row]:
        return self._rows(self._state.feed(record))

    def due(self, now: int) -> Iterator[Row]:
        return self._rows(self._state.due(now))

    def summary(self) -> Iterator[Row]:
        for (pod, by, direction), kind in sorted(self._kinds.items()):
            yield {
                "event": "summary",
                "pod": pod,
                "by": by,
                "direction": direction,
                "count": kind.count,
                "p50_us": kind.percentile(0.5),
                "p90_us": kind.percentile(0.9),
                "p99_us": kind.percentile(0.99),
                "max_us": kind.longest_us,
                "histogram": [
                    {"from_us": low, "to_us": high, "count": count}
                    for low, high, count in kind.histogram()
                ],
            }

    def _rows(self, found: Iterable[Seen]) -> Iterator[Row]:
        for seen in found:
            if seen.event != "opened":
                continue
            if not self.wanted.takes(seen.own, _ports(seen)):
                continue
            # A client waits for its SYN's answer; a server measures that of its own.
            took = seen.connect_ns // 1000 if seen.connect_ns is not None else seen.rtt_us
            if took is None:
                continue
            row = self.row(seen.netns, seen.time, "connected" if seen.outbound else "accepted")
            row |= _addresses(seen) | {"latency_us": took}
            kind = (row["pod"], row["by"], row["direction"])
            self._kinds.setdefault(kind, Latencies()).add(took)
            yield row


class DnsView(_View):
    program: ClassVar[str] = "dns"

    def __init__(self, node: Node, visitor: NetnsThread, wanted: Wanted) -> None:
        super().__init__(node, visitor, wanted)
        self._state = Lookups(node.is_own, node.ports.dns or 53)

    def feed(self, record: Record) -> Iterator[Row]:
        return self._rows(self._state.feed(record))

    def due(self, now: int) -> Iterator[Row]:
        return self._rows(self._state.due(now))

    def _rows(self, found: Iterable[Lookup]) -> Iterator[Row]:
        for one in found:
            ports = [int(text.rpartition(":")[2]) for text in (one.client, one.server)]
            if not self.wanted.takes(one.own, (*ports, one.via or 0)):
                continue
            event = "answered" if one.code else "unanswered"
            yield self.row(one.netns, one.time, event) | {
                "by": "underpass" if one.own else "app",
                "direction": "outbound" if one.outbound else "inbound",
                "client": one.client,
                "server": one.server,
                "captured": one.via is not None,
                "name": one.name,
                "type": one.type,
                "code": one.code,
                "addresses": list(one.addresses),
                "latency_us": None if one.latency_ns is None else one.latency_ns // 1000,
                "process": one.process,
                "pid": one.pid,
            }


class DropsView(_View):
    """Packets that the kernel dropped, and what our own rules dropped or refused meanwhile."""

    program: ClassVar[str] = "drops"

    def __init__(self, node: Node, visitor: NetnsThread, wanted: Wanted) -> None:
        super().__init__(node, visitor, wanted)
        self._sources: tuple[ReasonSource, ...] = (NftablesReasons(visitor),)
        self._known: dict[tuple[ReasonSource, int], list[Reason]] = {}
        self._names = _drop_reasons()
        self._refusals: Refusals | None = None
        self._unread = ""

    async def look(self, pods: Sequence[Traced], now: int) -> list[Row]:
        rows: list[Row] = []
        # A port's packets can't be told from others by a counter.
        if self.wanted.port is not None:
            return rows
        for source in self._sources:
            for inode, reasons in (await source.counts(pods)).items():
                known = self._known.get((source, inode))
                self._known[source, inode] = reasons
                for reason in growth(known, reasons) if known is not None else ():
                    told = {"reason": reason.name, "number": reason.number, "count": reason.count}
                    rows.append(self.row(inode, now, "refused") | told)
        return rows

    def poll(self, note: Note) -> Iterator[Row]:
        if self._refusals is None:
            if self.node.pins is None:
                return
            self._refusals = Refusals(self.node.pins)
        try:
            found, lost = self._refusals.read()
        except (UnknownLayout, OSError) as exc:
            # Said once: it is tried again and again.
            if str(exc) != self._unread:
                note(f"refusals by our own programs can't be read: {exc}")
            self._unread = str(exc)
            return
        if lost:
            note(f"{lost} refusals were lost: they come faster than they are read")
        for refusal in found:
            ports = (refusal.local[1], refusal.remote[1])
            if refusal.netns in self.node.pods and self.wanted.takes(False, ports):
                yield self.row(refusal.netns, refusal.time, "refused") | _refused(refusal)

    def feed(self, record: Record) -> Iterator[Row]:
        packet = parse(bytes.fromhex(record["packet"]))
        if packet is None or not self.wanted.takes(False, packet.ports):
            return
        source, destination = packet.ends
        number = record["reason"]
        yield self.row(record["netns"], record["time"], "dropped") | {
            "reason": self._names.get(number, str(number)),
            "number": number,
            "where": record["location"],
            "protocol": packet.protocol,
            "source": source,
            "destination": destination,
            "flags": packet.flags,
            "length": record["length"],
        }


def wall(moment: int) -> str:
    """The kernel's monotonic nanoseconds as a time of day."""
    now = time.time_ns() - time.monotonic_ns() + moment
    return datetime.fromtimestamp(now / 1e9, UTC).isoformat(timespec="milliseconds")


def _connection(seen: Seen) -> Row:
    return _addresses(seen) | {
        # None: not known, since events were lost.
        "captured": True if seen.via is not None else False if seen.sure else None,
        "via": seen.via,
        "sent": seen.sent,
        "received": seen.received,
        "connect_us": None if seen.connect_ns is None else seen.connect_ns // 1000,
        "duration_ms": None if seen.duration_ns is None else seen.duration_ns // 1_000_000,
        "process": seen.process,
        "pid": seen.pid,
    }


def _refused(refusal: Refusal) -> Row:
    name, text = NUMBERED.get(refusal.reason, (str(refusal.reason), ""))
    local, remote = _end(*refusal.local), _end(*refusal.remote)
    source, destination = (remote, local) if refusal.inbound else (local, remote)
    return {
        "reason": name,
        "number": refusal.reason,
        "count": 1,
        "text": text,
        "direction": "inbound" if refusal.inbound else "outbound",
        "protocol": protocol(refusal.protocol),
        "source": source,
        "destination": destination,
        "process": refusal.process,
        "pid": refusal.pid,
    }


def _end(address: IPv4Address | IPv6Address, port: int) -> str:
    """ "" where nobody has said yet: of a socket that wasn't made."""
    if port:
        return end(address, port)
    return "" if address.is_unspecified else str(address)


def _ports(seen: Seen) -> tuple[int, ...]:
    return seen.local[1], seen.remote[1], seen.dialled[1] if seen.dialled else 0


def _addresses(seen: Seen) -> Row:
    local, remote = end(*seen.local), end(*(seen.dialled or seen.remote))
    source, destination = (local, remote) if seen.outbound else (remote, local)
    return {
        "direction": "outbound" if seen.outbound else "inbound",
        "by": "underpass" if seen.own else "app",
        "source": source,
        "destination": destination,
    }


async def _sockets(visitor: NetnsThread, pod: Traced) -> tuple[list[Connection], set[int]]:
    fd = pod.open()
    if fd is None:
        return [], set()
    try:
        return await visitor.run(
            fd, lambda: (connections(sizes=True), listening()), subject=pod.key
        )
    except RedirectError:
        # It went; its connections with it.
        return [], set()
    finally:
        os.close(fd)


def _drop_reasons() -> dict[int, str]:
    """Without the prefix that all have; {} is for kernels that don't tell."""
    try:
        found = Btf().enum("skb_drop_reason")
    except (OSError, UnknownType):
        return {}
    return {number: name.removeprefix("SKB_DROP_REASON_") for number, name in found.items()}
