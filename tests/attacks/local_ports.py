"""Chooses local addresses and ports itself, and uses them again.

Run as `python -m tests.attacks.local_ports CASE MARKER HOST PORT …`; each case names its further
arguments.
"""

from __future__ import annotations

import socket
import struct
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests.attacks.talk import converse, error_name, report, stream

if TYPE_CHECKING:
    from collections.abc import Callable

LOCAL_PORT = 23_456


def two_destinations(marker: str, hosts: list[str], port: int) -> None:
    """HOST is several, joined by commas: one local port to each, all held open together."""
    with ExitStack() as held:
        for host in hosts:
            _talk(held, host, host, port, marker)


def two_addresses(marker: str, hosts: list[str], port: int) -> None:
    """HOST is the destination and the local addresses that share one port."""
    destination, *sources = hosts
    with ExitStack() as held:
        for source in sources:
            _talk(held, source, destination, port, marker, source=source)


def again_after_reset(marker: str, hosts: list[str], port: int) -> None:
    """Three times the same four numbers, each connection ended by a reset."""
    for turn in range(3):
        with ExitStack() as held:
            sock = _talk(held, str(turn), hosts[0], port, marker)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@2i", 1, 0))


def again_after_close(marker: str, hosts: list[str], port: int) -> None:
    """Three times the same four numbers; the server's side closes first and so is the one to
    remember the connection."""
    for turn in range(3):
        with ExitStack() as held:
            sock = _talk(held, str(turn), hosts[0], port, marker)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1024):
                pass


def alternately(marker: str, hosts: list[str], port: int) -> None:
    """One local port, a destination after the other, each connection reset before the next."""
    for turn in range(6):
        host = hosts[turn % len(hosts)]
        with ExitStack() as held:
            sock = _talk(held, host, host, port, marker)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@2i", 1, 0))


def _talk(
    held: ExitStack, name: str, host: str, port: int, marker: str, *, source: str = ""
) -> socket.socket:
    """The socket stays open as long as `held`."""
    sock = held.enter_context(stream(host))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((source, LOCAL_PORT))
        sock.connect((host, port))
        report(name, **converse(sock, marker))
    except OSError as exc:
        report(name, error=error_name(exc))
    return sock


CASES: dict[str, Callable[[str, list[str], int], None]] = {
    "two_destinations": two_destinations,
    "two_addresses": two_addresses,
    "again_after_reset": again_after_reset,
    "again_after_close": again_after_close,
    "alternately": alternately,
}


if __name__ == "__main__":
    CASES[sys.argv[1]](sys.argv[2], sys.argv[3].split(","), int(sys.argv[4]))
