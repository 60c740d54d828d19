"""A pod that leaves the mesh alive: what it has open goes on, what comes is plain at once, and at
the end nothing of ours is in it."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import aiohttp
import pytest
import pytest_asyncio

from agent.cli.demo.clients import Conversation, http_get, refused
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import Mesh, access_lines
from agent.cli.demo.netns import connect
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT, NAMESPACE, Shop, serve_echo, serve_http
from agent.cli.demo.story import answers, greets
from agent.cli.demo.wiretap import Wiretap
from tests.netns.test_lifecycle import dataplane_pid, rules_of, run_in
from tests.support.meshes import mesh_of
from tests.support.operator import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.cli.demo.world import World

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Long enough for what happens before it on a loaded machine; one test waits for it.
DEADLINE = 10


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    deadline = f"--dataplane-drain-deadline={DEADLINE}s"
    async with mesh_of(Mesh, world, capture, folder, deadline) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(mesh: Mesh, shop: Shop) -> Pod:
    """On the second node, with both servers. `legacy`, outside the mesh, has an echo, too."""
    pod = Pod(mesh.world.add_pod(mesh.world.nodes[1], "guest"), NAMESPACE, "guest")
    await serve_echo(mesh, pod)
    await serve_http(mesh, pod)
    await serve_echo(mesh, shop.legacy)
    mesh.add(pod)
    for server in (pod, shop.legacy, shop.cart, shop.db):
        await mesh.until("it answers", partial(greets, shop.legacy, server), server.name)
    await mesh.until("it answers", lambda: answers(shop.legacy, pod), pod.name)
    return pod


class Browser:
    """One HTTP connection, kept open."""

    def __init__(self, pod: Pod, host: str) -> None:
        self._pod, self._host = pod, host

    async def __aenter__(self) -> Browser:
        self._streams = await connect(self._pod.sandbox.namespace, self._host, HTTP_PORT)
        assert await self.get()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._streams[1].close()

    async def get(self) -> bool:
        reader, writer = self._streams
        writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        try:
            async with asyncio.timeout(10):
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split()[0])
                return (
                    head.startswith(b"HTTP/1.1 200")
                    and len(await reader.readexactly(length)) == length
                )
        except (OSError, EOFError, TimeoutError):
            return False


class Open:
    """Connections of every kind that a pod may have: in and out, through HBONE and in clear, TCP
    and HTTP, both families."""

    def __init__(self, shop: Shop, guest: Pod) -> None:
        self._stack = AsyncExitStack()
        self._talks = {
            f"{client.name} to {server.name} at {host}": Conversation(client, host, ECHO_PORT)
            for client, server in (
                (shop.web, guest),
                (shop.legacy, guest),
                (guest, shop.cart),
                (guest, shop.legacy),
            )
            for host in (server.sandbox.ipv4, server.sandbox.ipv6)
        }
        self._browsers = {
            f"{client.name} to {server.name} at {host}": Browser(client, host)
            for client, server in ((shop.web, guest), (shop.legacy, guest), (guest, shop.api))
            for host in (server.sandbox.ipv4, server.sandbox.ipv6)
        }

    async def __aenter__(self) -> Open:
        for talk in self._talks.values():
            await self._stack.enter_async_context(talk)
        for browser in self._browsers.values():
            await self._stack.enter_async_context(browser)
        assert await self.broken() == []
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def broken(self, text: str = "still there") -> list[str]:
        """Those that don't work any more."""
        talks = {what: await talk.echo(text, timeout=5) for what, talk in self._talks.items()}
        pages = {what: await browser.get() for what, browser in self._browsers.items()}
        return [what for what, works in (*talks.items(), *pages.items()) if not works]

    async def ended(self, seconds: float) -> bool:
        async with asyncio.timeout(seconds):
            ends = [talk.ended(seconds) for talk in self._talks.values()]
            return all(await asyncio.gather(*ends))


async def stays(mesh: Mesh, pod: Pod, *states: str) -> bool:
    """The node's agent has it in one of the states."""
    found = [p["state"] for p in await mesh.admin(pod.sandbox.node, "pods") if p["uid"] == pod.uid]
    return found in [[state] for state in states]


async def join(mesh: Mesh, shop: Shop, pod: Pod) -> None:
    if pod not in mesh.pods:
        mesh.pods = [p for p in mesh.pods if p.uid != pod.uid]
        mesh.add(pod)
    await mesh.settled()
    await mesh.until("it answers over HBONE", partial(tunnelled, mesh, shop, pod))


async def tunnelled(mesh: Mesh, shop: Shop, pod: Pod) -> bool:
    """The other node takes it for a member of the mesh, and reaches it."""
    async with Conversation(shop.web, pod.sandbox.ipv4, ECHO_PORT) as talk:
        rows = await mesh.admin(shop.web.sandbox.node, "connections")
        mine = [r for r in rows if r["dst_workload"] == pod.name]
        return bool(talk.greeting) and any(row["protocol"] == "HBONE" for row in mine)


async def leave(mesh: Mesh, pod: Pod) -> Pod:
    """As by a label: it lives on outside the mesh, and all know."""
    outside = replace(pod, ambient=False)
    mesh.pods[mesh.pods.index(pod)] = outside
    mesh.write_manifest(outside)
    mesh.write_pods(pod.sandbox.node)
    await mesh.until("it drains", lambda: stays(mesh, pod, "draining"), pod.sandbox.node.name)
    return outside


async def clean(mesh: Mesh, pod: Pod, *, seconds: float = 60) -> None:
    """Nothing of ours is left in its namespace."""

    def gone() -> bool:
        return rules_of(pod.sandbox.namespace) == ""

    await mesh.until("no residue", gone, pod.sandbox.node.name, seconds=seconds)
    await mesh.settled()
    listeners = run_in(pod.sandbox.namespace, "ss", "-Htln")
    assert not any(f":{port} " in listeners for port in (15001, 15006, 15008, 15053)), listeners


async def test_open_connections_outlive_leaving_and_new_ones_are_plain(
    mesh: Mesh, shop: Shop, guest: Pod, capture: str
) -> None:
    await join(mesh, shop, guest)
    node = guest.sandbox.node
    hosts = guest.sandbox.ipv4, guest.sandbox.ipv6
    async with Open(shop, guest) as connections:
        left_at = asyncio.get_running_loop().time()
        await leave(mesh, guest)
        if capture == "nftables":
            rules = rules_of(guest.sandbox.namespace)
            assert "nat hook output" in rules
            assert "redirect to" not in rules
        logged = len(access_lines(mesh.log(node.name), "guest"))

        with Wiretap(node.namespace, "wire", b"of-the-mesh") as tap:
            assert await connections.broken("of-the-mesh") == []
        # In clear only what always was: both ways, both families, to and from outside the mesh.
        assert tap.ports[ECHO_PORT] > 0
        in_clear = tap.sightings
        assert in_clear == 8

        with Wiretap(node.namespace, "wire", b"/of-all-the-world") as tap:
            for host in hosts:
                body = await http_get(shop.legacy, host, HTTP_PORT, "/of-all-the-world")
                assert f"sees {shop.legacy.sandbox.ipv4}" in body or (
                    f"sees {shop.legacy.sandbox.ipv6}" in body
                )
        assert tap.sightings > 0
        for server in (shop.cart, shop.legacy):
            for host, mine in zip((server.sandbox.ipv4, server.sandbox.ipv6), hosts, strict=True):
                async with Conversation(guest, host, ECHO_PORT) as talk:
                    assert talk.greeting == f"{server.name} sees {mine}"

        async def plain() -> bool:
            rows = await mesh.admin(shop.web.sandbox.node, "workloads")
            return "TCP" in {row["protocol"] for row in rows if row["name"] == "guest"}

        await mesh.until("the other node knows", plain, shop.web.sandbox.node.name)
        for host in hosts:
            async with Conversation(shop.web, host, ECHO_PORT) as talk:
                assert talk.greeting.startswith("guest sees")
                assert await talk.echo("plain")
        assert len(access_lines(mesh.log(node.name), "guest")) == logged
        assert await connections.broken() == []
        assert asyncio.get_running_loop().time() < left_at + DEADLINE
        assert await stays(mesh, guest, "draining")
    # They ended by themselves, all of them are told, and nobody waits for the deadline.
    await clean(mesh, guest, seconds=left_at + DEADLINE - asyncio.get_running_loop().time())
    assert len(access_lines(mesh.log(node.name), "guest")) > logged
    assert await greets(shop.web, guest)


async def test_peers_take_their_tunnels_for_ended_before_they_are_cut(
    mesh: Mesh, shop: Shop, guest: Pod
) -> None:
    await join(mesh, shop, guest)
    async with Conversation(shop.web, guest.sandbox.ipv4, ECHO_PORT) as talk:
        # The control plane isn't told: peers still come by HBONE, and nobody listens for it.
        mesh.pods.remove(guest)
        mesh.write_pods(guest.sandbox.node)
        await mesh.until("it drains", lambda: stays(mesh, guest, "draining"))
        assert await refused(shop.web, guest.sandbox.ipv4, ECHO_PORT)
        assert await talk.echo("the old tunnel carries what it carried")
    await clean(mesh, guest)


async def test_what_is_open_at_the_deadline_is_cut_and_nothing_stays(
    mesh: Mesh, shop: Shop, guest: Pod
) -> None:
    await join(mesh, shop, guest)
    async with Open(shop, guest) as connections:
        outside = await leave(mesh, guest)
        assert await connections.broken() == []
        assert await connections.ended(DEADLINE + 10)
        await clean(mesh, guest)
    assert await greets(shop.legacy, outside)


async def test_pod_that_comes_back_while_it_drains_loses_nothing(
    mesh: Mesh, shop: Shop, guest: Pod, capture: str
) -> None:
    await join(mesh, shop, guest)
    node = guest.sandbox.node
    async with Open(shop, guest) as connections:
        left_at = asyncio.get_running_loop().time()
        await leave(mesh, guest)
        await join(mesh, shop, guest)
        if capture == "nftables":
            assert "redirect to" in rules_of(guest.sandbox.namespace)
        assert await connections.broken() == []
        with Wiretap(guest.sandbox.node.namespace, "wire", b"anew-77") as tap:
            async with Conversation(guest, shop.cart.sandbox.ipv6, ECHO_PORT) as talk:
                assert await talk.echo("anew-77")
        assert tap.sightings == 0
        # Nor at the deadline that they had when it left.
        await asyncio.sleep(left_at + DEADLINE + 1 - asyncio.get_running_loop().time())
        assert await connections.broken() == []
        [row] = [p for p in await mesh.admin(node, "pods") if p["uid"] == guest.uid]
        assert (row["inbound_connections"], row["outbound_connections"]) == (8, 6)
        await leave(mesh, guest)
        assert await connections.ended(DEADLINE + 10)
    await clean(mesh, guest)


async def test_agent_that_starts_in_the_middle_lets_them_end(
    mesh: Mesh, shop: Shop, guest: Pod, capture: str
) -> None:
    await join(mesh, shop, guest)
    node = guest.sandbox.node
    async with Open(shop, guest) as connections:
        await leave(mesh, guest)
        await mesh.kill(node.name)
        await mesh.start_agent(node)

        async def new_agent() -> bool:
            with suppress(aiohttp.ClientError, OSError):
                return await stays(mesh, guest, "draining")
            return False

        await mesh.until("the new agent", new_agent, node.name)
        assert await connections.broken() == []
        if capture == "nftables":
            assert "nat hook output" in rules_of(guest.sandbox.namespace)
        left = asyncio.get_running_loop().time()
    await clean(mesh, guest)
    # By the word of the data plane, not by the deadline noted.
    assert asyncio.get_running_loop().time() < left + DEADLINE / 2


async def test_data_plane_that_dies_in_the_middle_leaves_nothing(
    mesh: Mesh, shop: Shop, guest: Pod
) -> None:
    await join(mesh, shop, guest)
    async with Open(shop, guest) as connections:
        await leave(mesh, guest)
        os.kill(await dataplane_pid(mesh, guest.sandbox.node), signal.SIGKILL)
        assert await connections.ended(10)
        await clean(mesh, guest)


async def test_uninstall_finds_what_drained(mesh: Mesh, shop: Shop, guest: Pod) -> None:
    await join(mesh, shop, guest)
    node = guest.sandbox.node
    async with Open(shop, guest):
        await leave(mesh, guest)
        dataplane = await dataplane_pid(mesh, node)
        await mesh.kill(node.name)
        os.kill(dataplane, signal.SIGKILL)
        assert rules_of(guest.sandbox.namespace)
        said = await ask(mesh.run_dir, node.name, "uninstall", "--yes", "--force")
        assert said.code == 0, said.text
        assert said.tells(f"capture of {NAMESPACE}/guest")
        assert rules_of(guest.sandbox.namespace) == ""
