"""DNS questions of pods and how long their answers took, from the packets of UDP."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from agent.trace.packet import Packet, end, parse
from agent.trace.tracer import Record

# A libc asks again after so long.
PATIENCE_NS = 5_000_000_000
# Questions that wait at once; beyond, the oldest are forgotten.
KEPT = 16384

_HEAD = struct.Struct("!6H")
_RECORD = struct.Struct("!2HIH")
_TYPES = {
    1: "A",
    2: "NS",
    5: "CNAME",
    6: "SOA",
    12: "PTR",
    15: "MX",
    16: "TXT",
    28: "AAAA",
    33: "SRV",
    41: "OPT",
    64: "SVCB",
    65: "HTTPS",
    255: "ANY",
}
_CODES = {0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}


@dataclass(frozen=True)
class Message:
    id: int
    answer: bool
    code: str
    name: str
    type: str
    addresses: tuple[str, ...] = ()

    @property
    def question(self) -> tuple[int, str, str]:
        """What an answer must have in common with it."""
        return self.id, self.name, self.type


@dataclass(frozen=True)
class Lookup:
    """A question and what came of it; without `code` nothing came in time."""

    netns: int
    time: int
    # Of the data plane, on behalf of a pod.
    own: bool
    # Asked by this pod, as opposed to asked of it.
    outbound: bool
    client: str
    server: str
    # It went to the data plane's port.
    via: int | None
    name: str
    type: str
    process: str = ""
    pid: int = 0
    code: str = ""
    addresses: tuple[str, ...] = ()
    latency_ns: int | None = None


class Lookups:
    """`feed` every record, `due` now and then."""

    def __init__(self, own: Callable[[int], bool], dns_port: int) -> None:
        self._own = own
        self._port = dns_port
        self._waiting: dict[tuple[object, ...], tuple[Lookup, int]] = {}

    def feed(self, record: Record) -> Iterator[Lookup]:
        packet = parse(bytes.fromhex(record["packet"]))
        if packet is None or not packet.payload:
            return
        message = read(packet.payload)
        if message is None:
            return
        if message.answer:
            yield from self._answered(record, packet, message)
        else:
            self._asked(record, packet, message)

    def due(self, now: int) -> Iterator[Lookup]:
        for key, (lookup, _) in list(self._waiting.items()):
            if now - lookup.time < PATIENCE_NS:
                return
            del self._waiting[key]
            yield lookup

    def _asked(self, record: Record, packet: Packet, message: Message) -> None:
        key = (record["netns"], packet.source, packet.ports[0], *message.question)
        if key in self._waiting:
            # Sent again: what counts is how long the asker has waited.
            return
        client, server = packet.ends
        lookup = Lookup(
            netns=record["netns"],
            time=record["time"],
            own=self._own(record["cgroup"]),
            outbound=bool(record["sent"]),
            client=client,
            server=server,
            via=self._port if packet.ports[1] == self._port else None,
            name=message.name,
            type=message.type,
            process=record["comm"],
            pid=record["pid"],
        )
        self._waiting[key] = lookup, record["time"]
        if len(self._waiting) > KEPT:
            del self._waiting[next(iter(self._waiting))]

    def _answered(self, record: Record, packet: Packet, message: Message) -> Iterator[Lookup]:
        key = (record["netns"], packet.destination, packet.ports[1], *message.question)
        found = self._waiting.pop(key, None)
        if found is None:
            return
        lookup, asked = found
        fields = {**vars(lookup), "code": message.code, "addresses": message.addresses}
        # The address that was asked: the answer of the data plane's port comes in its name.
        fields["server"] = end(packet.source, packet.ports[0])
        fields["latency_ns"] = record["time"] - asked
        yield Lookup(**fields)


def read(data: bytes) -> Message | None:
    """None for what isn't one question, or its answer (RFC 1035 4.1)."""
    try:
        number, flags, questions, answers, _, _ = _HEAD.unpack_from(data)
        if questions != 1 or flags >> 11 & 15:
            return None
        name, at = _name(data, _HEAD.size)
        kind = int.from_bytes(data[at : at + 2])
    except (struct.error, IndexError):
        return None
    answer = bool(flags >> 15)
    code = _CODES.get(flags & 15, str(flags & 15)) if answer else ""
    addresses = _addresses(data, at + 4, answers) if answer else ()
    return Message(number, answer, code, name, _TYPES.get(kind, f"TYPE{kind}"), addresses)


def _addresses(data: bytes, at: int, count: int) -> tuple[str, ...]:
    """Those that were copied: long answers are cut."""
    found: list[str] = []
    try:
        for _ in range(count):
            _, at = _name(data, at)
            kind, _, _, size = _RECORD.unpack_from(data, at)
            at += _RECORD.size
            value = data[at : at + size]
            if kind == 1 and len(value) == 4:
                found.append(str(IPv4Address(value)))
            elif kind == 28 and len(value) == 16:
                found.append(str(IPv6Address(value)))
            at += size
    except (struct.error, IndexError):
        pass
    return tuple(found)


def _name(data: bytes, at: int) -> tuple[str, int]:
    """The name without its last dot, and where it ends. Each pointer leads further back."""
    labels: list[str] = []
    floor = at
    after: int | None = None
    while size := data[at]:
        if size >= 0xC0:
            target = (size & 0x3F) << 8 | data[at + 1]
            after = at + 2 if after is None else after
            if target >= floor:
                raise IndexError
            at = floor = target
            continue
        if size >= 0x40:
            raise IndexError
        label = data[at + 1 : at + 1 + size]
        # Whoever asks chooses these bytes, and they go to a terminal.
        labels.append("".join(chr(b) if 0x21 <= b < 0x7F else f"\\{b:03}" for b in label))
        at += 1 + size
    return ".".join(labels) or ".", at + 1 if after is None else after
