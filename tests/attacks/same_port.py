"""Connects from one local port to some echo servers in turn, each time as soon as the last
connection is reset.

Run as `python -m tests.attacks.same_port PORT COUNT HOST:PORT=NAME …`. Reports how many greetings
came from the right server, which from a wrong one, and what failed.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections import Counter

from tests.attacks.hold import parse
from tests.attacks.talk import connected, error_name, line, report, stream

# Closing resets: the port is free at once, where an orderly end would keep it for a minute.
RESET = struct.pack("=ii", 1, 0)


def main(port: int, count: int, servers: list[str]) -> None:
    targets = [parse(text) for text in servers]
    right: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(count):
        host, to, name = targets[number % len(targets)]
        try:
            with stream(host) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                sock.bind(("", port))
                greeting = line(connected(sock, host, to))
        except OSError as exc:
            errors[error_name(exc)] += 1
            continue
        if greeting.split()[:1] == [name]:
            right[name] += 1
        else:
            wrong.append(f"{greeting!r}, not of {name}")
    report("used", right=right, wrong=wrong, errors=errors)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
