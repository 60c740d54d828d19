"""Running pods moved between the ways to capture: nothing that is open breaks, nothing that is
opened meanwhile fails or gets past, and an agent killed in between goes on where it was."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from agent.cli.demo import manifests
from agent.cli.demo.clients import Conversation, Load
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT
from agent.cli.demo.story import progress
from tests.support.meshes import mesh_of, stocked
from tests.support.operator import ask
from tests.support.proof import new_marker, nothing_in_clear
from tests.support.sockets import tracked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import Node, World

# The world of this mode has the cgroup that eBPF needs.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.modes("ebpf")]


class Mixed(Mesh):
    """Pods say by what they are captured, once that was asked for."""

    asked = ""

    def write_pods(self, node: Node) -> None:
        mine = [p.entry() for p in self.pods if p.ambient and p.sandbox.node is node]
        said = {"capture": self.asked} if self.asked else {}
        manifests.write_list(self.pods_file(node), [entry | said for entry in mine])

    def ask_for(self, way: str) -> None:
        self.asked = way
        for node in self.world.nodes:
            self.write_pods(node)

    async def rows(self) -> list[dict[str, Any]]:
        return [row for node in self.world.nodes for row in await self.admin(node, "pods")]

    async def captured_by(self, way: str, *, drained: bool = False) -> None:
        async def all_are() -> bool:
            try:
                rows = await self.rows()
            except Exception:
                return False  # an agent starts
            by = all(row["capture"] == way and row["verified"] for row in rows)
            return by and not (drained and any(row["former_captures"] for row in rows))

        await self.until(f"all pods by {way}", all_are, self.world.nodes[0].name, seconds=30)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mixed]:
    folder = tmp_path_factory.mktemp("mesh")
    async with mesh_of(Mixed, world, "nftables", folder, "--verify-interval=500ms") as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(mesh: Mixed) -> Shop:
    made = await stocked(mesh)
    await mesh.start()
    return made


@asynccontextmanager
async def busy(mesh: Mixed, shop: Shop) -> AsyncIterator[list[Conversation]]:
    """New connections all the time, from a pod of the mesh and from one outside it, none of which
    fails or is seen on the wire in clear. Yields live ones of both kinds."""
    marker = new_marker()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(nothing_in_clear(mesh, marker))
        open_ones = await held(stack, shop)
        captured = Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT)
        plain = Load(shop.legacy, shop.api.sandbox.ipv6, HTTP_PORT)
        loads = [await stack.enter_async_context(load) for load in (captured, plain)]
        yield open_ones
        for load in loads:
            await progress(load, 3)
        assert [load.failures for load in loads] == [[], []]


async def held(stack: AsyncExitStack, shop: Shop) -> list[Conversation]:
    """Out of a captured pod and into one, from a pod of the mesh and from a stranger."""
    ways = ((shop.web, shop.db), (shop.legacy, shop.db), (shop.batch, shop.cart))
    made = [Conversation(client, server.sandbox.ipv4, ECHO_PORT) for client, server in ways]
    return [await stack.enter_async_context(one) for one in made]


async def all_echo(conversations: list[Conversation]) -> None:
    for number, one in enumerate(conversations):
        assert await one.echo(f"conversation {number} goes on"), number


async def test_pods_move_there_and_back_with_all_that_is_open(mesh: Mixed, shop: Shop) -> None:
    async with busy(mesh, shop) as open_ones, AsyncExitStack() as stack:
        mesh.ask_for("ebpf")
        await mesh.captured_by("ebpf")
        await all_echo(open_ones)
        db = next(row for row in await mesh.rows() if row["name"] == "db")
        # Somebody from before is connected to it.
        assert db["former_captures"] == ["nftables"]
        shown = await ask(mesh.run_dir, shop.db.sandbox.node.name, "pods")
        assert "(+nftables)" in shown.text
        open_ones += await held(stack, shop)
        mesh.ask_for("nftables")
        await mesh.captured_by("nftables", drained=True)
        await all_echo(open_ones)
        open_ones += await held(stack, shop)
        mesh.ask_for("ebpf")
        await mesh.captured_by("ebpf")
        await all_echo(open_ones)
    # With the last of the older ones gone, their rules go, and what was known of connections: a
    # later one with the same addresses and ports wouldn't be redirected.
    await mesh.captured_by("ebpf", drained=True)
    assert tracked(shop.db) == 0


async def test_an_agent_killed_while_pods_move_goes_on(mesh: Mixed, shop: Shop) -> None:
    here = shop.db.sandbox.node
    chance = random.Random(5)
    async with busy(mesh, shop) as open_ones:
        for way in ("nftables", "ebpf", "nftables", "ebpf"):
            mesh.ask_for(way)
            # Its poll of the file takes a quarter second, the move of three pods about as long.
            await asyncio.sleep(0.25 + 0.4 * chance.random())
            await mesh.kill(here.name)
            await mesh.start_agent(here)
            await mesh.captured_by(way)
            await all_echo(open_ones)


async def test_another_mode_of_the_node_moves_its_pods(mesh: Mixed, shop: Shop) -> None:
    """Also pods on record by the other mode whose data plane died with the agent."""
    here = shop.db.sandbox.node
    mesh.ask_for("")
    async with busy(mesh, shop) as open_ones:
        for way in ("ebpf", "nftables", "ebpf"):
            mesh.agent_options = [
                f"--capture={way}" if option.startswith("--capture=") else option
                for option in mesh.agent_options
            ]
            for node in mesh.world.nodes:
                await mesh.kill(node.name, signal.SIGUSR2)
                await mesh.start_agent(node)
            await mesh.captured_by(way)
            await all_echo(open_ones)
    status = await mesh.admin(here, "status")
    await mesh.kill(here.name)
    os.kill(status["dataplane"]["pid"], signal.SIGKILL)
    mesh.agent_options = [*mesh.agent_options, "--capture=nftables"]
    await mesh.start_agent(here)
    await mesh.settled(here)
    async with busy(mesh, shop) as open_ones:
        await all_echo(open_ones)
