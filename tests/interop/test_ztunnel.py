"""HBONE with upstream's own node proxy at the other end, and in its place.

Runs only when a binary is given by UNDERPASS_ZTUNNEL (design section 9).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo import manifests
from agent.cli.demo.clients import FAILURES, Conversation, http_get, refused
from agent.cli.demo.mesh import access_lines
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT, NAMESPACE
from agent.cli.demo.story import spiffe
from tests.support.zds_node import ZdsNode, first_node, shop_beside

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

BINARY = os.environ.get("UNDERPASS_ZTUNNEL", "")
ZTUNNEL = "ztunnel"

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not BINARY, reason="UNDERPASS_ZTUNNEL names no binary"),
]

FAMILIES = pytest.mark.parametrize("family", ["ipv4", "ipv6"])


def at(pod: Pod, family: str = "ipv4") -> str:
    return pod.sandbox.ipv4 if family == "ipv4" else pod.sandbox.ipv6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(mesh: Mesh) -> Shop:
    return await shop_beside(mesh)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(mesh: Mesh, shop: Shop) -> AsyncIterator[ZdsNode]:
    """The first node is upstream's."""

    async def start(node: ZdsNode) -> None:
        await node.start_ztunnel(Path(BINARY), ZTUNNEL)

    async with first_node(mesh, shop, start) as made:
        # Its certificates come with its first connections.
        await mesh.until("the other node's pods", lambda: greets(shop.web, shop.db), ZTUNNEL)
        yield made


async def greets(pod: Pod, server: Pod) -> bool:
    try:
        async with Conversation(pod, at(server), ECHO_PORT) as talk:
            return bool(talk.greeting)
    except FAILURES:
        return False


@FAMILIES
async def test_their_client_reaches_our_server_over_hbone(
    mesh: Mesh, shop: Shop, node: ZdsNode, family: str
) -> None:
    answer = await http_get(shop.web, at(shop.api, family), HTTP_PORT, f"/to-us-{family}")
    assert f"api sees {at(shop.web, family)} asking for /to-us-{family}" in answer
    ours = mesh.world.nodes[1]
    async with Conversation(shop.web, at(shop.db, family), ECHO_PORT) as talk:
        assert await talk.echo("over the edge")
        rows = await mesh.admin(ours, "connections")
        inbound = [r for r in rows if r["direction"] == "inbound" and r["dst_workload"] == "db"]
        assert [(r["protocol"], r["src_identity"]) for r in inbound] == [
            ("HBONE", spiffe(shop.web))
        ]
        assert await talk.finish() == "bye\n"


@FAMILIES
async def test_our_client_reaches_their_server_over_hbone(
    mesh: Mesh, shop: Shop, node: ZdsNode, family: str
) -> None:
    async with Conversation(shop.db, at(shop.cart, family), ECHO_PORT) as talk:
        assert talk.greeting == f"cart sees {at(shop.db, family)}"
        assert await talk.echo("back")
        rows = await mesh.admin(mesh.world.nodes[1], "connections")
        outbound = [r for r in rows if r["direction"] == "outbound"]
        assert [(r["protocol"], r["dst_identity"]) for r in outbound] == [
            ("HBONE", spiffe(shop.cart))
        ]
        assert await talk.finish() == "bye\n"


async def test_access_logs_of_both_tell_the_same_identities(
    mesh: Mesh, shop: Shop, node: ZdsNode
) -> None:
    async with Conversation(shop.web, at(shop.db), ECHO_PORT) as talk:
        await talk.finish()
    ours = mesh.log(mesh.world.nodes[1].name)
    names = (spiffe(shop.web), spiffe(shop.db))
    for log, direction in ((mesh.log(ZTUNNEL), "outbound"), (ours, "inbound")):
        await mesh.until(
            f"{direction} in {log}",
            lambda log=log, direction=direction: bool(access_lines(log, direction, *names)),  # type: ignore[misc]
            seconds=10,
        )


async def test_deny_holds_at_both_ends(mesh: Mesh, shop: Shop, node: ZdsNode) -> None:
    def principal(pod: Pod) -> str:
        return spiffe(pod).removeprefix("spiffe://")

    mesh.apply(
        "deny",
        manifests.deny("to-us", NAMESPACE, app="db", principals=[principal(shop.web)]),
        manifests.deny("to-them", NAMESPACE, app="cart", principals=[principal(shop.db)]),
    )
    await mesh.until("ours to refuse", lambda: refused(shop.web, at(shop.db), ECHO_PORT))
    await mesh.until("theirs to refuse", lambda: refused(shop.db, at(shop.cart), ECHO_PORT))
    assert await greets(shop.batch, shop.db)
    mesh.withdraw("deny")
    await mesh.until("ours to accept", lambda: greets(shop.web, shop.db))
    await mesh.until("theirs to accept", lambda: greets(shop.db, shop.cart))


async def test_ours_takes_the_pods_over_when_theirs_ends(
    mesh: Mesh, shop: Shop, node: ZdsNode
) -> None:
    """The last one: the node is ours after it."""
    ports = {
        # In a cluster each proxy's pod has a namespace of its own for these.
        "UNDERPASS_ADMIN_ADDRESS": "off",
        "UNDERPASS_STATS_ADDRESS": "off",
        "UNDERPASS_READY_ADDRESS": "off",
    }
    await node.start_ours(extra=ports)
    client = await node.server.client(2)
    held = {what: error for what, error in client.acks if what.startswith("add")}
    assert len(held) == 3
    assert all("another proxy" in error for error in held.values()), held
    # Theirs serves on meanwhile.
    assert await greets(shop.web, shop.db)
    await mesh.kill(ZTUNNEL, signal.SIGTERM)
    await mesh.until("ours to serve", lambda: served(mesh, node, 3), node.node.name, seconds=20)
    await mesh.until("our outbound", lambda: greets(shop.web, shop.db), node.node.name)
    await mesh.until("our inbound", lambda: greets(shop.db, shop.cart), node.node.name)
    log = mesh.log(node.node.name)
    wanted = ("inbound", spiffe(shop.db), spiffe(shop.cart))
    await mesh.until("our line", lambda: bool(access_lines(log, *wanted)), node.node.name)
    assert not client.closed


async def served(mesh: Mesh, node: ZdsNode, count: int) -> bool:
    pods = await mesh.admin(node.node, "pods")
    return [pod["state"] for pod in pods] == ["served"] * count
