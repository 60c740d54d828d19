"""The agent's own workload: its metrics are reached over HBONE, as policies allow."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp
import pytest
import pytest_asyncio

from agent.cli.demo import manifests
from agent.cli.demo.clients import FAILURES, http_get
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import access_lines
from agent.cli.demo.netns import inside
from agent.cli.demo.shop import NAMESPACE, build
from agent.cli.demo.story import spiffe
from agent.cli.demo.wiretap import Wiretap
from agent.cli.demo.world import PodSandbox
from tests.netns.test_traffic import metrics

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")
STATS = 15020


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(mesh: Mesh) -> Shop:
    made = build(mesh)
    await mesh.start_control_plane()
    await mesh.start_agent(mesh.world.nodes[0])
    await mesh.settled(mesh.world.nodes[0])
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def own(mesh: Mesh, shop: Shop) -> Pod:
    """The second node's agent as a pod; its sandbox is the node."""
    one, two = mesh.world.nodes
    sandbox = PodSandbox("agent-two", two.namespace, two.ipv4, two.ipv6, "", two)
    made = Pod(sandbox, NAMESPACE, "agent-sa")
    mesh.write_manifest(made)
    mesh.agent_options = (
        *mesh.agent_options,
        "--stats-hbone=true",
        f"--pod-name={made.name}",
        f"--pod-namespace={made.namespace}",
        f"--pod-service-account={made.service_account}",
    )
    await mesh.start_agent(two)

    async def served() -> bool:
        try:
            rows = {row["name"]: row for row in await mesh.admin(two, "pods")}
        except FAILURES:
            return False
        # The pods of the list are captured beside it; the node itself is not.
        row, others = rows.pop(made.name, {}), rows.values()
        mine = (row.get("state"), row.get("identity"), row.get("captured"))
        return mine == ("served", spiffe(made), False) and all(o["verified"] for o in others)

    await mesh.until("the agent's own workload to be served", served, two.name)

    async def known() -> bool:
        return any(row["name"] == made.name for row in await mesh.admin(one, "workloads"))

    await mesh.until("the other node to know of it", known, one.name)
    return made


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
async def test_metrics_are_scraped_over_hbone(
    mesh: Mesh, shop: Shop, own: Pod, family: str
) -> None:
    two = mesh.world.nodes[1]
    address = two.ipv4 if family == "ipv4" else two.ipv6
    with Wiretap(mesh.world.nodes[0].namespace, "wire", b"istio_build") as tap:
        text = await http_get(shop.web, address, STATS, "/metrics")
    assert "istio_build{" in text
    assert text.endswith("# EOF\n")
    assert (tap.sightings, STATS in tap.ports) == (0, False), "never in clear"
    wanted = (
        'direction="inbound"',
        f'src.identity="{spiffe(shop.web)}"',
        f'dst.identity="{spiffe(own)}"',
    )
    log = mesh.log(two.name)
    await mesh.until("its line", lambda: bool(access_lines(log, *wanted)), two.name)


async def test_nothing_but_metrics_is_reached_over_it(mesh: Mesh, shop: Shop, own: Pod) -> None:
    two = mesh.world.nodes[1]
    # Open to whoever dials it without the mesh, yet no way into the node from inside the mesh.
    async with asyncio.timeout(20):
        with pytest.raises((aiohttp.ClientError, OSError)):
            await http_get(shop.web, two.ipv4, 15021, "/healthz/ready")
    log = mesh.log(two.name)
    why = "port 15021 of the agent's own workload isn't served"
    await mesh.until("its line", lambda: bool(access_lines(log, why)), two.name)


async def test_policies_protect_the_metrics(mesh: Mesh, shop: Shop, own: Pod) -> None:
    two = mesh.world.nodes[1]
    principal = spiffe(shop.web).removeprefix("spiffe://")
    mesh.apply("deny", manifests.deny("no-scrape", NAMESPACE, app=own.name, principals=[principal]))

    async def denied() -> bool:
        try:
            await http_get(shop.web, two.ipv4, STATS, "/metrics")
        except FAILURES:
            return True
        return False

    await mesh.until("the policy", denied, two.name)
    assert await http_get(shop.batch, two.ipv4, STATS, "/metrics"), "others aren't meant"
    mesh.withdraw("deny")


async def test_node_without_capture_of_its_own_stays_as_it_was(mesh: Mesh, own: Pod) -> None:
    two = mesh.world.nodes[1]
    text = inside(two.namespace, lambda: metrics("127.0.0.1", STATS))
    assert "workload_manager_pending_proxy_count 0.0" in text
    bypass = await mesh.admin(two, "bypass")
    assert [row for row in bypass if row["pod"].endswith(own.name)] == []
