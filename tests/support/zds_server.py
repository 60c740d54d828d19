"""A CNI node agent as far as a node proxy can tell: the ZDS server of facts istio-ambient 4."""

import asyncio
import os
import socket
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from proto.gen import zds_pb2

# The server's read buffer and deadline (facts istio-ambient 4).
BUFFER = 1024
DEADLINE = 5.0


@dataclass(frozen=True)
class ZdsPod:
    uid: str
    name: str
    namespace: str
    service_account: str
    # A network namespace by path; None: known, but its descriptor is lost (`keep`).
    netns: Path | None

    def request(self) -> zds_pb2.WorkloadRequest:
        if self.netns is None:
            return zds_pb2.WorkloadRequest(keep=zds_pb2.KeepWorkload(uid=self.uid))
        info = zds_pb2.WorkloadInfo(
            name=self.name, namespace=self.namespace, service_account=self.service_account
        )
        return zds_pb2.WorkloadRequest(add=zds_pb2.AddWorkload(uid=self.uid, workload_info=info))


@dataclass(eq=False)
class ZdsConnection:
    """One proxy. `acks` holds what was answered to what, in order."""

    sock: socket.socket
    hello: zds_pb2.ZdsHello
    acks: list[tuple[str, str]] = field(default_factory=list)
    # The snapshot was sent and answered.
    synced: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def ask(self, request: zds_pb2.WorkloadRequest, netns: Path | None = None) -> str:
        """The error of the answer, "" for none. Raises ConnectionError, TimeoutError."""
        kind = str(request.WhichOneof("payload"))
        subject = getattr(getattr(request, kind), "uid", "")
        fds = [] if netns is None else [os.open(netns, os.O_RDONLY | os.O_CLOEXEC)]
        try:
            return await self.ask_raw(request.SerializeToString(), fds, f"{kind} {subject}".strip())
        finally:
            for fd in fds:
                os.close(fd)

    async def delete(self, uid: str) -> str:
        request = zds_pb2.WorkloadRequest()
        # A Python keyword can't be written as an attribute.
        getattr(request, "del").uid = uid
        return await self.ask(request)

    async def ask_raw(self, packet: bytes, fds: list[int], what: str = "raw") -> str:
        """Any bytes with any descriptors, which stay the caller's."""
        async with self._turn, asyncio.timeout(DEADLINE):
            self._send(packet, fds)
            answer = await self.receive()
            error: str = zds_pb2.WorkloadResponse.FromString(answer).ack.error
            self.acks.append((what, error))
            return error

    def _send(self, packet: bytes, fds: list[int]) -> None:
        # One request at a time: the socket's buffer is never full.
        if fds:
            socket.send_fds(self.sock, [packet], fds)
        else:
            self.sock.send(packet)

    async def receive(self) -> bytes:
        """One packet. Raises ConnectionError at the end."""
        packet = await asyncio.get_running_loop().sock_recv(self.sock, BUFFER)
        if not packet:
            raise ConnectionResetError("the proxy hung up")
        return packet

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.sock.close()


class ZdsServer:
    """`async with`: listens. Every proxy that connects gets the pods as they are, then changes;
    adds go to the newest alone and deletes to all (facts istio-ambient 4).

    State: `pods`, and `connections` in the order in which they came.
    """

    def __init__(self, path: Path, *, snapshots: bool = True) -> None:
        self.path = path
        self.pods: dict[str, ZdsPod] = {}
        self.connections: list[ZdsConnection] = []
        # Off: a test says every word itself.
        self.snapshots = snapshots
        self.connected = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self.path.unlink(missing_ok=True)
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
        self.path.unlink(missing_ok=True)

    @property
    def newest(self) -> ZdsConnection:
        return self.connections[-1]

    async def client(self, number: int = 1, *, within: float = 20.0) -> ZdsConnection:
        """The n-th proxy that ever said hello, once its snapshot was answered."""
        async with asyncio.timeout(within):
            async with self.connected:
                await self.connected.wait_for(lambda: len(self.connections) >= number)
            found = self.connections[number - 1]
            if self.snapshots:
                await found.synced.wait()
            return found

    async def add(self, pod: ZdsPod) -> str:
        """The newest proxy's error, "" for none; kept for the snapshots of later ones."""
        self.pods[pod.uid] = pod
        return await self.newest.ask(pod.request(), pod.netns)

    async def delete(self, uid: str) -> list[str]:
        self.pods.pop(uid, None)
        return [await one.delete(uid) for one in self.connections if not one.closed]

    def hang_up(self) -> None:
        for connection in self.connections:
            connection.close()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            sock.setblocking(False)
            self._spawn(self._greet(sock))

    async def _greet(self, sock: socket.socket) -> None:
        packet = await asyncio.get_running_loop().sock_recv(sock, BUFFER)
        if not packet:
            sock.close()
            return
        connection = ZdsConnection(sock, zds_pb2.ZdsHello.FromString(packet))
        self.connections.append(connection)
        async with self.connected:
            self.connected.notify_all()
        if self.snapshots:
            try:
                await self._snapshot(connection)
            except (OSError, TimeoutError):
                connection.close()

    async def _snapshot(self, connection: ZdsConnection) -> None:
        for pod in list(self.pods.values()):
            await connection.ask(pod.request(), pod.netns)
        await connection.ask(zds_pb2.WorkloadRequest(snapshot_sent=zds_pb2.SnapshotSent()))
        connection.synced.set()
