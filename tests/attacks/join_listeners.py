"""Tries to listen where the data plane listens, alone or beside it.

Run as `python -m tests.attacks.join_listeners PORTS ADDRESSES`, both joined by commas. Reports
each attempt by `PORT ADDRESS TRICK`; then says "done" and keeps what it got until its input ends.
"""

from __future__ import annotations

import socket
import sys

from tests.attacks.odd_sockets import IP_TRANSPARENT
from tests.attacks.talk import error_name, family, report

TRICKS = {
    "plain": (),
    "reuse_address": ((socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),),
    "reuse_port": (
        (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
        (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1),
    ),
    "device": (
        (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1),
        (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo"),
    ),
    "transparent": (
        (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1),
        (socket.SOL_IP, IP_TRANSPARENT, 1),
    ),
}


def main(ports: list[int], addresses: list[str]) -> None:
    kept = []
    for port in ports:
        for address in addresses:
            for trick, options in TRICKS.items():
                sock = socket.socket(family(address), socket.SOCK_STREAM)
                name = f"{port} {address} {trick}"
                try:
                    for level, option, value in options:
                        sock.setsockopt(level, option, value)
                    sock.bind((address, port))
                    sock.listen()
                    kept.append(sock)
                    report(name)
                except OSError as exc:
                    sock.close()
                    report(name, error=error_name(exc))
    report("done", listening=len(kept))
    sys.stdin.read()


if __name__ == "__main__":
    main([int(port) for port in sys.argv[1].split(",")], sys.argv[2].split(","))
