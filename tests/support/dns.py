"""A resolver and a nameserver of a few lines, to see DNS as pods see it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Self

from agent.cli.demo.netns import inside, open_socket

if TYPE_CHECKING:
    from types import TracebackType

A, AAAA = 1, 28
NOERROR, SERVFAIL, NXDOMAIN = 0, 2, 3
# example. 60 IN SOA, with a MINIMUM of 30.
_SOA = (
    b"\xc0\x0c\x00\x06\x00\x01"
    + struct.pack("!IH", 60, 22)
    + b"\0\0"
    + struct.pack("!5I", 1, 2, 3, 4, 30)
)


@dataclass(frozen=True)
class Answer:
    rcode: int
    authoritative: bool
    addresses: tuple[str, ...]
    authorities: int


def query(name: str, kind: int = A) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    head = struct.pack("!6H", int.from_bytes(os.urandom(2)), 0x0100, 1, 0, 0, 0)
    return head + labels + b"\0" + struct.pack("!2H", kind, 1)


def parse(message: bytes) -> Answer:
    _, flags, _, answers, authorities, _ = struct.unpack_from("!6H", message)
    at = message.index(b"\0", 12) + 5
    addresses: list[str] = []
    for _ in range(answers):
        while message[at] and message[at] < 0xC0:
            at += 1 + message[at]
        at += 2 if message[at] else 1
        kind, _, _, length = struct.unpack_from("!2HIH", message, at)
        data = message[at + 10 : at + 10 + length]
        at += 10 + length
        if kind == A:
            addresses.append(str(IPv4Address(data)))
        elif kind == AAAA:
            addresses.append(str(IPv6Address(data)))
    return Answer(flags & 15, bool(flags & 0x400), tuple(addresses), authorities)


async def ask(
    namespace: str, server: str, name: str, kind: int = A, *, timeout: float = 10.0
) -> Answer:
    """Over UDP from inside the namespace. Raises OSError, TimeoutError."""
    asked = query(name, kind)
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with open_socket(namespace, family, socket.SOCK_DGRAM) as sock:
        sock.connect((server, 53))
        async with asyncio.timeout(timeout):
            await loop.sock_sendall(sock, asked)
            while (answer := await loop.sock_recv(sock, 4096))[:2] != asked[:2]:
                pass
    return parse(answer)


@dataclass
class Nameserver:
    """On port 53 of a namespace, both families: `known.example` is 203.0.113.9, all else isn't."""

    namespace: str
    asked: list[bytes] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _sockets: list[socket.socket] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        def bind() -> socket.socket:
            made = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            made.bind(("::", 53))
            made.setblocking(False)
            return made

        made = inside(self.namespace, bind)
        self._sockets.append(made)
        self._tasks.append(asyncio.create_task(self._serve(made)))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for sock in self._sockets:
            sock.close()

    async def _serve(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(ConnectionError):
                message, client = await loop.sock_recvfrom(sock, 4096)
                self.asked.append(message)
                await loop.sock_sendto(sock, self._answer(message), client)

    def _answer(self, message: bytes) -> bytes:
        end = message.index(b"\0", 12) + 5
        known = message[12:end].lower().startswith(b"\x05known\x07example\0\0\x01")
        code = NOERROR if known else NXDOMAIN
        head = message[:2] + struct.pack("!5H", 0x8580 | code, 1, int(known), int(not known), 0)
        record = b"\xc0\x0c\0\x01\0\x01" + struct.pack("!IH4B", 60, 4, 203, 0, 113, 9)
        return head + message[12:end] + (record if known else _SOA)
