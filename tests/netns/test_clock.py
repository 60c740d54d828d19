"""The clock of one node jumps, for its agent and its data plane alone (libfaketime): what goes on,
what is refused and told, and that it heals when the clock is right again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo.clients import Load, refused
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT
from agent.cli.demo.story import greets, progress
from tests.support.meshes import mesh_of, stocked
from tests.support.operator import ask

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Sequence

    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import World

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), Path("libfaketime.so.1"))


@dataclass
class ShiftedMesh(Mesh):
    """Processes of the first node ask a clock that `shift` sets."""

    @property
    def clock(self) -> Path:
        return self.folder / "clock"

    def shift(self, offset: str) -> None:
        fresh = self.clock.with_suffix(".new")
        fresh.write_text(f"{offset}\n")
        os.replace(fresh, self.clock)

    async def spawn(
        self, name: str, arguments: Sequence[str], namespace: str | None = None
    ) -> asyncio.subprocess.Process:
        if name == self.world.nodes[0].name:
            arguments = [
                "env",
                f"LD_PRELOAD={LIBRARY}",
                f"FAKETIME_TIMESTAMP_FILE={self.clock}",
                "FAKETIME_CACHE_DURATION=1",
                # A clock that is set moves nothing else.
                "FAKETIME_DONT_FAKE_MONOTONIC=1",
                "NO_FAKE_STAT=1",
                *arguments,
            ]
        return await super().spawn(name, arguments, namespace)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ShiftedMesh]:
    async with mesh_of(ShiftedMesh, world, capture, tmp_path_factory.mktemp("clock")) as made:
        made.shift("+0")
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(mesh: ShiftedMesh) -> Shop:
    made = await stocked(mesh)
    await mesh.start()
    assert made.web.sandbox.node is mesh.world.nodes[0]
    return made


async def test_a_jump_within_the_life_of_certificates_drops_nothing(
    mesh: ShiftedMesh, shop: Shop
) -> None:
    async with Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load:
        await progress(load, 10)
        for offset in ("+2h", "+0"):
            mesh.shift(offset)
            await progress(load, 200)
        assert load.failures == []
    status = await mesh.admin(mesh.world.nodes[0], "status")
    assert status["problems"] == []


async def test_a_jump_past_all_certificates_refuses_tells_and_heals(
    mesh: ShiftedMesh, shop: Shop
) -> None:
    node = mesh.world.nodes[0]
    log = mesh.log(node.name)
    there = (datetime.now(UTC) + timedelta(days=30)).strftime("%Y-%m-%d")
    assert await greets(shop.web, shop.db)
    before = await serials(mesh)
    mesh.shift("+30d")

    async def shut() -> bool:
        return await refused(shop.web, shop.db.sandbox.ipv4, ECHO_PORT)

    await mesh.until("connections refused", shut, node.name)

    async def told() -> bool:
        screen = await ask(mesh.run_dir, node.name, "status")
        return screen.tells(f"it is {there}", "compare the clocks", "connections are refused")

    await mesh.until("what is wrong", told, node.name)
    # The data plane's words, and the agent's; both write into one file.
    lines = [line for line in log.read_text().splitlines() if line.startswith(there)]
    assert any("access" in line and "expired" in line for line in lines)
    assert any("certificate failed" in line for line in lines)
    mesh.shift("+0")
    await mesh.until("db answers again", lambda: greets(shop.web, shop.db), node.name)

    async def renewed() -> bool:
        found = await serials(mesh)
        return len(found) == len(before) and not before & found

    # Not a month later.
    await mesh.until("certificates renewed", renewed, node.name)
    assert (await mesh.admin(node, "status"))["problems"] == []


async def serials(mesh: ShiftedMesh) -> set[str]:
    held = await mesh.admin(mesh.world.nodes[0], "certificates")
    return {entry["serial"] for entry in held if entry["state"] == "Available"}
