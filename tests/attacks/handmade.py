"""Segments and datagrams written byte by byte, for sockets that no hook of `connect` sees."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from tests.attacks.talk import family

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
TCP = 6
WINDOW = 64_000


class Ends(NamedTuple):
    source: str
    source_port: int
    destination: str
    destination_port: int

    def turned(self) -> Ends:
        return Ends(self.destination, self.destination_port, self.source, self.source_port)


class Segment(NamedTuple):
    ends: Ends
    flags: int
    sequence: int
    acknowledged: int
    payload: bytes


def tcp(segment: Segment) -> bytes:
    """With the right checksum."""
    ends = segment.ends
    addresses = b"".join(
        socket.inet_pton(family(end), end) for end in (ends.source, ends.destination)
    )
    head = struct.pack(
        "!HHIIBBHHH",
        ends.source_port,
        ends.destination_port,
        segment.sequence,
        segment.acknowledged,
        5 << 4,
        segment.flags,
        WINDOW,
        0,
        0,
    )
    body = head + segment.payload
    # The rest of the pseudo header adds up to the same for both families (RFC 8200 section 8.1).
    pseudo = addresses + struct.pack("!BBH", 0, TCP, len(body))
    return body[:16] + struct.pack("!H", _checksum(pseudo + body)) + body[18:]


def packet(segment: Segment) -> bytes:
    """Over IPv4, with right checksums."""
    return packet_v4(segment.ends, tcp(segment))


def packet_v4(ends: Ends, body: bytes, *, offset: int = 0, more: bool = False) -> bytes:
    """Of TCP; `offset` in bytes, of a fragment that `more` follow."""
    source, destination = socket.inet_aton(ends.source), socket.inet_aton(ends.destination)
    place = offset // 8 | more << 13
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, place, 64, TCP, 0, source, destination
    )
    return ip[:10] + struct.pack("!H", _checksum(ip)) + ip[12:] + body


def packet_v6(segment: Segment, *extensions: tuple[int, bytes]) -> bytes:
    """Behind extension headers: their numbers, and what they hold but for the next one's."""
    body, following = tcp(segment), TCP
    for number, rest in reversed(extensions):
        body, following = bytes([following]) + rest + body, number
    ends = segment.ends
    addresses = (socket.inet_pton(socket.AF_INET6, end) for end in (ends.source, ends.destination))
    return struct.pack("!IHBB16s16s", 6 << 28, len(body), following, 64, *addresses) + body


def parse(data: bytes) -> Segment | None:
    """None for what isn't TCP over IPv4."""
    if len(data) < 40 or data[0] >> 4 != 4 or data[9] != TCP:
        return None
    start = (data[0] & 15) * 4
    (length,) = struct.unpack_from("!H", data, 2)
    ports = struct.unpack_from("!HHIIBB", data, start)
    ends = Ends(socket.inet_ntoa(data[12:16]), ports[0], socket.inet_ntoa(data[16:20]), ports[1])
    return Segment(ends, ports[5], ports[2], ports[3], data[start + (ports[4] >> 4) * 4 : length])


def own_address(host: str) -> str:
    """The address that this namespace uses towards a host; sends nothing."""
    with socket.socket(family(host), socket.SOCK_DGRAM) as sock:
        sock.connect((host, 9))
        return str(sock.getsockname()[0])


def _checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
