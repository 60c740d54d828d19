"""Pods deleted in the middle, a data plane without descriptors, IPv6 half switched off."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.clients import FAILURES, Conversation, Load, http_get, refused
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import access_lines
from agent.cli.demo.netns import inside
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT, NAMESPACE, serve_echo
from agent.cli.demo.story import greets, progress
from agent.cli.demo.wiretap import Wiretap
from tests.netns.test_lifecycle import dataplane_pid
from tests.support.operator import ask
from tests.support.vitals import Vitals, counted, descriptors

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_connections_of_a_deleted_pod_end_within_the_deadline_and_others_go_on(
    mesh: Mesh, shop: Shop
) -> None:
    node = shop.db.sandbox.node
    assert await greets(shop.web, shop.db)
    vitals = await Vitals.of(mesh, *mesh.world.nodes)
    pod = Pod(mesh.world.add_pod(node, "leaving"), NAMESPACE, "leaving")
    await serve_echo(mesh, pod)
    mesh.add(pod)
    await mesh.settled()
    await mesh.until("it answers", lambda: greets(shop.web, pod))
    async with (
        Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as beside,
        Conversation(shop.web, pod.sandbox.ipv4, ECHO_PORT) as towards,
    ):
        mesh.remove(pod)
        # The drain deadline is five seconds.
        assert await towards.ended(15)
        assert await beside.echo("another pod of the node")

        async def none_left() -> bool:
            rows = await mesh.admin(node, "connections")
            return pod.uid not in {row["pod_uid"] for row in rows}

        await mesh.until("none is left", none_left, node.name)
    await mesh.settled()
    mesh.world.remove_pod(pod.sandbox)
    await vitals.recovered(mesh)


async def test_sandbox_that_vanishes_under_its_connections_is_let_go(
    mesh: Mesh, shop: Shop
) -> None:
    """As a kubelet that tears the namespace down before anybody is told."""
    node = shop.db.sandbox.node
    assert await greets(shop.web, shop.db)
    vitals = await Vitals.of(mesh, *mesh.world.nodes)
    pod = Pod(mesh.world.add_pod(node, "torn"), NAMESPACE, "torn")
    await serve_echo(mesh, pod)
    mesh.add(pod)
    await mesh.settled()
    await mesh.until("it answers", lambda: greets(shop.web, pod))
    async with (
        Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as beside,
        Conversation(shop.web, pod.sandbox.ipv4, ECHO_PORT),
    ):
        mesh.world.remove_pod(pod.sandbox)

        async def told() -> bool:
            said = await ask(mesh.run_dir, node.name, "status")
            return said.code == 1 and said.tells(
                f"pod {NAMESPACE}/torn", "network namespace isn't there any more", "check `netns`"
            )

        await mesh.until("status tells that it is gone", told, node.name)
        assert await counted(node, "underpass_agent_pods", state="failed") == 1
        assert await beside.echo("another pod of the node")
        mesh.remove(pod)
        await mesh.settled()
    await vitals.recovered(mesh)


async def test_data_plane_out_of_descriptors_refuses_and_recovers(mesh: Mesh, shop: Shop) -> None:
    node = shop.db.sandbox.node
    host = shop.db.sandbox.ipv4
    assert await greets(shop.web, shop.db)
    assert await greets(shop.web, shop.cart)
    vitals = await Vitals.of(mesh, *mesh.world.nodes)
    pid = await dataplane_pid(mesh, node)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    async with (
        Conversation(shop.web, host, ECHO_PORT) as talk,
        Conversation(shop.web, shop.cart.sandbox.ipv4, ECHO_PORT) as beside,
    ):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors(pid) + 5, hard))
        held: list[Conversation] = []
        try:
            failed = 0
            for _ in range(20):
                one = Conversation(shop.web, host, ECHO_PORT)
                try:
                    await one.__aenter__()
                    held.append(one)
                    failed += not one.greeting
                except FAILURES:
                    failed += 1
            assert failed >= 10
            assert await talk.echo("what is open goes on")
            assert await beside.echo("and the other node")
            assert await greets(shop.batch, shop.cart)
            lines = access_lines(mesh.log(node.name), "Too many open files")
            assert lines, mesh.tail(node.name)
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
            for one in held:
                await one.__aexit__(None, None, None)
        assert await counted(node, "istio_tcp_connections_failed_total", reporter="destination") > 0
        assert await greets(shop.web, shop.db)
        assert await talk.echo("and on")
    await vitals.recovered(mesh)


def switch_off(namespace: str, interface: str) -> None:
    path = Path(f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6")
    inside(namespace, lambda: path.write_text("1"))


@pytest.mark.parametrize("interface", ["lo", "eth0"])
async def test_pod_with_half_of_ipv6_is_captured_and_never_talks_in_clear(
    mesh: Mesh, shop: Shop, interface: str
) -> None:
    node = shop.web.sandbox.node
    pod = Pod(mesh.world.add_pod(node, f"half-{interface}"), NAMESPACE, "half")
    switch_off(pod.sandbox.namespace, interface)
    await serve_echo(mesh, pod)
    mesh.add(pod)
    await mesh.settled()
    marker = f"marker-{interface}-6f"
    with Wiretap(node.namespace, "wire", marker.encode()) as tap:
        async with Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load:
            # IPv4 is whole, both ways.
            await mesh.until("it is served", lambda: greets(shop.web, pod))
            seen = await http_get(pod, shop.api.sandbox.ipv4, HTTP_PORT, f"/{marker}")
            assert seen.startswith(f"api sees {pod.sandbox.ipv4}")
            # IPv6 works through the mesh or not at all.
            with contextlib.suppress(*FAILURES):
                await http_get(pod, shop.api.sandbox.ipv6, HTTP_PORT, f"/{marker}", timeout=5)
            assert await refused(pod, shop.legacy.sandbox.ipv6, ECHO_PORT)
            await progress(load, 5)
        assert load.failures == []
    assert tap.sightings == 0
    problems = (await mesh.admin(node, "status"))["problems"]
    assert [problem for problem in problems if "half" in problem["what"]] == []
    mesh.remove(pod)
    await mesh.settled()
    mesh.world.remove_pod(pod.sandbox)
