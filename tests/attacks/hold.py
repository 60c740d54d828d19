"""Opens many connections in one burst, hears each server's greeting, and holds them all until its
input ends.

Run as `python -m tests.attacks.hold COUNT HOST:PORT=NAME …`: the servers in turn. Reports how many
greetings came from the right server, which came from a wrong one, and what failed.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import sys
import time
from collections import Counter

from tests.attacks.talk import error_name, family, report

PATIENCE = 40.0
# Some attempts are dropped by a full accept queue and sent again a second or three later.
LINE = 256


def main(count: int, servers: list[str]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    targets = [parse(text) for text in servers]
    poll = select.epoll()
    waiting: dict[int, tuple[socket.socket, str]] = {}
    held: list[socket.socket] = []
    right: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(count):
        host, port, name = targets[number % len(targets)]
        sock = socket.socket(family(host), socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect((host, port))
        except BlockingIOError:
            pass
        except OSError as exc:
            errors[error_name(exc)] += 1
            continue
        waiting[sock.fileno()] = (sock, name)
        poll.register(sock, select.EPOLLIN)
    deadline = time.monotonic() + PATIENCE
    while waiting and time.monotonic() < deadline:
        for descriptor, _ in poll.poll(1, 1024):
            sock, name = waiting.pop(descriptor)
            poll.unregister(sock)
            try:
                greeting = sock.recv(LINE).decode().strip()
            except OSError as exc:
                errors[error_name(exc)] += 1
                continue
            if not greeting:
                errors["EOF"] += 1
            elif greeting.split()[0] == name:
                right[name] += 1
                held.append(sock)
            else:
                wrong.append(f"{greeting}, not {name}")
    errors["none"] = len(waiting)
    ports = [sock.getsockname()[1] for sock in held[:10]]
    report("held", right=right, wrong=wrong, errors=+errors, ports=ports)
    sys.stdin.read()
    # At once, as a process that is killed leaves them.
    os._exit(0)


def parse(text: str) -> tuple[str, int, str]:
    address, _, name = text.partition("=")
    host, _, port = address.rpartition(":")
    return host, int(port), name


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
