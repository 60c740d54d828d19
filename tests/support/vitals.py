"""What a process has open and in memory, and the counters that it shows."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent.cli.demo.netns import connect

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.world import Node

# Pools and event loops keep a few; arenas of an allocator breathe by some megabytes.
DESCRIPTORS = 4
MEMORY_KB = 12 * 1024

_SERIES = re.compile(r"(?P<name>[a-zA-Z_:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_kb(pid: int) -> int:
    """0 for a process that is about to be gone: one that was killed has no memory of its own."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


@dataclass(frozen=True)
class Vitals:
    """Of the processes that serve now; `recovered` after the fault."""

    before: dict[int, tuple[int, int]]

    @classmethod
    async def of(cls, mesh: Mesh, *nodes: Node) -> Vitals:
        pids = []
        for node in nodes:
            status = await mesh.admin(node, "status")
            pids += [status["pid"], status["dataplane"]["pid"]]
        return cls({pid: (descriptors(pid), resident_kb(pid)) for pid in pids})

    async def recovered(self, mesh: Mesh) -> None:
        """Waits until descriptors are back; memory must be."""

        def back() -> bool:
            return all(descriptors(pid) <= fds + DESCRIPTORS for pid, (fds, _) in living.items())

        living = {pid: kept for pid, kept in self.before.items() if resident_kb(pid)}
        assert living, "none of the processes lives"
        await mesh.until(f"descriptors as before: {living}", back, seconds=30)
        for pid, (_, memory) in living.items():
            assert resident_kb(pid) < memory + MEMORY_KB, pid


async def metrics(node: Node) -> str:
    """The text of :15020/metrics inside a node."""
    reader, writer = await connect(node.namespace, "127.0.0.1", 15020)
    writer.write(b"GET /metrics HTTP/1.0\r\nHost: node\r\n\r\n")
    try:
        async with asyncio.timeout(20):
            return (await reader.read()).decode().partition("\r\n\r\n")[2]
    finally:
        writer.close()


async def counted(node: Node, name: str, **labels: str) -> float:
    """The sum of a metric's series that have these labels; 0 where there is none."""
    total = 0.0
    for line in (await metrics(node)).splitlines():
        found = _SERIES.fullmatch(line)
        if found is None or found["name"] != name:
            continue
        if all(f'{key}="{value}"' in (found["labels"] or "") for key, value in labels.items()):
            total += float(found["value"])
    return total
