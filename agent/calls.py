"""Requests and replies over the control socket: calls by id, answers in chunks, events.

Mutable state of a connection: `_calls`, `_outgoing`, `_events`, `_lost`. Only the reader task
answers calls; only the writer task writes, so a cancelled request never tears a frame.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Self

from google.protobuf.message import DecodeError

from agent.channel import Channel, FrameTooLarge
from agent.refusals import (
    DataplaneLost,
    DataplaneSilent,
    NobodyListens,
    PermissionMissing,
    checked,
)
from agent.secret import Secret, appended, wipe
from proto.gen import control_pb2

# Ordinary requests are bookkeeping; half a minute means that the process hangs.
REQUEST_TIMEOUT = timedelta(seconds=30)
# Chunks held for one slow reader of a stream before the connection waits for it.
STREAM_DEPTH = 4
# Frames that wait to be written; senders wait beyond that.
SEND_DEPTH = 64

_KEY_PLACE = (
    control_pb2.Request.INSTALL_CERTIFICATE_FIELD_NUMBER,
    control_pb2.InstallCertificate.PRIVATE_KEY_FIELD_NUMBER,
)

Body = (
    control_pb2.Hello
    | control_pb2.AddPod
    | control_pb2.UpdatePod
    | control_pb2.RemovePod
    | control_pb2.KeepPods
    | control_pb2.PodsSynced
    | control_pb2.Apply
    | control_pb2.NewCsr
    | control_pb2.InstallCertificate
    | control_pb2.FailCertificate
    | control_pb2.ListConnections
    | control_pb2.GetMetrics
    | control_pb2.Dump
    | control_pb2.Configure
    | control_pb2.Drain
    | control_pb2.TakeListeners
    | control_pb2.ListPods
    | control_pb2.Explain
    | control_pb2.ListVerdicts
    | control_pb2.ListPolicyHits
    | control_pb2.SetTrust
    | control_pb2.Capture
    | control_pb2.Prove
)


@dataclass
class _Call:
    """One request that waits for its replies."""

    replies: asyncio.Queue[control_pb2.Reply | None] = field(
        default_factory=lambda: asyncio.Queue(STREAM_DEPTH)
    )


@dataclass(frozen=True)
class _Frame:
    """What waits to be written. Descriptors are ours: duplicated at the call, closed after it."""

    # Writable: it holds a key.
    payload: bytes | bytearray = field(repr=False)
    fds: tuple[int, ...] = ()

    def discard(self) -> None:
        for fd in self.fds:
            os.close(fd)
        if isinstance(self.payload, bytearray):
            wipe(self.payload)


class Calls:
    """One connection. Safe for concurrent use by many tasks."""

    def __init__(self, channel: Channel, path: Path) -> None:
        self._path = path
        self._channel = channel
        self._calls: dict[int, _Call] = {}
        self._last_id = 0
        self._outgoing: asyncio.Queue[_Frame] = asyncio.Queue(SEND_DEPTH)
        self._events: asyncio.Queue[control_pb2.Event | None] = asyncio.Queue()
        # Why the connection ended; None while it stands.
        self._lost: str | None = None
        self._gone = asyncio.Event()
        self._tasks = (
            asyncio.create_task(self._read(), name=f"read {path}"),
            asyncio.create_task(self._write(), name=f"write {path}"),
        )

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Raises DataplaneLost, PermissionMissing."""
        try:
            channel = await Channel.connect(path)
        except PermissionError as exc:
            raise PermissionMissing(
                f"{path}: {exc.strerror}; only its owner may connect", subject=str(path)
            ) from exc
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            raise NobodyListens(f"nobody answers on {path}: {exc.strerror}") from exc
        except OSError as exc:
            raise DataplaneLost(f"{path} can't be used: {exc.strerror or exc}") from exc
        return cls(channel, path)

    async def ask(
        self,
        kind: str,
        body: Body,
        *,
        fds: Sequence[int] = (),
        within: timedelta | None = None,
        key: Secret | None = None,
    ) -> control_pb2.Reply:
        seconds = (within or REQUEST_TIMEOUT).total_seconds()
        try:
            async with asyncio.timeout(seconds):
                call_id, call = await self._send(kind, body, fds, key)
                try:
                    return checked(await self._next(call))
                finally:
                    self._forget(call_id)
        except TimeoutError:
            raise DataplaneSilent(f"no answer to {kind} in {seconds:g} s") from None

    async def stream(self, kind: str, body: Body) -> AsyncIterator[control_pb2.Reply]:
        call_id, call = await self._send(kind, body)
        try:
            while True:
                reply = checked(await self._next(call))
                if reply.WhichOneof("body") != "done":
                    yield reply
                if not reply.more:
                    return
        finally:
            self._forget(call_id)

    async def events(self) -> AsyncIterator[control_pb2.Event]:
        """For one consumer. Ends when the connection is lost or closed."""
        while (event := await self._events.get()) is not None:
            yield event

    async def wait_lost(self) -> DataplaneLost:
        """Waits for the end of this connection and returns why it ended."""
        await self._gone.wait()
        return self._loss()

    @property
    def connected(self) -> bool:
        return self._lost is None

    async def close(self) -> None:
        """Ends the connection; whoever still waits gets DataplaneLost. Safe to repeat."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail("the agent closed the connection")
        self._channel.close()

    # ---- the machinery

    async def _send(
        self, kind: str, body: Body, fds: Sequence[int] = (), key: Secret | None = None
    ) -> tuple[int, _Call]:
        if self._lost is not None:
            raise self._loss()
        self._last_id += 1
        call_id = self._last_id
        request = control_pb2.Request(id=call_id, fds=len(fds))
        getattr(request, kind).CopyFrom(body)
        call = self._calls[call_id] = _Call()
        plain = request.SerializeToString()
        payload = plain if key is None else appended(plain, _KEY_PLACE, key)
        frame = _Frame(payload, tuple(os.dup(fd) for fd in fds))
        try:
            await self._outgoing.put(frame)
        except BaseException:
            self._forget(call_id)
            frame.discard()
            raise
        return call_id, call

    async def _next(self, call: _Call) -> control_pb2.Reply:
        if self._lost is not None and call.replies.empty():
            raise self._loss()
        reply = await call.replies.get()
        if reply is None:
            raise self._loss()
        return reply

    def _loss(self) -> DataplaneLost:
        """Each who waits gets one of its own: a shared one would collect their tracebacks."""
        return DataplaneLost(self._lost or "the connection ended")

    def _forget(self, call_id: int) -> None:
        """Later replies are dropped. Emptying the queue frees a reader that waits to put."""
        call = self._calls.pop(call_id, None)
        while call is not None and not call.replies.empty():
            call.replies.get_nowait()

    async def _read(self) -> None:
        why = "the data plane closed the connection"
        try:
            while (payload := await self._channel.receive()) is not None:
                reply = control_pb2.Reply.FromString(payload)
                if reply.id == 0:
                    self._unasked(reply)
                elif (call := self._calls.get(reply.id)) is not None:
                    await call.replies.put(reply)
        except (OSError, FrameTooLarge, DecodeError) as exc:
            why = f"{self._path}: {exc}"
        self._fail(why)

    def _unasked(self, reply: control_pb2.Reply) -> None:
        if reply.WhichOneof("body") == "event":
            self._events.put_nowait(reply.event)

    async def _write(self) -> None:
        try:
            while True:
                frame = await self._outgoing.get()
                try:
                    await self._channel.send(frame.payload, frame.fds)
                finally:
                    frame.discard()
                # A whole mesh may have been in it; the next frame may be hours away.
                del frame
        except (OSError, FrameTooLarge) as exc:
            # The reader sees the same end; it only can't know the reason of a failed write.
            self._fail(f"{self._path}: {exc}")

    def _fail(self, why: str) -> None:
        if self._lost is not None:
            return
        self._lost = why
        while not self._outgoing.empty():
            self._outgoing.get_nowait().discard()
        for call in self._calls.values():
            # A full queue needs no mark: its reader finds it empty and the connection lost.
            with contextlib.suppress(asyncio.QueueFull):
                call.replies.put_nowait(None)
        self._events.put_nowait(None)
        self._gone.set()
