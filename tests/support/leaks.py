"""What passes a link in clear: every end of TCP and UDP, segments without payload included.

Resets are left out: they open nothing, carry nothing, and any kernel sends them by itself to a
stranger's segment.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from agent.cli.demo.wiretap import Wiretap

if TYPE_CHECKING:
    from collections.abc import Iterator

# HBONE between the nodes, and both agents' way to the control plane.
MESH_PORTS = frozenset({15008, 15012})

TCP, UDP = 6, 17
RST = 4


class Seen(NamedTuple):
    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int


class Leaks(Wiretap):
    """A wiretap that also keeps the ends of all it sees."""

    def __init__(self, namespace: str, interface: str, marker: str) -> None:
        super().__init__(namespace, interface, marker.encode())
        self.seen: set[Seen] = set()

    def _look(self, frame: bytes) -> None:
        super()._look(frame)
        self.seen.update(_ends(frame))

    def between(self, client: str, server: str, port: int) -> set[Seen]:
        """TCP from a client towards a port of a server, whatever it carried."""
        return {
            seen
            for seen in self.seen
            if (seen.protocol, seen.source, seen.destination) == (TCP, client, server)
            and seen.destination_port == port
        }

    def tcp_outside_the_mesh(self) -> set[Seen]:
        return {
            seen
            for seen in self.seen
            if seen.protocol == TCP and not MESH_PORTS & {seen.source_port, seen.destination_port}
        }


def _ends(frame: bytes) -> Iterator[Seen]:
    (kind,) = struct.unpack_from("!H", frame, 12)
    if kind == 0x0800:
        family, protocol = socket.AF_INET, frame[23]
        source, destination, start = frame[26:30], frame[30:34], 14 + (frame[14] & 15) * 4
    elif kind == 0x86DD:
        family, protocol = socket.AF_INET6, frame[20]
        source, destination, start = frame[22:38], frame[38:54], 54
    else:
        return
    if protocol == UDP or (protocol == TCP and not frame[start + 13] & RST):
        ports = struct.unpack_from("!HH", frame, start)
        yield Seen(
            protocol,
            socket.inet_ntop(family, source),
            ports[0],
            socket.inet_ntop(family, destination),
            ports[1],
        )
