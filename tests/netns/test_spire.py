"""Two nodes whose certificates come from a SPIRE agent: HBONE by them, renewals and roots that
rotate under traffic, the SPIRE agent killed and back. The SPIRE agent is a fake (docs/trust.md)."""

from __future__ import annotations

import json
import signal
import sys
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo.clients import Conversation, Load
from agent.cli.demo.mesh import Mesh, access_lines
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT
from agent.cli.demo.story import greets, progress, spiffe
from tests.netns.test_secrets import KEYS, keys_in
from tests.support.meshes import mesh_of, stocked
from tests.support.operator import ask
from tests.support.rotation import renewed, rotates_and_drops_nothing, serials

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import World

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    folder = tmp_path_factory.mktemp("spire")
    async with mesh_of(Mesh, world, capture, folder, "--trust-overlap=6s") as made:
        told = f"--ca-spire-socket={socket_of(made)}"
        made.agent_options = (*made.agent_options, told)
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(mesh: Mesh) -> Shop:
    made = await stocked(mesh)
    await start_spire(mesh)
    await mesh.start()
    return made


def socket_of(mesh: Mesh) -> Path:
    return mesh.folder / "admin.sock"


async def start_spire(mesh: Mesh) -> None:
    stage = mesh.folder / "stage"
    arguments = ["-m", "tests.support.spire_server", str(socket_of(mesh)), str(mesh.folder)]
    await mesh.spawn("spire", [sys.executable, *arguments], mesh.world.nodes[0].namespace)
    await mesh.until("the SPIRE agent", stage.exists, "spire")


async def test_both_ends_are_known_by_their_svids(mesh: Mesh, shop: Shop) -> None:
    assert await greets(shop.web, shop.db)
    client, server = (pod.sandbox.node for pod in (shop.web, shop.db))
    assert client is not server
    needles = (f'src.identity="{spiffe(shop.web)}"', f'dst.identity="{spiffe(shop.db)}"')
    for node in (client, server):
        log = mesh.log(node.name)
        await mesh.until("access line", lambda log=log: bool(access_lines(log, *needles)))  # type: ignore[misc]
    for node in mesh.world.nodes:
        status = await mesh.admin(node, "status")
        assert status["problems"] == []
        assert status["certificates"]["available"] == status["certificates"]["total"] > 0


async def test_roots_and_certificates_change_under_traffic_and_nothing_is_dropped(
    mesh: Mesh, shop: Shop
) -> None:
    async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as open_before:
        await renewed(mesh)
        assert await open_before.echo("renewed, and still here")
    await rotates_and_drops_nothing(mesh, shop, "spire", mesh.folder / "stage")


async def test_spire_may_go_and_come_back_under_traffic(mesh: Mesh, shop: Shop) -> None:
    node = shop.web.sandbox.node
    async with Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load:
        await renewed(mesh)
        await mesh.kill("spire")

        async def told() -> bool:
            return bool((await mesh.admin(node, "status"))["problems"])

        await mesh.until("the problem in the status", told, node.name)
        screen = await ask(mesh.run_dir, node.name, "status")
        assert screen.tells("SPIRE supplies no certificates: the valid ones serve on")
        assert screen.tells(f"SPIRE agent at {socket_of(mesh)}: nobody answers")
        assert screen.tells("start the SPIRE agent with admin_socket_path")
        await progress(load, 10)
        assert await greets(shop.web, shop.db)
        await start_spire(mesh)

        async def well() -> bool:
            return not await told()

        await mesh.until("no problem any more", well, node.name)
        await renewed(mesh)
        await progress(load, 10)
        assert load.failures == []


async def test_an_agent_that_comes_back_is_supplied_without_a_loss(mesh: Mesh, shop: Shop) -> None:
    node = shop.web.sandbox.node
    host = shop.db.sandbox.ipv4
    async with (
        Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load,
        Conversation(shop.web, host, ECHO_PORT) as open_before,
    ):
        await progress(load, 5)
        await mesh.kill(node.name)
        await progress(load, 5)
        await mesh.start_agent(node)
        await mesh.settled(node)
        await renewed(mesh)
        assert await open_before.echo("still here")
        assert load.failures == []


async def test_of_many_keys_only_a_receive_buffers_last_are_in_the_agents_memory(
    mesh: Mesh, shop: Shop
) -> None:
    """Whatever our own code held is overwritten; gRPC's buffer of 8 KiB, which holds some fourteen
    answers, stays until it is full."""
    for _ in range(15):
        before = await serials(mesh)
        mesh.processes["spire"].send_signal(signal.SIGUSR2)
        await renewed(mesh, before)
    for node in mesh.world.nodes:
        log = mesh.log(node.name).read_text()
        assert log.count("certificate installed") > 40
        status = await mesh.admin(node, "status")
        # A buffer's fourteen, and what is just being received.
        assert len(keys_in(status["pid"])) <= 20


async def test_no_key_is_logged_or_shown(mesh: Mesh, shop: Shop) -> None:
    shown = b"".join(log.read_bytes() for log in mesh.folder.glob("*.log"))
    for node in mesh.world.nodes:
        for page in ("status", "certificates"):
            shown += json.dumps(await mesh.admin(node, page)).encode()
    assert b"certificate installed" in shown
    assert b"PRIVATE KEY" not in shown
    assert KEYS.search(shown) is None
