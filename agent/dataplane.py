"""Client of the data plane's control socket (control.proto): what can be asked of it."""

from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal, Self

from agent.calls import REQUEST_TIMEOUT, Calls
from agent.refusals import (
    AgentRoleTaken,
    DataplaneError,
    DataplaneInternal,
    DataplaneLost,
    DataplaneSilent,
    Draining,
    InUse,
    InvalidRequest,
    NetnsGone,
    NobodyListens,
    NotFound,
    PermissionMissing,
    VersionMismatch,
)
from agent.secret import Secret
from proto.gen import control_pb2

# Whoever asks also meets the refusals.
__all__ = [
    "AgentRoleTaken",
    "Dataplane",
    "DataplaneError",
    "DataplaneInternal",
    "DataplaneLost",
    "DataplaneSilent",
    "Draining",
    "InUse",
    "InvalidRequest",
    "NetnsGone",
    "NobodyListens",
    "NotFound",
    "PermissionMissing",
    "VersionMismatch",
]

PROTOCOL_VERSION = 1
# 100 k workloads in one response take a debug build several seconds on a busy machine.
APPLY_TIMEOUT = timedelta(minutes=3)

_ROLES = {"agent": control_pb2.Hello.AGENT, "observer": control_pb2.Hello.OBSERVER}


class Dataplane:
    """One connection, as the agent or as an observer. Safe for concurrent use by many tasks."""

    hello: control_pb2.HelloReply

    def __init__(self, calls: Calls, path: Path) -> None:
        self.path = path
        self._calls = calls

    @classmethod
    async def connect(
        cls,
        path: Path,
        *,
        role: Literal["agent", "observer"],
        config: control_pb2.InstanceConfig | None = None,
    ) -> Self:
        """Connects and says Hello. Raises DataplaneLost, InUse, VersionMismatch, InvalidRequest."""
        dataplane = cls(await Calls.connect(path), path)
        try:
            hello = control_pb2.Hello(role=_ROLES[role], version=PROTOCOL_VERSION, config=config)
            reply = await dataplane._calls.ask("hello", hello)
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
        await self._calls.ask("add_pod", body, fds=(netns_fd,))

    async def update_pod(self, uid: str, settings: control_pb2.PodSettings) -> None:
        await self._calls.ask("update_pod", control_pb2.UpdatePod(uid=uid, settings=settings))

    async def remove_pod(self, uid: str, *, drain: bool, deadline: timedelta | None = None) -> None:
        """Without `drain` all of the pod is cut before this returns. Unknown uids are fine."""
        body = control_pb2.RemovePod(uid=uid, drain=drain, deadline_ms=_milliseconds(deadline))
        await self._calls.ask("remove_pod", body)

    async def capture(self, verb: control_pb2.Capture) -> control_pb2.CaptureReply:
        return (await self._calls.ask("capture", verb)).capture

    async def prove(self, ask: control_pb2.Prove) -> control_pb2.ProveReply:
        return (await self._calls.ask("prove", ask)).prove

    async def keep_pods(self, uids: Iterable[str]) -> None:
        """Cuts every pod that isn't named."""
        await self._calls.ask("keep_pods", control_pb2.KeepPods(uids=uids))

    async def pods_synced(self) -> None:
        await self._calls.ask("pods_synced", control_pb2.PodsSynced())

    async def list_pods(self) -> list[control_pb2.PodStatus]:
        reply = await self._calls.ask("list_pods", control_pb2.ListPods())
        return list(reply.pods.pods)

    # ---- configuration and certificates

    async def apply(self, response: bytes) -> control_pb2.ApplyReply:
        """One delta discovery response as it came. Concurrent calls take effect in call order."""
        body = control_pb2.Apply(response=response)
        return (await self._calls.ask("apply", body, within=APPLY_TIMEOUT)).apply

    async def types(self) -> list[control_pb2.TypeState]:
        """Names and versions of all resources that are held; large in a large mesh."""
        return list((await self.look()).types)

    async def new_csr(self, identity: str) -> str:
        return (await self._calls.ask("new_csr", control_pb2.NewCsr(identity=identity))).new_csr.csr

    async def install_certificate(
        self, identity: str, chain: Sequence[str], roots: Sequence[str], key: Secret | None = None
    ) -> control_pb2.CertificateStatus:
        """For the pending key unless one is given, of which no copy is left behind.

        Raises InvalidRequest when the chain doesn't fit the key, identity or roots.
        """
        body = control_pb2.InstallCertificate(identity=identity, chain=chain, roots=roots)
        return (await self._calls.ask("install_certificate", body, key=key)).certificate.certificate

    async def fail_certificate(self, identity: str, text: str) -> None:
        body = control_pb2.FailCertificate(identity=identity, text=text)
        await self._calls.ask("fail_certificate", body)

    async def set_trust(self, trust: control_pb2.SetTrust) -> None:
        """Returns once tunnels that it no longer covers are cut. Raises InvalidRequest, whose text
        begins with the field that can't be read; then the one before stays."""
        await self._calls.ask("set_trust", trust)

    # ---- the instance

    async def configure(
        self,
        *,
        log: control_pb2.LogConfig | None = None,
        limits: control_pb2.Limits | None = None,
    ) -> None:
        await self._calls.ask("configure", control_pb2.Configure(log=log, limits=limits))

    async def drain(self, *, deadline: timedelta | None = None, exit: bool = False) -> None:
        """Returns when nothing is left (at most the deadline and a little)."""
        body = control_pb2.Drain(deadline_ms=_milliseconds(deadline), exit=exit)
        await self._calls.ask("drain", body, within=(deadline or REQUEST_TIMEOUT) + REQUEST_TIMEOUT)

    async def take_listeners(self, socket: Path) -> None:
        """Makes this data plane the successor of the one on `socket`."""
        await self._calls.ask("take_listeners", control_pb2.TakeListeners(socket=str(socket)))

    async def look(self) -> control_pb2.HelloReply:
        """What Hello tells now: pods, certificates, versions. Over a connection of its own."""
        observer = await Dataplane.connect(self.path, role="observer")
        await observer.close()
        return observer.hello

    # ---- observation; a slow reader of a stream holds its connection up, so give it its own

    async def connections(self, pod_uid: str = "") -> AsyncIterator[control_pb2.Connection]:
        body = control_pb2.ListConnections(pod_uid=pod_uid)
        async for reply in self._calls.stream("list_connections", body):
            for connection in reply.connections.connections:
                yield connection

    async def metrics(self) -> AsyncIterator[bytes]:
        """OpenMetrics text, ended by `# EOF`."""
        async for reply in self._calls.stream("get_metrics", control_pb2.GetMetrics()):
            yield reply.chunk.data

    async def dump(self, section: str) -> AsyncIterator[bytes]:
        """One JSON document. Raises InvalidRequest for a section that doesn't exist."""
        async for reply in self._calls.stream("dump", control_pb2.Dump(section=section)):
            yield reply.chunk.data

    async def explain(self, source: str, destination: str) -> control_pb2.ExplainReply:
        """Sends nothing. Raises NotFound for a source that isn't known, InvalidRequest."""
        body = control_pb2.Explain(source=source, destination=destination)
        return (await self._calls.ask("explain", body)).explain

    async def verdicts(self, pod_uid: str = "", *, limit: int = 0) -> control_pb2.VerdictsReply:
        """The last refusals and failures, newest first; 0: all that are kept."""
        body = control_pb2.ListVerdicts(pod_uid=pod_uid, limit=limit)
        return (await self._calls.ask("list_verdicts", body)).verdicts

    async def policy_hits(self) -> list[control_pb2.PolicyHits]:
        reply = await self._calls.ask("list_policy_hits", control_pb2.ListPolicyHits())
        return list(reply.policy_hits.policies)

    def events(self) -> AsyncIterator[control_pb2.Event]:
        """For one consumer. Ends when the connection is lost or closed."""
        return self._calls.events()

    async def wait_lost(self) -> DataplaneLost:
        """Waits for the end of this connection and returns why it ended."""
        return await self._calls.wait_lost()

    @property
    def connected(self) -> bool:
        return self._calls.connected

    async def close(self) -> None:
        """Ends the connection; whoever still waits gets DataplaneLost. Safe to repeat."""
        await self._calls.close()


def _milliseconds(value: timedelta | None) -> int:
    """0 stands for "the data plane's default"; a deadline of nothing becomes the shortest one."""
    return 0 if value is None else max(1, round(value.total_seconds() * 1000))
