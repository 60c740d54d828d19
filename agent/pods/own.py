"""The agent's own network namespace: in dedicated mode the one pod's (facts ztunnel 1.5), else
where its metrics are reached over HBONE (facts ztunnel 11.6)."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from agent.pods.choice import OwnWorkload
from agent.pods.netns import NetnsPath
from agent.pods.source import Pod, PodAdded, PodEvent, PodSource, PodsSynced


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
        yield PodAdded(Pod("self", named.name, named.namespace, named.service_account, _netns()))
        yield PodsSynced()
        await asyncio.Event().wait()


class WithOwn:
    """Another source's pods, and before them the agent's own, which peers reach over HBONE."""

    def __init__(self, source: PodSource, own: OwnWorkload, ports: tuple[int, ...]) -> None:
        self._source = source
        self._own = Pod(
            "underpass-agent",
            own.name,
            own.namespace,
            own.service_account,
            _netns(),
            dns_capture=False,
            only_ports=ports,
        )

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def after_sync(self) -> bool:
        return self._source.after_sync

    @property
    def connected(self) -> bool:
        return self._source.connected

    @property
    def remedy(self) -> str:
        return self._source.remedy

    def problems(self) -> tuple[str, ...]:
        return self._source.problems()

    async def events(self) -> AsyncIterator[PodEvent]:
        yield PodAdded(self._own)
        async for event in self._source.events():
            yield event


def _netns() -> NetnsPath:
    # A thread of ours may be in another namespace for a moment: the main one never is.
    return NetnsPath(Path("/proc/self/ns/net"), own=True)
