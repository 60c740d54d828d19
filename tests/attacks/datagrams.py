"""Exchanges one datagram in each of several ways, and says what came of it.

Run as `python -m tests.attacks.datagrams MARKER PORT OWN CASE=HOST…`, where OWN is an address that
the sender has itself. As `… serve PORT NAME PROTOCOL…` it echoes, with its name, until its input
ends.
"""

from __future__ import annotations

import select
import socket
import sys
from typing import TYPE_CHECKING

from tests.attacks.talk import disconnect, error_name, family, report

if TYPE_CHECKING:
    from collections.abc import Callable

UDP, UDP_LITE = 17, 136
# What is dropped costs this much.
PATIENCE = 0.5


def connected(sock: socket.socket, to: tuple[str, int], data: bytes) -> None:
    sock.connect(to)
    sock.send(data)


def unconnected(sock: socket.socket, to: tuple[str, int], data: bytes) -> None:
    sock.sendto(data, to)


def reused(sock: socket.socket, to: tuple[str, int], data: bytes) -> None:
    """Connected to where it may, then let go."""
    sock.connect((own, to[1]))
    disconnect(sock)
    sock.sendto(data, to)


def elsewhere(sock: socket.socket, to: tuple[str, int], data: bytes) -> None:
    """Connected to where it may, and sends to somebody else."""
    sock.connect((own, to[1]))
    sock.sendto(data, to)


def thrice(sock: socket.socket, to: tuple[str, int], data: bytes) -> None:
    """One flow of several datagrams."""
    for _ in range(3):
        sock.sendto(data, to)


def multicast(sock: socket.socket, to: tuple[str, int], data: bytes) -> None:
    """To all on the link of `to`'s family, from its device."""
    group = "224.0.0.251" if sock.family == socket.AF_INET else "ff02::fb%eth0"
    if sock.family == socket.AF_INET:
        device = socket.if_nametoindex("eth0").to_bytes(4, sys.byteorder)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, bytes(8) + device)
    sock.sendto(data, (group, to[1]))


WAYS: dict[str, Callable[[socket.socket, tuple[str, int], bytes], None]] = {
    "connected": connected,
    "unconnected": unconnected,
    "reused": reused,
    "elsewhere": elsewhere,
    "thrice": thrice,
    "multicast": multicast,
    "mapped": unconnected,
    "mapped_connected": connected,
    "udplite": unconnected,
    "udplite_connected": connected,
}


def exchange(case: str, host: str, port: int, marker: str) -> None:
    mapped = case.startswith("mapped")
    protocol = UDP_LITE if case.startswith("udplite") else 0
    kind = socket.AF_INET6 if mapped else family(host)
    to = (f"::ffff:{host}" if mapped else host, port)
    try:
        with socket.socket(kind, socket.SOCK_DGRAM, protocol) as sock:
            sock.settimeout(PATIENCE)
            WAYS[case](sock, to, marker.encode())
            answer, _ = sock.recvfrom(4096)
        report(case, answer=answer.decode().removesuffix(marker))
    except OSError as exc:
        report(case, error=error_name(exc))


def serve(port: int, name: str, *protocols: str) -> None:
    sockets = []
    for protocol in map(int, protocols):
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM, protocol)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
        sockets.append(sock)
    report("serving")
    while True:
        ready, _, _ = select.select([*sockets, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        for sock in (one for one in sockets if one in ready):
            try:
                data, client = sock.recvfrom(4096)
                sock.sendto(f"{name} ".encode() + data, client)
            except OSError as exc:
                report("served", error=error_name(exc))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), *sys.argv[3:])
    else:
        own = sys.argv[3]
        for argument in sys.argv[4:]:
            case, _, host = argument.partition("=")
            exchange(case, host, int(sys.argv[2]), sys.argv[1])
