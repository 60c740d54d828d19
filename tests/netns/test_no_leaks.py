"""Ten thousand short connections leave nothing behind."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.netns import connect
from agent.cli.demo.shop import ECHO_PORT

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import Node

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONNECTIONS = 10_000
AT_ONCE = 50


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


async def burst(shop: Shop, count: int) -> None:
    """Connections of one greeting each; every one must succeed."""
    todo = iter(range(count))

    async def client() -> None:
        for _ in todo:
            reader, writer = await connect(
                shop.web.sandbox.namespace, shop.db.sandbox.ipv4, ECHO_PORT
            )
            assert (await reader.readline()).startswith(b"db sees")
            writer.close()

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))


@pytest.mark.timeout(300)
async def test_ten_thousand_connections_leak_nothing(mesh: Mesh, shop: Shop) -> None:
    pids = [(await mesh.admin(n, "status"))["dataplane"]["pid"] for n in mesh.world.nodes]
    # Pools, caches and allocator arenas reach their size first.
    await burst(shop, 1000)
    await quiet(mesh)
    before = [(descriptors(pid), resident_kb(pid)) for pid in pids]
    await burst(shop, CONNECTIONS)
    await quiet(mesh)
    for pid, (fds, memory) in zip(pids, before, strict=True):
        await mesh.until(
            f"descriptors of {pid} back to {fds}",
            partial(lambda pid, fds: descriptors(pid) <= fds + 4, pid, fds),
        )
        # 10 000 leaked connections of 1 kB would show; arenas breathe by a few hundred kB.
        assert resident_kb(pid) < memory + 8192


async def quiet(mesh: Mesh) -> None:
    for node in mesh.world.nodes:

        async def ended(node: Node = node) -> bool:
            return not await mesh.admin(node, "connections")

        await mesh.until("all connections to end", ended)
