"""Dedicated mode: the one pod is the agent's own network namespace (facts ztunnel 1.5)."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from agent.pods.choice import OwnWorkload
from agent.pods.netns import NetnsPath
from agent.pods.source import Pod, PodAdded, PodEvent, PodsSynced


class OwnSource:
    after_sync = False
    connected = True
    remedy = ""

    def __init__(self, workload: OwnWorkload) -> None:
        self._workload = workload

    @property
    def name(self) -> str:
        return f"self:{self._workload}"

    def problems(self) -> tuple[str, ...]:
        return ()

    async def events(self) -> AsyncIterator[PodEvent]:
        named = self._workload
        # A thread of ours may be in another namespace for a moment: the main one never is.
        netns = NetnsPath(Path("/proc/self/ns/net"), own=True)
        yield PodAdded(Pod("self", named.name, named.namespace, named.service_account, netns))
        yield PodsSynced()
        await asyncio.Event().wait()
