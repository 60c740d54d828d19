"""A control socket that answers as a test tells it to; for faults the real process can't show."""

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from proto.gen import control_pb2

Answer = Callable[["FakeConnection", control_pb2.Request, list[int]], Awaitable[None]]


class FakeConnection:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def reply(
        self, request: control_pb2.Request, *, more: bool = False, **body: object
    ) -> None:
        await self.send(control_pb2.Reply(id=request.id, more=more, **body))  # type: ignore[arg-type]

    async def event(self, **event: object) -> None:
        await self.send(control_pb2.Reply(event=control_pb2.Event(**event)))  # type: ignore[arg-type]

    async def send(self, reply: control_pb2.Reply) -> None:
        payload = reply.SerializeToString()
        await self.send_raw(struct.pack(">I", len(payload)) + payload)

    async def send_raw(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def receive(self) -> tuple[control_pb2.Request, list[int]] | None:
        buffer = bytearray()
        fds: list[int] = []
        while len(buffer) < 4 or len(buffer) < 4 + struct.unpack(">I", buffer[:4])[0]:
            wanted = 4 if len(buffer) < 4 else 4 + struct.unpack(">I", buffer[:4])[0]
            try:
                data, got, _, _ = socket.recv_fds(self._sock, wanted - len(buffer), 8)
            except BlockingIOError:
                await _readable(self._sock)
                continue
            fds.extend(got)
            if not data:
                return None
            buffer.extend(data)
        return control_pb2.Request.FromString(bytes(buffer[4:])), fds

    def close(self) -> None:
        self._sock.close()


class FakeDataplane:
    """Answers Hello by itself, everything else through `answer` (Done unless told otherwise)."""

    def __init__(self, path: Path, answer: Answer | None = None) -> None:
        self.path = path
        self.answer = answer
        self.hello = control_pb2.HelloReply(version=1, instance_id="fake", pid=os.getpid())
        self.hello_error: control_pb2.Error | None = None
        self.requests: list[control_pb2.Request] = []
        self.connections: list[FakeConnection] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener.setblocking(False)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._spawn(self._accept())
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
        self.hang_up()
        self._listener.close()

    def hang_up(self) -> None:
        for connection in self.connections:
            connection.close()
        self.connections.clear()

    def kinds(self) -> list[str | None]:
        return [request.WhichOneof("body") for request in self.requests]

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)

    async def _accept(self) -> None:
        while True:
            # Not sock_accept: cancelled in the wrong moment it loses what it accepted.
            await _readable(self._listener)
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                continue
            sock.setblocking(False)
            connection = FakeConnection(sock)
            self.connections.append(connection)
            self._spawn(self._serve(connection))

    async def _serve(self, connection: FakeConnection) -> None:
        while (received := await connection.receive()) is not None:
            request, fds = received
            self.requests.append(request)
            if request.WhichOneof("body") == "hello":
                if self.hello_error is not None:
                    await connection.reply(request, error=self.hello_error)
                else:
                    await connection.reply(request, hello=self.hello)
            elif self.answer is not None:
                self._spawn(self.answer(connection, request, fds))
            else:
                _close(fds)
                await connection.reply(request, done=control_pb2.Done())


async def _readable(sock: socket.socket) -> None:
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
