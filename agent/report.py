"""Puts together what an operator sees: readiness, the status screen, and what is wrong."""

import asyncio
import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata

from agent.bypass import Bypass, of_connections, of_pods, of_workload, records
from agent.dataplane import Dataplane, DataplaneError, DataplaneSilent
from agent.feed import NO_AUTHORITY, ConfigurationSource, Feed
from agent.identity.supply import Supply
from agent.identity.trust import TrustKeeper, TrustStatus
from agent.pods.precapture import Precapture
from agent.pods.proof import NOT_PROVED, PROVED
from agent.pods.reconciler import Reconciler
from agent.pods.source import PodSource
from agent.problems import (
    capture_problems,
    certificate_problems,
    control_plane_problems,
    dataplane_problems,
    pod_problems,
    supply_problems,
    trust_problems,
)
from agent.status import (
    CaptureView,
    CertificateSummary,
    CertificateView,
    ConnectionSummary,
    ControlPlaneView,
    DataplaneView,
    NodeStatus,
    PodSummary,
    PodView,
    Problem,
    TypeView,
)
from agent.supervisor import Supervisor
from agent.xds.status import XdsStatus
from proto.gen import control_pb2
from redirect import precapture
from redirect.base import Datagrams, RedirectError
from redirect.netns import NetnsThread, duplicate

# Bookkeeping, answered in milliseconds; whoever looks at a hung node isn't to hang too.
PATIENCE = 3.0


class Report:
    """Reads the parts; changes nothing."""

    def __init__(
        self,
        node: str,
        capture: CaptureView,
        pods: PodSource,
        source: ConfigurationSource,
        identities: Supply | None,
        reconciler: Reconciler,
        feed: Feed,
        supervisor: Supervisor,
        trust: TrustKeeper | None = None,
    ) -> None:
        self.node = node
        self.started = datetime.now(UTC)
        self._capture = capture
        self._pods = pods
        self._source = source
        self._identities = identities
        self._reconciler = reconciler
        self._feed = feed
        self._supervisor = supervisor
        self._trust = trust

    @property
    def dataplane(self) -> Dataplane | None:
        """The one that serves now, for what only it can tell."""
        return self._feed.present

    def pending(self) -> tuple[str, ...]:
        """What readiness waits for, by names that say where to look."""
        waits = {
            "data plane": self._feed.present is None,
            "control plane": not self._feed.synced,
            # facts ztunnel 11.5: again while a ZDS server is away. Pods whose ports an ending proxy
            # holds don't count: it ends only once we are ready.
            "pods": not self._reconciler.settled or not self._pods.connected,
        }
        return tuple(name for name, waiting in waits.items() if waiting)

    async def pods(self) -> list[PodView]:
        """What the agent and the data plane know of each; without a data plane the former alone."""
        return (await self._pods_and_silence())[0]

    async def _pods_and_silence(self) -> tuple[list[PodView], DataplaneError | None]:
        """Also why the data plane, though connected, told nothing."""
        await self._reconciler.precapture.refresh()
        captured = {view.uid for view in self._reconciler.views() if view.state == "captured"}
        told, silence = await self._told()
        views = []
        for view in self._reconciler.views():
            status = told.get(view.uid) if told is not None else None
            # Before and after the question, so that it isn't one that comes or goes.
            if told is not None and view.uid in captured and view.state == "captured":
                view = _doubted(view, status)
            if status is not None:
                view = dataclasses.replace(
                    view,
                    identity=status.identity,
                    workload_uid=status.workload_uid,
                    inbound_connections=status.inbound_connections,
                    outbound_connections=status.outbound_connections,
                )
            views.append(view)
        return views, silence

    async def _told(self) -> tuple[dict[str, control_pb2.PodStatus] | None, DataplaneError | None]:
        dataplane = self.dataplane
        if dataplane is None:
            return None, None
        try:
            async with asyncio.timeout(PATIENCE):
                return _by_uid(await dataplane.list_pods()), None
        except TimeoutError:
            return None, DataplaneSilent(f"it didn't tell its pods in {PATIENCE:g} s")
        except DataplaneError as exc:
            # A lost one is told by the supervisor.
            return None, exc if dataplane.connected else None

    async def bypass(self) -> list[Bypass]:
        """Asks each captured pod's kernel tables, and the data plane for the mesh's workloads."""
        views = await self.pods()
        found = list(of_pods(views))
        visitor = NetnsThread()
        # Kept open for us: a pod may go meanwhile.
        opened = [(pod, duplicate(fd)) for pod, fd in self._reconciler.captured_namespaces()]
        try:
            for pod, fd in opened:
                with contextlib.suppress(RedirectError):
                    look = functools.partial(precapture.confirmed, self._feed.capture)
                    found += of_connections(pod.key, await visitor.run(fd, look, subject=pod.key))
        finally:
            for _, fd in opened:
                os.close(fd)
            await visitor.close()
        known = {view.workload_uid for view in views if view.workload_uid}
        if (dataplane := self.dataplane) is not None:
            observer = await Dataplane.connect(dataplane.path, role="observer")
            try:
                async for workload in records(observer.dump("workloads")):
                    if (one := of_workload(workload, self.node, known)) is not None:
                        found.append(one)
            finally:
                await observer.close()
        return found

    def certificates(self) -> list[CertificateView]:
        if self._identities is None:
            return []
        return [
            CertificateView(
                identity=entry.identity,
                state=entry.state.value,
                not_before=entry.not_before,
                not_after=entry.not_after,
                serial=entry.serial,
                last_error=entry.last_error,
                next_attempt=entry.next_attempt,
            )
            for entry in self._identities.status()
        ]

    def fetches(self) -> tuple[int, int]:
        """Certificates fetched, and attempts that failed, since the agent started."""
        if self._identities is None:
            return 0, 0
        return self._identities.fetched, self._identities.failed

    def trust(self) -> TrustStatus | None:
        return None if self._trust is None else self._trust.status()

    def control_plane(self) -> ControlPlaneView:
        status = self._source.status()
        return ControlPlaneView(
            source=status.source,
            connected=status.connected,
            since=status.since,
            last_error=status.last_error,
            last_push=status.last_push,
            types={
                name: TypeView(entry.processed, dict(entry.rejected))
                for name, entry in status.types.items()
            },
        )

    def xds(self) -> XdsStatus:
        return self._source.status()

    def summary(self) -> PodSummary:
        """Without asking the data plane."""
        return summarise(self._reconciler.views(), self._pods.name)

    def supervised(self) -> DataplaneView:
        return self._supervisor.view()

    @property
    def precapture(self) -> Precapture:
        return self._reconciler.precapture

    @property
    def proofs(self) -> dict[str, int]:
        """How many were made, by what came of them."""
        return dict(self._reconciler.prover.counts)

    @property
    def repairs(self) -> int:
        return self._reconciler.repairs

    @property
    def datagrams(self) -> Datagrams:
        return self._reconciler.datagrams

    def _supply_problems(self, certificates: list[CertificateView]) -> list[Problem]:
        if self._identities is None:
            return [Problem("certificates", NO_AUTHORITY, "set --ca-address")]
        found = certificate_problems(certificates, datetime.now(UTC), self._identities.remedy)
        return [*supply_problems(self._identities.trouble()), *found]

    async def status(self) -> NodeStatus:
        pods, silence = await self._pods_and_silence()
        certificates = self.certificates()
        control_plane, dataplane = self.control_plane(), self._supervisor.view()
        pending = self.pending()
        expiries = [entry.not_after for entry in certificates if entry.not_after is not None]
        problems = [
            *dataplane_problems(dataplane, silence),
            *control_plane_problems(control_plane, synced=self._feed.synced),
            *capture_problems(self._capture, self._feed.rules_error),
            *(Problem("pod list", text, self._pods.remedy) for text in self._pods.problems()),
            *pod_problems(pods),
            *self._supply_problems(certificates),
            *trust_problems(self.trust()),
        ]
        return NodeStatus(
            node=self.node,
            version=version(),
            pid=os.getpid(),
            started=self.started,
            ready=not pending,
            pending=pending,
            capture=self._capture,
            dataplane=dataplane,
            control_plane=control_plane,
            certificates=CertificateSummary(
                available=sum(entry.state == "Available" for entry in certificates),
                total=len(certificates),
                next_expiry=min(expiries, default=None),
            ),
            pods=summarise(pods, self._pods.name),
            connections=ConnectionSummary(
                inbound=sum(pod.inbound_connections for pod in pods),
                outbound=sum(pod.outbound_connections for pod in pods),
            ),
            problems=tuple(problems),
        )


def _by_uid(statuses: Iterable[control_pb2.PodStatus]) -> dict[str, control_pb2.PodStatus]:
    """A pod that came back while it drained is told twice, and has the connections of both."""
    found: dict[str, control_pb2.PodStatus] = {}
    for status in statuses:
        if (other := found.get(status.pod.uid)) is not None:
            if other.state == control_pb2.PodStatus.UP:
                status, other = other, status
            status.inbound_connections += other.inbound_connections
            status.outbound_connections += other.outbound_connections
        found[status.pod.uid] = status
    return found


def _doubted(view: PodView, status: control_pb2.PodStatus | None) -> PodView:
    """Rules that lead to nobody are no capture that may be called verified."""
    if status is not None and status.state == control_pb2.PodStatus.UP:
        return view
    found = "doesn't know it"
    if status is not None:
        found = f"has it as {control_pb2.PodStatus.State.Name(status.state).lower()}"
    return dataclasses.replace(
        view,
        verified=False,
        enforced=False,
        problem=f"its rules are in place but the data plane {found}: its connections are refused",
        remedy="replace the data plane (SIGHUP to the agent), and report this",
    )


def summarise(pods: list[PodView], source: str) -> PodSummary:
    return PodSummary(
        total=len(pods),
        captured=sum(pod.captured for pod in pods),
        verified=sum(pod.verified for pod in pods),
        failed=sum(bool(pod.problem) for pod in pods),
        source=source,
        served=sum(pod.state == "served" for pod in pods),
        enforced=sum(pod.enforced for pod in pods),
        precapture_connections=sum(pod.precapture_connections or 0 for pod in pods),
        proved=sum(pod.proof == PROVED for pod in pods),
        not_proved=sum(pod.proof == NOT_PROVED for pod in pods),
    )


def version() -> str:
    try:
        return metadata.version("underpass")
    except metadata.PackageNotFoundError:
        return "unknown"
