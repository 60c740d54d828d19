"""The begin of an IP packet, as far as it was copied. What is odd gives less, never an error."""

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

TCP, UDP = 6, 17
_PROTOCOLS = {
    1: "icmp",
    TCP: "tcp",
    UDP: "udp",
    33: "dccp",
    58: "icmpv6",
    132: "sctp",
    136: "udplite",
    262: "mptcp",
}
_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG")
_PORTS = struct.Struct("!HH")


@dataclass(frozen=True)
class Packet:
    protocol: str
    source: str
    destination: str
    # Of TCP and UDP, else ().
    ports: tuple[int, ...] = ()
    flags: str = ""
    payload: bytes = b""

    @property
    def ends(self) -> tuple[str, str]:
        """`address:port` where there are ports."""
        if not self.ports:
            return self.source, self.destination
        return end(self.source, self.ports[0]), end(self.destination, self.ports[1])


def protocol(number: int) -> str:
    return _PROTOCOLS.get(number, str(number))


def end(address: object, port: int) -> str:
    text = str(address)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def parse(data: bytes) -> Packet | None:
    """None when it is no IP packet."""
    version = data[0] >> 4 if data else 0
    if version == 4 and len(data) >= 20:
        number, at = data[9], (data[0] & 15) * 4
        source, destination = str(IPv4Address(data[12:16])), str(IPv4Address(data[16:20]))
        if int.from_bytes(data[6:8]) & 0x1FFF:
            # A later fragment has no ports.
            number = -number
    elif version == 6 and len(data) >= 40:
        number, at = data[6], 40
        source, destination = str(IPv6Address(data[8:24])), str(IPv6Address(data[24:40]))
    else:
        return None
    if number not in (TCP, UDP) or len(data) < at + 4:
        return Packet(protocol(abs(number)), source, destination)
    ports, flags, payload = _PORTS.unpack_from(data, at), "", b""
    if number == TCP and len(data) > at + 13:
        bits = data[at + 13]
        flags = " ".join(name for bit, name in enumerate(_FLAGS) if bits >> bit & 1)
    elif number == UDP and len(data) >= at + 8:
        # What was copied may be longer than the packet.
        payload = data[at + 8 : at + int.from_bytes(data[at + 4 : at + 6])]
    return Packet(protocol(number), source, destination, ports, flags, payload)
