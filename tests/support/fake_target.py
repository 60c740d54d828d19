"""The data plane as the one who listens in pods, for reconcilers."""

import asyncio
import os
from collections.abc import Callable, Iterable
from datetime import timedelta

from agent.dataplane import DataplaneError, InUse
from proto.gen import control_pb2


class FakeTarget:
    """A data plane that remembers its pods and the order of everything."""

    hold: asyncio.Event | None

    def __init__(self) -> None:
        self.up: dict[str, int] = {}
        self.prepared: dict[str, int] = {}
        self.removed: list[tuple[str, bool]] = []
        self.kept: list[set[str]] = []
        self.settings: dict[str, control_pb2.PodSettings] = {}
        self.updated: list[str] = []
        # Told of every update.
        self.heard: Callable[[str], None] = lambda _: None
        # Told of every pod that is to drain.
        self.drained: Callable[[str], None] = lambda _: None
        self.synced = False
        self.faults: list[DataplaneError] = []
        self.keep_faults: list[DataplaneError] = []
        self.remove_faults: list[DataplaneError] = []
        self.told: list[control_pb2.PodStatus] = []
        # Somebody else holds the ports in every pod.
        self.taken = False
        self.hold = None
        # What proofs are expected of pods, and whether they arrive.
        self.expected: dict[str, control_pb2.Prove.Expected] = {}
        self.arrives = True

    async def add_pod(
        self,
        pod: control_pb2.Pod,
        settings: control_pb2.PodSettings,
        netns_fd: int,
        *,
        prepare_only: bool = False,
    ) -> None:
        if self.hold is not None:
            await self.hold.wait()
        if self.taken:
            raise InUse("port 15008 is held by another process", subject=pod.uid)
        if self.faults:
            raise self.faults.pop(0)
        self.settings[pod.uid] = settings
        (self.prepared if prepare_only else self.up)[pod.uid] = os.fstat(netns_fd).st_ino

    async def update_pod(self, uid: str, settings: control_pb2.PodSettings) -> None:
        if self.faults:
            raise self.faults.pop(0)
        self.settings[uid] = settings
        self.updated.append(uid)
        self.heard("updated")

    async def remove_pod(self, uid: str, *, drain: bool, deadline: timedelta | None = None) -> None:
        if self.remove_faults:
            raise self.remove_faults.pop(0)
        self.removed.append((uid, drain))
        self.up.pop(uid, None)
        if drain:
            self.drained(uid)

    async def keep_pods(self, uids: Iterable[str]) -> None:
        if self.keep_faults:
            raise self.keep_faults.pop(0)
        self.kept.append(set(uids))

    async def list_pods(self) -> list[control_pb2.PodStatus]:
        return list(self.told)

    async def pods_synced(self) -> None:
        self.synced = True

    async def prove(self, ask: control_pb2.Prove) -> control_pb2.ProveReply:
        self.expected.update({entry.uid: entry for entry in ask.expected})
        reply = control_pb2.ProveReply()
        for uid in ask.arrived if self.arrives else ():
            expected = self.expected[uid]
            reply.arrived.add(uid=uid, nonces=[*expected.outbound, *expected.inbound])
        return reply
