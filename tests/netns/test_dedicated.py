"""Dedicated mode: the agent lives in the network namespace of its one workload, as on a virtual
machine, and is told so by upstream's environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo.clients import FAILURES, Conversation
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import UNDERPASS, access_lines
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE, build, serve_echo
from agent.cli.demo.story import spiffe
from tests.support.zds_node import ZdsNode

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(mesh: Mesh) -> Shop:
    made = build(mesh)
    await serve_echo(mesh, made.db)
    await mesh.start_control_plane()
    await mesh.start_agent(mesh.world.nodes[1])
    await mesh.settled(mesh.world.nodes[1])
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(mesh: Mesh, shop: Shop) -> Pod:
    node = mesh.world.nodes[0]
    made = Pod(mesh.world.add_pod(node, "machine"), NAMESPACE, "machine")
    mesh.pods.append(made)
    mesh.write_manifest(made)
    await serve_echo(mesh, made)
    place = ZdsNode(mesh, node)
    environment = await place.environment() | {
        "PROXY_MODE": "dedicated",
        "PROXY_WORKLOAD_INFO": f"{made.namespace}/{made.name}/{made.service_account}",
        "UNDERPASS_RUN_DIR": str(mesh.run_dir),
    }
    pairs = [f"{key}={value}" for key, value in environment.items()]
    await mesh.spawn(node.name, ["env", *pairs, *UNDERPASS, "agent"], made.sandbox.namespace)

    async def served() -> bool:
        try:
            (row,) = await mesh.admin(node, "pods")
        except FAILURES:
            return False
        return bool(row["state"] == "served" and row["identity"] == spiffe(made))

    await mesh.until("the machine to be served", served, node.name)

    async def known() -> bool:
        rows = await mesh.admin(mesh.world.nodes[1], "workloads")
        return any(row["name"] == made.name for row in rows)

    await mesh.until("the other node to know of it", known, mesh.world.nodes[1].name)
    # Its traffic is redirected by somebody else, who knows the proxy by its mark.
    await place.redirect(made)
    await place.close()
    return made


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
async def test_machine_talks_hbone_in_both_directions(
    mesh: Mesh, shop: Shop, machine: Pod, family: str
) -> None:
    def at(pod: Pod) -> str:
        return pod.sandbox.ipv4 if family == "ipv4" else pod.sandbox.ipv6

    for client, server in ((machine, shop.db), (shop.db, machine)):
        async with Conversation(client, at(server), ECHO_PORT) as talk:
            assert talk.greeting == f"{server.name} sees {at(client)}"
            assert await talk.echo("ping")
            assert await talk.finish() == "bye\n"
    log = mesh.log(mesh.world.nodes[0].name)
    for direction, peer in (("outbound", "dst.identity"), ("inbound", "src.identity")):
        wanted = (f'direction="{direction}"', f'{peer}="{spiffe(shop.db)}"')
        await mesh.until(f"{direction} line", lambda w=wanted: bool(access_lines(log, *w)))  # type: ignore[misc]


async def test_machine_asks_for_no_identity_but_its_own(mesh: Mesh, machine: Pod) -> None:
    certificates = await mesh.admin(mesh.world.nodes[0], "certificates")
    assert [row["identity"] for row in certificates] == [spiffe(machine)]
