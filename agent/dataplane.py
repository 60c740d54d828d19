"""Client of the data plane's control socket (control.proto): requests by id, chunks, events.

Mutable state of a connection: `_calls`, `_outgoing`, `_events`, `_lost`. Only the reader task
answers calls; only the writer task writes, so a cancelled request never tears a frame.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal, Self

from google.protobuf.message import DecodeError

from agent.channel import Channel, FrameTooLarge
from agent.errors import AgentError
from agent.secret import Secret, appended, wipe
from proto.gen import control_pb2

PROTOCOL_VERSION = 1
# Ordinary requests are bookkeeping; half a minute means that the process hangs.
REQUEST_TIMEOUT = timedelta(seconds=30)
# 100 k workloads in one response take a debug build several seconds on a busy machine.
APPLY_TIMEOUT = timedelta(minutes=3)
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
)


class DataplaneError(AgentError):
    """The data plane refused a request, or can't be asked."""

    code: str = "INTERNAL"

    def __init__(self, text: str, *, subject: str = "", code: str = "") -> None:
        self.subject = subject
        self.code = code or type(self).code
        super().__init__(f"{subject}: {text}" if subject and subject not in text else text)


class DataplaneLost(DataplaneError):
    """Nobody answers on the control socket, or the connection ended. Retryable."""

    code = "LOST"
    retryable = True
    remedy = "the agent connects again by itself; see the data plane's log if it doesn't come back"


class NobodyListens(DataplaneLost):
    """The socket isn't there, or its process is gone."""


class DataplaneSilent(DataplaneError):
    """A request wasn't answered in time though the connection stands."""

    code = "TIMEOUT"
    retryable = True
    remedy = "look at the data plane's log and CPU; end it if it hangs, it is started again"


class InvalidRequest(DataplaneError):
    code = "INVALID"


class NotFound(DataplaneError):
    code = "NOT_FOUND"


class AgentRoleTaken(DataplaneError):
    """Another agent is connected to this data plane."""

    code = "IN_USE"
    retryable = True
    remedy = "stop the other agent, or give this one a data plane of its own"


class InUse(DataplaneError):
    """A port in the pod is held by somebody else."""

    code = "IN_USE"
    retryable = True
    remedy = "find who holds it (`ss -ltnp` in the pod's namespace) and stop it"


class PermissionMissing(DataplaneError):
    code = "PERMISSION"
    remedy = "the data plane needs CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN (setns)"


class VersionMismatch(DataplaneError):
    code = "VERSION"
    remedy = "install agent and data plane of the same release; restart the older one"


class NetnsGone(DataplaneError):
    code = "NETNS_GONE"


class DataplaneInternal(DataplaneError):
    code = "INTERNAL"
    retryable = True


class Draining(DataplaneError):
    code = "DRAINING"
    retryable = True


_BY_CODE: dict[int, type[DataplaneError]] = {
    control_pb2.Error.INVALID: InvalidRequest,
    control_pb2.Error.NOT_FOUND: NotFound,
    control_pb2.Error.IN_USE: InUse,
    control_pb2.Error.PERMISSION: PermissionMissing,
    control_pb2.Error.VERSION: VersionMismatch,
    control_pb2.Error.NETNS_GONE: NetnsGone,
    control_pb2.Error.INTERNAL: DataplaneInternal,
    control_pb2.Error.DRAINING: Draining,
}

_ROLES = {"agent": control_pb2.Hello.AGENT, "observer": control_pb2.Hello.OBSERVER}


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


class Dataplane:
    """One connection, as the agent or as an observer. Safe for concurrent use by many tasks."""

    hello: control_pb2.HelloReply

    def __init__(self, channel: Channel, path: Path) -> None:
        self.path = path
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
    async def connect(
        cls,
        path: Path,
        *,
        role: Literal["agent", "observer"],
        config: control_pb2.InstanceConfig | None = None,
    ) -> Self:
        """Connects and says Hello. Raises DataplaneLost, InUse, VersionMismatch, InvalidRequest."""
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
        dataplane = cls(channel, path)
        try:
            hello = control_pb2.Hello(role=_ROLES[role], version=PROTOCOL_VERSION, config=config)
            reply = await dataplane._ask("hello", hello)
            dataplane.hello = reply.hello
        except InUse as exc:
            await dataplane.close()
            raise AgentRoleTaken(str(exc)) from exc
        except BaseException:
            await dataplane.close()
            raise
        return dataplane

    # ---- pods

    async def add_pod(
        self,
        pod: control_pb2.Pod,
        settings: control_pb2.PodSettings,
        netns_fd: int,
        *,
        prepare_only: bool = False,
    ) -> None:
        """Returns once all listeners of the pod accept. Safe to repeat. `netns_fd` stays ours."""
        body = control_pb2.AddPod(pod=pod, settings=settings, prepare_only=prepare_only)
        await self._ask("add_pod", body, fds=(netns_fd,))

    async def update_pod(self, uid: str, settings: control_pb2.PodSettings) -> None:
        await self._ask("update_pod", control_pb2.UpdatePod(uid=uid, settings=settings))

    async def remove_pod(self, uid: str, *, drain: bool, deadline: timedelta | None = None) -> None:
        """Without `drain` all of the pod is cut before this returns. Unknown uids are fine."""
        body = control_pb2.RemovePod(uid=uid, drain=drain, deadline_ms=_milliseconds(deadline))
        await self._ask("remove_pod", body)

    async def capture(self, verb: control_pb2.Capture) -> control_pb2.CaptureReply:
        return (await self._ask("capture", verb)).capture

    async def keep_pods(self, uids: Iterable[str]) -> None:
        """Cuts every pod that isn't named."""
        await self._ask("keep_pods", control_pb2.KeepPods(uids=uids))

    async def pods_synced(self) -> None:
        await self._ask("pods_synced", control_pb2.PodsSynced())

    async def list_pods(self) -> list[control_pb2.PodStatus]:
        reply = await self._ask("list_pods", control_pb2.ListPods())
        return list(reply.pods.pods)

    # ---- configuration and certificates

    async def apply(self, response: bytes) -> control_pb2.ApplyReply:
        """One delta discovery response as it came. Concurrent calls take effect in call order."""
        body = control_pb2.Apply(response=response)
        return (await self._ask("apply", body, within=APPLY_TIMEOUT)).apply

    async def types(self) -> list[control_pb2.TypeState]:
        """Names and versions of all resources that are held; large in a large mesh."""
        return list((await self.look()).types)

    async def new_csr(self, identity: str) -> str:
        return (await self._ask("new_csr", control_pb2.NewCsr(identity=identity))).new_csr.csr

    async def install_certificate(
        self, identity: str, chain: Sequence[str], roots: Sequence[str], key: Secret | None = None
    ) -> control_pb2.CertificateStatus:
        """For the pending key unless one is given, of which no copy is left behind.

        Raises InvalidRequest when the chain doesn't fit the key, identity or roots.
        """
        body = control_pb2.InstallCertificate(identity=identity, chain=chain, roots=roots)
        return (await self._ask("install_certificate", body, key=key)).certificate.certificate

    async def fail_certificate(self, identity: str, text: str) -> None:
        body = control_pb2.FailCertificate(identity=identity, text=text)
        await self._ask("fail_certificate", body)

    async def set_trust(self, trust: control_pb2.SetTrust) -> None:
        """Returns once tunnels that it no longer covers are cut. Raises InvalidRequest, whose text
        begins with the field that can't be read; then the one before stays."""
        await self._ask("set_trust", trust)

    # ---- the instance

    async def configure(
        self,
        *,
        log: control_pb2.LogConfig | None = None,
        limits: control_pb2.Limits | None = None,
    ) -> None:
        await self._ask("configure", control_pb2.Configure(log=log, limits=limits))

    async def drain(self, *, deadline: timedelta | None = None, exit: bool = False) -> None:
        """Returns when nothing is left (at most the deadline and a little)."""
        body = control_pb2.Drain(deadline_ms=_milliseconds(deadline), exit=exit)
        await self._ask("drain", body, within=(deadline or REQUEST_TIMEOUT) + REQUEST_TIMEOUT)

    async def take_listeners(self, socket: Path) -> None:
        """Makes this data plane the successor of the one on `socket`."""
        await self._ask("take_listeners", control_pb2.TakeListeners(socket=str(socket)))

    async def look(self) -> control_pb2.HelloReply:
        """What Hello tells now: pods, certificates, versions. Over a connection of its own."""
        observer = await Dataplane.connect(self.path, role="observer")
        await observer.close()
        return observer.hello

    # ---- observation; a slow reader of a stream holds its connection up, so give it its own

    async def connections(self, pod_uid: str = "") -> AsyncIterator[control_pb2.Connection]:
        body = control_pb2.ListConnections(pod_uid=pod_uid)
        async for reply in self._stream("list_connections", body):
            for connection in reply.connections.connections:
                yield connection

    async def metrics(self) -> AsyncIterator[bytes]:
        """OpenMetrics text, ended by `# EOF`."""
        async for reply in self._stream("get_metrics", control_pb2.GetMetrics()):
            yield reply.chunk.data

    async def dump(self, section: str) -> AsyncIterator[bytes]:
        """One JSON document. Raises InvalidRequest for a section that doesn't exist."""
        async for reply in self._stream("dump", control_pb2.Dump(section=section)):
            yield reply.chunk.data

    async def explain(self, source: str, destination: str) -> control_pb2.ExplainReply:
        """Sends nothing. Raises NotFound for a source that isn't known, InvalidRequest."""
        body = control_pb2.Explain(source=source, destination=destination)
        return (await self._ask("explain", body)).explain

    async def verdicts(self, pod_uid: str = "", *, limit: int = 0) -> control_pb2.VerdictsReply:
        """The last refusals and failures, newest first; 0: all that are kept."""
        body = control_pb2.ListVerdicts(pod_uid=pod_uid, limit=limit)
        return (await self._ask("list_verdicts", body)).verdicts

    async def policy_hits(self) -> list[control_pb2.PolicyHits]:
        reply = await self._ask("list_policy_hits", control_pb2.ListPolicyHits())
        return list(reply.policy_hits.policies)

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

    async def _ask(
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
                    return _checked(await self._next(call))
                finally:
                    self._forget(call_id)
        except TimeoutError:
            raise DataplaneSilent(f"no answer to {kind} in {seconds:g} s") from None

    async def _stream(self, kind: str, body: Body) -> AsyncIterator[control_pb2.Reply]:
        call_id, call = await self._send(kind, body)
        try:
            while True:
                reply = _checked(await self._next(call))
                if reply.WhichOneof("body") != "done":
                    yield reply
                if not reply.more:
                    return
        finally:
            self._forget(call_id)

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
            why = f"{self.path}: {exc}"
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
            self._fail(f"{self.path}: {exc}")

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


def _checked(reply: control_pb2.Reply) -> control_pb2.Reply:
    if reply.WhichOneof("body") != "error":
        return reply
    error = reply.error
    kind = _BY_CODE.get(error.code, DataplaneError)
    raise kind(error.text or kind.code, subject=error.subject)


def _milliseconds(value: timedelta | None) -> int:
    """0 stands for "the data plane's default"; a deadline of nothing becomes the shortest one."""
    return 0 if value is None else max(1, round(value.total_seconds() * 1000))
