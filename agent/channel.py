"""Frames with descriptors over one Unix stream socket. Knows lengths, not messages."""

import asyncio
import socket
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

# control.proto: a 4-byte big-endian length, at most 256 MiB a frame.
_HEADER = struct.Struct(">I")
MAX_FRAME = 256 * 1024 * 1024


class FrameTooLarge(Exception):
    """A frame over MAX_FRAME: the peer speaks something else."""


class Channel:
    """One sender and one receiver at a time; neither may be cancelled in the middle of a frame."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    @classmethod
    async def connect(cls, path: Path) -> "Channel":
        """Raises OSError when nobody listens there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, str(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def send(self, payload: bytes | bytearray, fds: Sequence[int] = ()) -> None:
        """Descriptors cross with the first bytes; the caller still owns and closes them."""
        if len(payload) > MAX_FRAME:
            raise FrameTooLarge(f"{len(payload)} bytes, at most {MAX_FRAME} cross in one frame")
        header = _HEADER.pack(len(payload))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        while True:
            try:
                sent = self._sock.sendmsg([header, payload], ancillary)
                break
            except (BlockingIOError, InterruptedError):
                await self._writable()
        loop = asyncio.get_running_loop()
        if sent < len(header):
            await loop.sock_sendall(self._sock, header[sent:])
            sent = len(header)
        if sent < len(header) + len(payload):
            await loop.sock_sendall(self._sock, memoryview(payload)[sent - len(header) :])

    async def receive(self) -> bytes | None:
        """The next frame, or None when the peer closed between frames.

        Raises ConnectionError when it closed inside one, FrameTooLarge for a senseless length.
        """
        header = await self._exactly(_HEADER.size, may_end=True)
        if header is None:
            return None
        (length,) = _HEADER.unpack(header)
        if length > MAX_FRAME:
            raise FrameTooLarge(
                f"{length} bytes were announced as one frame: no data plane listens there"
            )
        payload = await self._exactly(length, may_end=False)
        assert payload is not None  # may_end=False raises instead
        return bytes(payload)

    def close(self) -> None:
        """Whoever waits in `receive` must have been cancelled before."""
        self._sock.close()

    async def _exactly(self, size: int, *, may_end: bool) -> bytearray | None:
        loop = asyncio.get_running_loop()
        buffer = bytearray(size)
        view = memoryview(buffer)
        filled = 0
        while filled < size:
            got = await loop.sock_recv_into(self._sock, view[filled:])
            if got == 0:
                if may_end and filled == 0:
                    return None
                raise ConnectionError("closed in the middle of a frame")
            filled += got
        return buffer

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_writer(self._sock, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(self._sock)
