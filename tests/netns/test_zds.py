"""In upstream's place: started by its environment alone, for pods named over ZDS and redirected by
rules of somebody else."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

import aiohttp
import pytest
import pytest_asyncio

from agent.cli.demo.clients import Conversation, http_get, refused
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import access_lines
from agent.cli.demo.netns import inside, open_socket
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT, NAMESPACE
from agent.cli.demo.story import spiffe
from tests.support.zds_node import ZdsNode, first_node, shop_beside

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(mesh: Mesh) -> Shop:
    return await shop_beside(mesh)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(mesh: Mesh, shop: Shop) -> AsyncIterator[ZdsNode]:
    """The first node, served by ours."""
    async with first_node(mesh, shop, ZdsNode.start_ours) as made:
        await mesh.until("certificates", lambda: ready(made), made.node.name)
        yield made


async def local(
    node: ZdsNode, path: str, port: int = 15000, *, method: str = "GET"
) -> tuple[int, str]:
    """One of the agent's own addresses, asked from its host."""
    connector = aiohttp.TCPConnector(
        force_close=True,
        socket_factory=lambda info: open_socket(node.node.namespace, socket.AddressFamily(info[0])),
    )
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.request(method, f"http://127.0.0.1:{port}{path}") as answer,
    ):
        return answer.status, await answer.text()


async def ready(node: ZdsNode) -> bool:
    try:
        pods = await node.mesh.admin(node.node, "pods")
        return (await local(node, "/healthz/ready", 15021))[0] == 200 and all(
            pod["identity"] for pod in pods
        )
    except (aiohttp.ClientError, OSError):
        return False


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
async def test_pods_of_a_zds_server_talk_hbone_both_ways(
    mesh: Mesh, shop: Shop, node: ZdsNode, family: str
) -> None:
    def at(pod: Pod) -> str:
        return pod.sandbox.ipv4 if family == "ipv4" else pod.sandbox.ipv6

    answer = await http_get(shop.web, at(shop.api), HTTP_PORT, "/there")
    assert f"api sees {at(shop.web)} asking for /there" in answer
    async with Conversation(shop.db, at(shop.cart), ECHO_PORT) as talk:
        assert talk.greeting == f"cart sees {at(shop.db)}"
        assert await talk.echo("back")
        rows = await mesh.admin(node.node, "connections")
        inbound = [r for r in rows if r["direction"] == "inbound"]
        assert [(r["protocol"], r["src_identity"]) for r in inbound] == [("HBONE", spiffe(shop.db))]
    lines = access_lines(mesh.log(mesh.world.nodes[1].name), "inbound", spiffe(shop.web))
    assert lines, mesh.tail(mesh.world.nodes[1].name)


async def test_state_names_the_server_and_calls_nothing_wrong(mesh: Mesh, node: ZdsNode) -> None:
    status = await mesh.admin(node.node, "status")
    assert status["capture"]["mode"] == "external"
    assert status["pods"]["source"] == f"zds:{node.server.path}"
    assert status["problems"] == []
    assert {pod["state"] for pod in await mesh.admin(node.node, "pods")} == {"served"}


async def test_dump_on_the_loopback_is_upstreams_and_metrics_and_readiness_answer(
    shop: Shop, node: ZdsNode
) -> None:
    async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert talk.greeting
        code, text = await local(node, "/config_dump")
    assert code == 200
    dump = json.loads(text)
    assert dump["config"]["localNode"] == node.node.name
    assert dump["config"]["inpodUds"] == str(node.server.path)
    assert {w["name"] for w in dump["workloads"]} >= {"web", "db", "api"}
    assert {c["state"] for c in dump["certificates"]} == {"Available"}
    assert dump["stagedServices"] == {}
    state = dump["workloadState"][shop.web.uid]
    assert (state["state"], state["info"]["name"]) == ("Up", "web")
    (outbound,) = state["connections"]["outbound"]
    assert outbound["protocol"] == "HBONE"
    assert outbound["actualDst"].startswith(shop.db.sandbox.ipv4)
    assert (await local(node, "/healthz/ready", 15021)) == (200, "ready\n")
    assert "istio_tcp_connections_opened" in (await local(node, "/metrics", 15020))[1]


async def test_deleted_pod_is_cut_and_its_connections_with_it(
    mesh: Mesh, shop: Shop, node: ZdsNode
) -> None:
    batch = shop.batch
    async with Conversation(batch, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("before")
        assert await node.server.delete(batch.uid) == [""]
        assert await talk.ended(5)
    assert await refused(batch, shop.db.sandbox.ipv4, ECHO_PORT)
    assert await node.add(batch) == ""
    async with Conversation(batch, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("again")


async def test_pod_whose_ports_are_held_is_served_a_moment_after_they_are_free(
    mesh: Mesh, shop: Shop, node: ZdsNode
) -> None:
    late = Pod(mesh.world.add_pod(node.node, "late"), NAMESPACE, "late")
    mesh.pods.append(late)
    mesh.write_manifest(late)
    await node.redirect(late)
    holder = inside(late.sandbox.namespace, holding_15008)
    assert "15008" in await node.add(late)
    assert (await local(node, "/healthz/ready", 15021))[0] == 200
    (row,) = [pod for pod in await mesh.admin(node.node, "pods") if pod["name"] == "late"]
    assert row["state"] == "failed"
    assert "15008" in row["problem"]
    holder.close()

    async def served() -> bool:
        pods = await mesh.admin(node.node, "pods")
        return any(pod["name"] == "late" and pod["state"] == "served" for pod in pods)

    await mesh.until("late to be served", served, seconds=5)
    async with Conversation(late, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("here")
    assert not node.server.newest.closed


def holding_15008() -> socket.socket:
    held = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("::", 15008))
    held.listen()
    return held


async def test_pods_go_on_while_the_server_is_away_and_readiness_is_withdrawn(
    mesh: Mesh, shop: Shop, node: ZdsNode
) -> None:
    async def readiness() -> tuple[int, str]:
        return await local(node, "/healthz/ready", 15021)

    async def withdrawn() -> bool:
        return await readiness() == (500, "not ready, pending: pods\n")

    async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        await node.server.__aexit__(None, None, None)
        await mesh.until("readiness to be withdrawn", withdrawn, seconds=5)
        assert await talk.echo("old")
        async with Conversation(shop.db, shop.cart.sandbox.ipv4, ECHO_PORT) as other:
            assert await other.echo("new")
        (problem,) = (await mesh.admin(node.node, "status"))["problems"]
        assert str(node.server.path) in problem["why"]
        assert "CNI node agent" in problem["remedy"]
        await node.server.__aenter__()
        await node.served(shop.web, shop.cart, proxy=len(node.server.connections) + 1)
        assert await readiness() == (200, "ready\n")
        assert await talk.echo("still")


async def test_pods_are_served_again_after_the_data_planes_death(
    mesh: Mesh, shop: Shop, node: ZdsNode
) -> None:
    """Nobody but the agent holds their namespaces then."""
    before = (await mesh.admin(node.node, "status"))["dataplane"]["pid"]
    os.kill(before, signal.SIGKILL)

    async def back() -> bool:
        status = await mesh.admin(node.node, "status")
        pods = await mesh.admin(node.node, "pods")
        again = status["dataplane"]["pid"] not in (0, before)
        return again and all(pod["state"] == "served" and pod["identity"] for pod in pods)

    await mesh.until("the next data plane to serve", back, node.node.name, seconds=20)
    for client, server in ((shop.web, shop.db), (shop.db, shop.cart)):
        async with Conversation(client, server.sandbox.ipv4, ECHO_PORT) as talk:
            assert await talk.echo("again")


async def test_connections_live_through_the_agents_death_and_its_successor_takes_the_snapshot(
    mesh: Mesh, shop: Shop, node: ZdsNode
) -> None:
    async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        await mesh.kill(node.node.name)
        assert await talk.echo("nobody's agent")
        before = len(node.server.connections)
        for connection in node.server.connections:
            connection.close()
        await node.start_ours()
        client = await node.served(shop.web, shop.cart, proxy=before + 1)
        assert {error for _, error in client.acks} == {""}
        assert await talk.echo("a new agent's")
    async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("new")


async def test_pod_whose_namespace_the_server_lost_outlives_its_data_plane_too(
    mesh: Mesh, shop: Shop, node: ZdsNode
) -> None:
    await mesh.kill(node.node.name)
    before = len(node.server.connections)
    for connection in node.server.connections:
        connection.close()
    known = node.server.pods[shop.cart.uid]
    node.server.pods[shop.cart.uid] = replace(known, netns=None)
    await node.start_ours()
    client = await node.server.client(before + 1)
    assert (f"keep {shop.cart.uid}", "") in client.acks
    node.server.pods[shop.cart.uid] = known

    old = (await mesh.admin(node.node, "status"))["dataplane"]["pid"]
    os.kill(old, signal.SIGKILL)

    async def back() -> bool:
        status = await mesh.admin(node.node, "status")
        pods = {pod["name"]: pod for pod in await mesh.admin(node.node, "pods")}
        cart = pods.get("cart", {"state": "", "identity": ""})
        again = status["dataplane"]["pid"] not in (0, old)
        return bool(again and cart["state"] == "served" and cart["identity"])

    await mesh.until("the next data plane to serve it", back, node.node.name, seconds=20)
    async with Conversation(shop.db, shop.cart.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("again")


async def test_allowed_quit_ends_agent_and_data_plane_and_their_code_is_0(
    mesh: Mesh, shop: Shop, node: ZdsNode
) -> None:
    """The last one: nobody serves the node after it."""
    await mesh.kill(node.node.name, signal.SIGUSR2)
    before = len(node.server.connections)
    for connection in node.server.connections:
        connection.close()
    await node.start_ours(extra={"UNDERPASS_ADMIN_ALLOW_CHANGES": "true"})
    await node.served(shop.web, proxy=before + 1)
    assert not await refused(shop.web, shop.db.sandbox.ipv4, ECHO_PORT)
    assert await local(node, "/quitquitquit", method="POST") == (200, "shutdown now\n")
    async with asyncio.timeout(20):
        assert await mesh.processes[node.node.name].wait() == 0
    # Its rules are there, and nobody listens.
    assert await refused(shop.web, shop.db.sandbox.ipv4, ECHO_PORT)
