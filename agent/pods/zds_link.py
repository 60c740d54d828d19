"""One connection to a ZDS server: whole packets with their descriptors (facts ztunnel 10)."""

import asyncio
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from google.protobuf.message import DecodeError

from proto.gen import zds_pb2

# facts ztunnel 10: room for one message and exactly one descriptor.
_PACKET = 1024
# Tags and lengths around the text of an answer.
_ENVELOPE = 16
_ONE_FD = socket.CMSG_LEN(struct.calcsize("i"))


class ProtocolError(Exception):
    """The server said what no ZDS server may say; the text goes into the answer."""


@dataclass(frozen=True)
class Packet:
    """`fd` is the receiver's to close, -1 for none."""

    request: zds_pb2.WorkloadRequest
    fd: int = -1


class Link:
    """For one task. Raises OSError wherever the connection fails."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    async def connect(cls, path: Path) -> Self:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, str(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def hello(self) -> None:
        await self._send(zds_pb2.ZdsHello(version=zds_pb2.V1).SerializeToString())

    async def answer(self, error: str) -> None:
        response = zds_pb2.WorkloadResponse()
        response.ack.error = _fitting(error)
        # Present also when it is empty: the server tells an answer by it.
        response.ack.SetInParent()
        await self._send(response.SerializeToString())

    async def receive(self) -> Packet | None:
        """None when the server hung up. Raises ProtocolError; no descriptor is left open then."""
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    _PACKET, _ONE_FD, socket.MSG_CMSG_CLOEXEC
                )
                break
            except (BlockingIOError, InterruptedError):
                await self._readable()
        fds = _descriptors(ancillary)
        try:
            packet = _parsed(data, fds, flags)
        except ProtocolError:
            _close(fds)
            raise
        if packet is None:
            _close(fds)
        return packet

    def close(self) -> None:
        self._sock.close()

    async def _send(self, packet: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, packet)

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._sock, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._sock)


def _fitting(error: str) -> str:
    """The server reads as many bytes of an answer as we of a request, and cuts the rest off."""
    text = error.encode(errors="replace")
    room = _PACKET - _ENVELOPE
    if len(text) <= room:
        return text.decode()
    return text[: room - 3].decode(errors="ignore") + "\u2026"


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(data) // struct.calcsize("i")
            fds += struct.unpack(f"{whole}i", data[: whole * struct.calcsize("i")])
    return fds


def _parsed(data: bytes, fds: list[int], flags: int) -> Packet | None:
    if flags & socket.MSG_TRUNC:
        raise ProtocolError(f"a packet over {_PACKET} bytes")
    if flags & socket.MSG_CTRUNC or len(fds) > 1:
        raise ProtocolError("more than one descriptor with a packet")
    if not data:
        return None
    try:
        request = zds_pb2.WorkloadRequest.FromString(data)
    except DecodeError:
        raise ProtocolError("a packet that is no WorkloadRequest") from None
    kind = request.WhichOneof("payload")
    if kind is None:
        raise ProtocolError("a request of a kind that version 1 doesn't have")
    if (kind == "add") != bool(fds):
        wanted = "exactly one descriptor" if kind == "add" else "no descriptor"
        raise ProtocolError(f"{kind} comes with {wanted}")
    return Packet(request, fds[0] if fds else -1)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
