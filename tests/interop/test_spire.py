"""Certificates of a real SPIRE agent.

Runs only when UNDERPASS_SPIRE names a folder with spire-server and spire-agent (design section 9);
tests/netns/test_spire.py shows the same with a fake.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo.clients import Load
from agent.cli.demo.mesh import Mesh, access_lines
from agent.cli.demo.shop import HTTP_PORT, Shop, build, serve_echo, serve_http
from agent.cli.demo.story import greets, progress, spiffe
from tests.support.meshes import mesh_of
from tests.support.operator import ask
from tests.support.rotation import renewed, said
from tests.support.spire_real import DELEGATE, RealSpire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.cli.demo.world import World

BINARIES = os.environ.get("UNDERPASS_SPIRE", "")

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not BINARIES, reason="UNDERPASS_SPIRE names no folder"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    folder = tmp_path_factory.mktemp("real")
    async with mesh_of(Mesh, world, capture, folder, "--trust-overlap=6s") as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def spire(mesh: Mesh) -> RealSpire:
    made = RealSpire(Path(BINARIES), mesh, mesh.folder / "spire")
    await made.start()
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(mesh: Mesh, spire: RealSpire) -> Shop:
    """Our agents are no delegates yet, and only then have their pods entries."""
    made = build(mesh)
    await serve_http(mesh, made.api)
    await serve_echo(mesh, made.db)
    told = f"--ca-spire-socket={spire.socket}"
    mesh.agent_options = (*mesh.agent_options, told)
    await mesh.start()
    return made


async def test_who_is_no_delegate_is_told_and_served_once_it_is_one(
    mesh: Mesh, shop: Shop, spire: RealSpire
) -> None:
    node = shop.web.sandbox.node
    await said(mesh, "PERMISSION_DENIED", 1)
    screen = await ask(mesh.run_dir, node.name, "status")
    assert screen.tells(f"SPIRE agent at {spire.socket}: PERMISSION_DENIED")
    assert screen.tells("authorized_delegates")
    await spire.register(DELEGATE, "unix:uid:0")
    for pod in {(one.namespace, one.service_account): one for one in mesh.pods}.values():
        selectors = (f"k8s:ns:{pod.namespace}", f"k8s:sa:{pod.service_account}")
        await spire.register(spiffe(pod), *selectors)

    async def well() -> bool:
        found = [await mesh.admin(node, "status") for node in mesh.world.nodes]
        return not any(status["problems"] for status in found)

    await mesh.until("certificates for all", well)
    assert await greets(shop.web, shop.db)
    needles = (f'src.identity="{spiffe(shop.web)}"', f'dst.identity="{spiffe(shop.db)}"')
    for node in mesh.world.nodes:
        log = mesh.log(node.name)
        await mesh.until("access line", lambda log=log: bool(access_lines(log, *needles)))  # type: ignore[misc]


async def test_certificates_and_authorities_change_under_traffic(
    mesh: Mesh, shop: Shop, spire: RealSpire
) -> None:
    async with Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load:
        await renewed(mesh)
        await progress(load, 10)
        old = _authority(await spire.authority("show"))
        new = _authority(await spire.authority("prepare"))
        await said(mesh, "roots rotate", 1)
        await spire.authority("activate", "-authorityID", new)
        await renewed(mesh)
        await progress(load, 10)
        await spire.authority("taint", "-authorityID", old)
        await spire.authority("revoke", "-authorityID", old)
        await said(mesh, "roots rotate", 2)
        await said(mesh, "old roots end", 1)
        await progress(load, 10)
        assert load.failures == []


async def test_the_agent_of_spire_may_die_and_come_back(
    mesh: Mesh, shop: Shop, spire: RealSpire
) -> None:
    async with Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load:
        await renewed(mesh)
        await mesh.kill("spire-agent")
        await said(mesh, "nobody answers", 1)
        await progress(load, 10)
        await spire.start_agent()
        await said(mesh, "SPIRE agent is back", 2)
        await renewed(mesh)
        await progress(load, 10)
        assert load.failures == []


def _authority(said: str) -> str:
    """The first that is named: the active one, or the one just prepared."""
    found = re.search(r"Authority ID: (\w+)", said)
    assert found is not None, said
    return found[1]
