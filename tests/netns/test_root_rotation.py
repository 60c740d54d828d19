"""The mesh's root changes under traffic: nothing is dropped, and at the end the old one is worth
nothing."""

from __future__ import annotations

import signal
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.clients import Conversation, Load
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT, build, serve_echo, serve_http
from agent.cli.demo.story import progress

if TYPE_CHECKING:
    from pathlib import Path

    from agent.cli.demo.world import World

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def start_authority(mesh: Mesh) -> tuple[str, ...]:
    """In the first node's namespace; returns what agents must be told of it."""
    node = mesh.world.nodes[0]
    address = f"{node.ipv4}:15013"
    folder = mesh.folder / "authority"
    folder.mkdir()
    arguments = [sys.executable, "-m", "tests.support.rotating_ca", address, str(folder)]
    await mesh.spawn("authority", arguments, node.namespace)
    stage = folder / "stage"
    await mesh.until("the authority", stage.exists, "authority")
    return (f"--ca-address=https://{address}", f"--ca-root={folder / 'root.pem'}")


async def step(mesh: Mesh, number: int) -> None:
    mesh.processes["authority"].send_signal(signal.SIGUSR1)
    stage = mesh.folder / "authority" / "stage"
    await mesh.until("the authority's step", lambda: stage.read_text() == str(number))


async def said(mesh: Mesh, text: str, times: int) -> None:
    """Both agents said it so often."""
    for node in mesh.world.nodes:
        log = mesh.log(node.name)
        await mesh.until(
            f"{text!r} from {node.name}",
            lambda log=log: log.read_text().count(text) >= times,  # type: ignore[misc]
            node.name,
        )


async def renewed(mesh: Mesh) -> None:
    """Every certificate is another one than now."""
    before = await serials(mesh)

    async def none_left() -> bool:
        return not before & await serials(mesh)

    await mesh.until("every certificate renewed", none_left)


async def serials(mesh: Mesh) -> set[str]:
    held = [await mesh.admin(node, "certificates") for node in mesh.world.nodes]
    return {entry["serial"] for entries in held for entry in entries}


async def test_a_root_rotates_under_traffic_and_drops_nothing(
    world: World, capture: str, tmp_path: Path
) -> None:
    mesh = Mesh(world, tmp_path, tmp_path / "run", agent_options=(f"--capture={capture}",))
    mesh.prepare()
    try:
        shop = build(mesh)
        await serve_http(mesh, shop.api)
        await serve_echo(mesh, shop.db)
        mesh.agent_options = ("--log-filter=info", "--trust-overlap=6s")
        mesh.agent_options += await start_authority(mesh)
        await mesh.start()
        host = shop.db.sandbox.ipv4
        async with (
            Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load,
            AsyncExitStack() as open_until_the_end,
        ):
            await progress(load, 10)
            first = await open_until_the_end.enter_async_context(
                Conversation(shop.web, host, ECHO_PORT)
            )
            await step(mesh, 1)
            await said(mesh, "roots rotate", 1)
            await progress(load, 10)
            await step(mesh, 2)
            await renewed(mesh)
            await progress(load, 10)
            assert await first.echo("proved by the old root, and still here")
            second = await open_until_the_end.enter_async_context(
                Conversation(shop.web, host, ECHO_PORT)
            )
            await step(mesh, 3)
            await said(mesh, "roots rotate", 2)
            await progress(load, 10)
            await said(mesh, "old roots end", 1)
            assert await first.ended(15), "what the old root proved ends with it"
            assert await second.echo("proved by the new root")
            await progress(load, 10)
            assert load.failures == []
    finally:
        world.down()
        for process in mesh.processes.values():
            await process.wait()
