"""Connects to an echo server over and over, each connection for one greeting and an orderly end.

Run as `python -m tests.attacks.churn HOST:PORT=NAME COUNT`. Reports "started", and at the end how
many greetings came, from a wrong server too, and what failed. With COUNT 0 it ends with its input.
"""

from __future__ import annotations

import select
import socket
import sys
from collections import Counter
from typing import NamedTuple

from tests.attacks.hold import LINE, parse
from tests.attacks.talk import error_name, family, report

AT_ONCE = 64
# Nothing at all for so long means that the rest won't come.
PATIENCE = 20.0


class Open(NamedTuple):
    sock: socket.socket
    greeted: bool


class Churn:
    def __init__(self, server: str, count: int) -> None:
        self.host, self.port, self.name = parse(server)
        self.endless, self.left = not count, count
        self.open: dict[int, Open] = {}
        self.heard: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.poll = select.epoll()

    def run(self) -> None:
        report("started")
        # Without a count, what is still open when the input ends is of no interest.
        while self._wants_more() or (self.open and not self.endless):
            while len(self.open) < AT_ONCE and self._wants_more():
                self.left -= 1
                self._connect()
            events = self.poll.poll(0.1 if self.endless else PATIENCE, AT_ONCE)
            if not events and not self.endless:
                self.errors["none"] += len(self.open)
                break
            for descriptor, _ in events:
                self._read(self.open.pop(descriptor))
        right = self.heard.pop(self.name, 0)
        report("churned", right=right, wrong=self.heard, errors=self.errors)

    def _wants_more(self) -> bool:
        if self.endless:
            return not select.select([sys.stdin], [], [], 0)[0]
        return self.left > 0

    def _connect(self) -> None:
        sock = socket.socket(family(self.host), socket.SOCK_STREAM)
        sock.setblocking(False)
        # Whatever comes of it is told by the poll.
        sock.connect_ex((self.host, self.port))
        self.open[sock.fileno()] = Open(sock, greeted=False)
        self.poll.register(sock, select.EPOLLIN)

    def _read(self, one: Open) -> None:
        try:
            data = one.sock.recv(LINE)
            if data and not one.greeted:
                self.heard[data.split()[0].decode()] += 1
                one.sock.shutdown(socket.SHUT_WR)
            if data:
                self.open[one.sock.fileno()] = Open(one.sock, greeted=True)
                return
            if not one.greeted:
                self.errors["EOF"] += 1
        except OSError as exc:
            self.errors[error_name(exc)] += 1
        self.poll.unregister(one.sock)
        one.sock.close()


if __name__ == "__main__":
    Churn(sys.argv[1], int(sys.argv[2])).run()
