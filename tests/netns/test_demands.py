"""What a namespace demands beyond policies, set in the agent's configuration file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo.clients import refused
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import Mesh, access_lines
from agent.cli.demo.netns import inside
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE, serve_echo
from agent.cli.demo.story import greets
from tests.netns.test_traffic import metrics
from tests.support.meshes import mesh_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import Node, World

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEMANDS = f"namespaces: {{{NAMESPACE}: {{registryOnly: on, waypointRequired: dry-run}}}}\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    async with mesh_of(Mesh, world, capture, folder, settings=DEMANDS) as made:
        yield made


def counted(node: Node, metric: str, outcome: str) -> float:
    text = inside(node.namespace, lambda: metrics("127.0.0.1", 15020))
    wanted = f'{metric}{{outcome="{outcome}"}} '
    return sum(
        float(line.removeprefix(wanted)) for line in text.splitlines() if line.startswith(wanted)
    )


async def test_registry_only_refuses_whom_the_control_plane_does_not_know(
    mesh: Mesh, shop: Shop
) -> None:
    one, two = mesh.world.nodes
    stranger = Pod(mesh.world.add_pod(two, "stranger"), "elsewhere", "stranger", ambient=False)
    await serve_echo(mesh, stranger)

    async def answers_those_outside() -> bool:
        return await greets(shop.legacy, stranger)

    await mesh.until("the stranger", answers_those_outside)
    assert await refused(shop.web, stranger.sandbox.ipv4, ECHO_PORT)
    assert await greets(shop.web, shop.db), "known destinations are as before"
    assert counted(one, "underpass_registry_only_total", "refused") == 1
    needles = (f"{stranger.sandbox.ipv4}:{ECHO_PORT}", "registryOnly", "ServiceEntry")
    await mesh.until(
        "the refusal in the log", lambda: bool(access_lines(mesh.log(one.name), *needles))
    )


async def test_waypoint_required_in_dry_run_counts_and_lets_pass(mesh: Mesh, shop: Shop) -> None:
    two = mesh.world.nodes[1]
    before = counted(two, "underpass_waypoint_required_total", "would_refuse")
    assert await greets(shop.batch, shop.db)
    after = counted(two, "underpass_waypoint_required_total", "would_refuse")
    assert after == before + 1
    needles = ("dry run", "waypointRequired", "would refuse", shop.db.sandbox.ipv4)
    await mesh.until(
        "the dry run in the log", lambda: bool(access_lines(mesh.log(two.name), *needles))
    )
