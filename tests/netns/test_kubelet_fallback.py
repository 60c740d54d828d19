"""Probes that the node's address alone tells, where that was asked for: declared ports of STRICT
pods are reached through the data plane, which says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo.mesh import Mesh, access_lines
from agent.cli.demo.shop import ECHO_PORT
from tests.support.meshes import mesh_of
from tests.support.probed import FAMILIES, UNDECLARED_PORT, dial, probed_pod

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.world import World

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    async with mesh_of(Mesh, world, capture, folder, "--kubelet-probe-fallback=on") as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def probed(mesh: Mesh) -> Pod:
    return await probed_pod(mesh)


@FAMILIES
async def test_the_nodes_address_reaches_declared_ports_and_is_told(
    mesh: Mesh, probed: Pod, family: str
) -> None:
    node = mesh.world.nodes[0]
    said = await dial(node, probed, ECHO_PORT, family)
    address, port = said.facts["local"]
    assert said.greeting == f"probed sees {address}"
    log, client = mesh.log(node.name), f"{address}:{port}"
    if family == "ipv6":
        client = f"[{address}]:{port}"

    def told() -> bool:
        return any("kubelet_probe" in line for line in access_lines(log, client))

    await mesh.until("the probe in the access log", told, node.name)
    said = await dial(node, probed, UNDECLARED_PORT, family)
    assert not said.greeting
    assert said.error


@FAMILIES
async def test_another_nodes_address_reaches_nothing(mesh: Mesh, probed: Pod, family: str) -> None:
    said = await dial(mesh.world.nodes[1], probed, ECHO_PORT, family)
    assert not said.greeting
    assert said.error
