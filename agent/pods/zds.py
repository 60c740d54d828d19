"""Pods from a CNI node agent over ZDS (facts ztunnel 10). The server redirects their traffic, we
only serve them; it learns from our answers which pods aren't served yet.

Unlike upstream's proxy we don't exit when the server breaks the protocol: every pod of the node
would pay with its connections for one odd packet. We say what was wrong and connect anew.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from agent.errors import NetnsRefused
from agent.pods.netns import HeldNetns
from agent.pods.source import Outcome, Pod, PodAdded, PodEvent, PodKept, PodRemoved, PodsSynced
from agent.pods.zds_link import Link, Packet, ProtocolError
from agent.xds.backoff import Backoff
from proto.gen import zds_pb2

log = logging.getLogger("underpass.pods")

# The server waits five seconds for an answer (facts istio-ambient 4).
PATIENCE = timedelta(seconds=4)
NOT_YET = "not served yet: no data plane took it in time; it is added by itself when one does"


@dataclass
class _Snapshot:
    """What the server has named since it was connected; None: it has named everything."""

    listed: set[str] | None = field(default_factory=set)

    def name(self, uid: str) -> None:
        if self.listed is not None:
            self.listed.add(uid)

    def unname(self, uid: str) -> None:
        if self.listed is not None:
            self.listed.discard(uid)

    def complete(self) -> set[str]:
        if self.listed is None:
            raise ProtocolError("a second snapshot_sent")
        listed, self.listed = self.listed, None
        return listed


class ZdsSource:
    """State: `_pods` was told to the consumer, `_kept` are uids of pods that only the data plane
    has, `_problem` is why nothing is heard from the server now."""

    after_sync = True
    remedy = "check that the CNI node agent runs and that its socket is mounted here"

    def __init__(self, path: Path, backoff: Backoff | None = None) -> None:
        self._path = path
        self._backoff = backoff or Backoff()
        self._pods: dict[str, Pod] = {}
        self._kept: set[str] = set()
        self._problem = "not connected yet"
        self._current = False

    @property
    def name(self) -> str:
        return f"zds:{self._path}"

    @property
    def connected(self) -> bool:
        """The server has named all pods since it was connected."""
        return self._current

    def problems(self) -> tuple[str, ...]:
        return (f"{self._path}: {self._problem}",) if self._problem else ()

    async def events(self) -> AsyncIterator[PodEvent]:
        failures = 0
        while True:
            try:
                link = await Link.connect(self._path)
            except OSError as exc:
                self._lost(exc.strerror or str(exc))
            else:
                try:
                    async for event in self._session(link):
                        failures = 0
                        yield event
                    self._lost("the server hung up")
                except OSError as exc:
                    self._lost(exc.strerror or str(exc))
                except ProtocolError as exc:
                    self._lost(f"the server broke the protocol: {exc}")
                finally:
                    link.close()
            failures += 1
            await asyncio.sleep(self._backoff.delay(failures).total_seconds())

    def _lost(self, why: str) -> None:
        """Pods go on as they are; told once for each reason."""
        if why != self._problem:
            log.warning("ZDS server away", extra={"socket": self._path, "error": why})
        self._problem, self._current = why, False

    async def _session(self, link: Link) -> AsyncIterator[PodEvent]:
        """Until the server hangs up. Raises OSError, ProtocolError."""
        await link.hello()
        log.info("ZDS server connected", extra={"socket": self._path})
        self._problem = ""
        snapshot = _Snapshot()
        while True:
            try:
                packet = await link.receive()
                if packet is None:
                    return
                outcome: Outcome = asyncio.get_running_loop().create_future()
                events = self._take(packet, snapshot, outcome)
            except ProtocolError as exc:
                await link.answer(str(exc))
                raise
            except NetnsRefused as exc:
                await link.answer(str(exc))
                continue
            for event in events:
                yield event
            await link.answer(await _told(outcome))

    def _take(self, packet: Packet, snapshot: _Snapshot, outcome: Outcome) -> list[PodEvent]:
        """What follows from a request; `outcome` is set here or by whoever takes the events."""
        request = packet.request
        match request.WhichOneof("payload"):
            case "add":
                # The descriptor is closed by its owner, whatever is wrong with the rest.
                try:
                    netns = HeldNetns(packet.fd)
                except NetnsRefused:
                    # A pod that serves isn't cut for an odd repetition of it.
                    snapshot.name(_uid(request.add.uid))
                    raise
                return [self._add(request.add, netns, snapshot, outcome)]
            case "keep":
                outcome.set_result(None)
                return self._keep(_uid(request.keep.uid), snapshot)
            case "del":
                uid = _uid(getattr(request, "del").uid)
                snapshot.unname(uid)
                self._pods.pop(uid, None)
                self._kept.discard(uid)
                return [PodRemoved(uid, outcome)]
            case _:
                gone = sorted((self._pods.keys() | self._kept) - snapshot.complete())
                for uid in gone:
                    self._pods.pop(uid, None)
                    self._kept.discard(uid)
                log.info("ZDS snapshot complete", extra={"pods": len(self._pods)})
                self._current = True
                outcome.set_result(None)
                return [*map(PodRemoved, gone), PodsSynced()]

    def _add(
        self,
        add: zds_pb2.AddWorkload,
        netns: HeldNetns,
        snapshot: _Snapshot,
        outcome: Outcome,
    ) -> PodEvent:
        uid = _uid(add.uid)
        if not add.HasField("workload_info"):
            raise ProtocolError(f"add of {uid} without workload_info")
        info = add.workload_info
        pod = Pod(uid, info.name, info.namespace, info.service_account, netns)
        snapshot.name(uid)
        self._kept.discard(uid)
        if self._pods.get(uid) != pod:
            # Otherwise the former descriptor is as good; the new one is closed with its pod.
            self._pods[uid] = pod
        return PodAdded(self._pods[uid], outcome)

    def _keep(self, uid: str, snapshot: _Snapshot) -> list[PodEvent]:
        if snapshot.listed is None:
            raise ProtocolError(f"keep of {uid} after the snapshot")
        snapshot.name(uid)
        if uid in self._pods:
            return []
        self._kept.add(uid)
        return [PodKept(uid)]


def _uid(uid: str) -> str:
    if not uid:
        raise ProtocolError("a request without a uid")
    return uid


async def _told(outcome: Outcome) -> str:
    """The answer's text. A pod that isn't served yet is tried on, whatever is answered."""
    await asyncio.wait({outcome}, timeout=PATIENCE.total_seconds())
    if not outcome.done():
        return NOT_YET
    error = outcome.result()
    return "" if error is None else str(error)
