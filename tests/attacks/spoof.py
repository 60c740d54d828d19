"""A TCP handshake written by hand, from an address and port of the attacker's choice, put on a
pod's link as if the network had delivered it.

Run on the node as `python -m tests.attacks.spoof LINK MAC SOURCE PORT DESTINATION PORT`. Reports
how the pod answered the SYN, and what it said once the handshake was complete.
"""

from __future__ import annotations

import socket
import sys
import time

from tests.attacks.handmade import ACK, FIN, RST, SYN, Ends, Segment, packet, parse
from tests.attacks.talk import report

ETH_P_IP = 0x0800
PATIENCE = 1.0
SEQUENCE = 77_000


def main(link: str, mac: str, ends: Ends) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP)) as sock:
        sock.bind((link, ETH_P_IP))
        destination = (link, ETH_P_IP, 0, 0, bytes.fromhex(mac.replace(":", "")))

        def send(flags: int, sequence: int, acknowledged: int) -> None:
            segment = Segment(ends, flags, sequence, acknowledged, b"")
            sock.sendto(packet(segment), destination)

        send(SYN, SEQUENCE, 0)
        answer = _next(sock, ends)
        if answer is None or answer.flags & (SYN | ACK | RST) != SYN | ACK:
            report("spoofed", accepted=False, flags=answer.flags if answer else 0)
            return
        send(ACK, SEQUENCE + 1, answer.sequence + 1)
        said = b""
        ended = False
        while not ended and b"\n" not in said and (segment := _next(sock, ends)) is not None:
            if not segment.flags & SYN:
                said += segment.payload
                ended = bool(segment.flags & (FIN | RST))
        report("spoofed", accepted=True, said=said.decode(), ended=ended)
        send(RST | ACK, SEQUENCE + 1, answer.sequence + 1)


def _next(sock: socket.socket, ends: Ends) -> Segment | None:
    """The next segment that the pod sends to those ends."""
    deadline = time.monotonic() + PATIENCE
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            segment = parse(sock.recv(1 << 16))
        except TimeoutError:
            break
        if segment is not None and segment.ends == ends.turned():
            return segment
    return None


if __name__ == "__main__":
    main(
        sys.argv[1], sys.argv[2], Ends(sys.argv[3], int(sys.argv[4]), sys.argv[5], int(sys.argv[6]))
    )
