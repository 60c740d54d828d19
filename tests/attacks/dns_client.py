"""Asks nameservers over UDP in unusual ways, and says from whom each answer seemed to come.

Run as `python -m tests.attacks.dns_client CASE NAME SERVER SERVER`.
"""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

from tests.attacks.talk import PATIENCE, disconnect, error_name, family, report
from tests.support.dns import parse, query

if TYPE_CHECKING:
    from collections.abc import Callable

PORT = 53
TURNS = 6


def unconnected(name: str, servers: list[str]) -> None:
    """One socket, the servers in turn."""
    with _socket(servers[0]) as sock:
        for turn in range(TURNS):
            server = servers[turn % len(servers)]
            _exchange(sock, server, name, _to(sock, server))


def crossed(name: str, servers: list[str]) -> None:
    """Both are asked before either answer is read."""
    asked = {}
    with _socket(servers[0]) as sock:
        for server in servers:
            message = query(name)
            asked[message[:2]] = server
            sock.sendto(message, (server, PORT))
        for _ in servers:
            _hear(sock, asked, name)


def connected(name: str, servers: list[str]) -> None:
    """A socket connected to each in turn, without and with AF_UNSPEC between two of them."""
    with _socket(servers[0]) as sock:
        for turn in range(TURNS):
            server = servers[turn % len(servers)]
            sock.connect((server, PORT))
            _exchange(sock, server, name, sock.send)
            if turn % 3 == 2:
                disconnect(sock)


def elsewhere(name: str, servers: list[str]) -> None:
    """Connected to one, and asks another by the address of the datagram."""
    with _socket(servers[0]) as sock:
        sock.connect((servers[0], PORT))
        # The kernel gives it no answer but its own server's.
        sock.settimeout(1)
        _exchange(sock, servers[1], name, _to(sock, servers[1]))


def mapped(name: str, servers: list[str]) -> None:
    """IPv4 servers on an IPv6 socket."""
    with _socket("::") as sock:
        for server in servers:
            _exchange(sock, server, name, _to(sock, f"::ffff:{server}"))


def _socket(server: str) -> socket.socket:
    sock = socket.socket(family(server), socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE)
    return sock


def _to(sock: socket.socket, server: str) -> Callable[[bytes], int]:
    return lambda data: sock.sendto(data, (server, PORT))


def _exchange(sock: socket.socket, server: str, name: str, send: Callable[[bytes], object]) -> None:
    message = query(name)
    try:
        send(message)
    except OSError as exc:
        report(server, error=error_name(exc))
        return
    _hear(sock, {message[:2]: server}, name)


def _hear(sock: socket.socket, asked: dict[bytes, str], name: str) -> None:
    try:
        data, sender = sock.recvfrom(4096)
    except OSError as exc:
        report("|".join(asked.values()), error=error_name(exc))
        return
    answer = parse(data)
    report(
        asked.get(data[:2], "nobody"),
        sender=[sender[0].removeprefix("::ffff:"), sender[1]],
        rcode=answer.rcode,
        addresses=answer.addresses,
    )


CASES: dict[str, Callable[[str, list[str]], None]] = {
    "unconnected": unconnected,
    "crossed": crossed,
    "connected": connected,
    "elsewhere": elsewhere,
    "mapped": mapped,
}


if __name__ == "__main__":
    CASES[sys.argv[1]](sys.argv[2], sys.argv[3:])
