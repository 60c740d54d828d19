"""Root in a pod ends the data plane's listeners there (`ss -K`): they come back, counted and
shown."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.clients import Conversation, http_get
from agent.cli.demo.netns import inside
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT
from agent.cli.demo.story import greets
from tests.netns.test_lifecycle import dataplane_pid, run_in
from tests.support.operator import rows
from tests.support.vitals import counted

if TYPE_CHECKING:
    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")

OUTBOUND, INBOUND, HBONE = 15001, 15006, 15008


def end_listener(pod: Pod, port: int) -> None:
    said = run_in(pod.sandbox.namespace, "ss", "-HKtln", "sport", "=", str(port))
    assert f":{port} " in said, "ss ended no listener"


def listens(pod: Pod, port: int) -> bool:
    return f":{port} " in run_in(pod.sandbox.namespace, "ss", "-Htln", "sport", "=", str(port))


async def lost(mesh: Mesh, pod: Pod) -> float:
    return await counted(pod.sandbox.node, "underpass_listeners_lost_total")


async def problem(mesh: Mesh, pod: Pod) -> str:
    found = await mesh.admin(pod.sandbox.node, "pods")
    return next(str(row["problem"]) for row in found if row["uid"] == pod.uid)


@pytest.mark.parametrize("port", [OUTBOUND, INBOUND, HBONE])
async def test_ended_listener_listens_again_and_is_counted_and_told(
    mesh: Mesh, shop: Shop, port: int
) -> None:
    # Through 15001 of web to 15008 of db, and from outside the mesh to 15006 of db.
    pod = shop.web if port == OUTBOUND else shop.db
    client = shop.legacy if port == INBOUND else shop.web
    assert await greets(client, shop.db)
    before = await lost(mesh, pod)
    async with Conversation(client, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        end_listener(pod, port)
        await mesh.until("it listens again", lambda: listens(pod, port), seconds=10)
        assert await talk.echo("what was accepted before goes on")
        for host in (shop.db.sandbox.ipv4, shop.db.sandbox.ipv6):
            async with Conversation(client, host, ECHO_PORT) as anew:
                assert anew.greeting
                assert await anew.echo("and what comes after is whole")
    assert await lost(mesh, pod) == before + 1

    node = pod.sandbox.node
    log = mesh.log(node.name)
    await mesh.until("the agent says so", lambda: f"port={port}" in log.read_text(), node.name)
    listed = await rows(mesh.run_dir, node.name, "pods")
    assert next(row["repairs"] for row in listed if row["uid"] == pod.uid) >= 1
    await mesh.settled()


async def test_listener_ended_again_and_again_costs_one_revival_a_second(
    mesh: Mesh, shop: Shop
) -> None:
    before, began = await lost(mesh, shop.db), asyncio.get_running_loop().time()
    for _ in range(30):
        run_in(shop.db.sandbox.namespace, "ss", "-HKtln", "sport", "=", str(HBONE))
        await asyncio.sleep(0.05)
    await mesh.until("it listens again", lambda: listens(shop.db, HBONE), seconds=10)
    took = asyncio.get_running_loop().time() - began
    assert 1 <= await lost(mesh, shop.db) - before <= took + 2
    await mesh.until("it answers", lambda: greets(shop.web, shop.db), seconds=10)
    await mesh.settled()


async def test_port_taken_by_the_pod_is_the_pods_problem_until_it_is_free(
    mesh: Mesh, shop: Shop
) -> None:
    pod = shop.db

    def take() -> socket.socket:
        made = socket.socket(socket.AF_INET6)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            end_listener(pod, INBOUND)
            made.bind(("::", INBOUND))
            made.listen()
        except BaseException:
            made.close()
            raise
        return made

    async def taken() -> socket.socket | None:
        try:
            return inside(pod.sandbox.namespace, take)
        except (OSError, AssertionError):
            # The data plane was faster.
            return None

    thief = None
    for _ in range(50):
        if (thief := await taken()) is not None:
            break
        await asyncio.sleep(0.1)
    assert thief is not None, "the data plane was always faster"
    with thief:

        async def shown() -> bool:
            return f"port {INBOUND}" in await problem(mesh, pod)

        await mesh.until("the problem is shown", shown, seconds=10)

    async def gone() -> bool:
        return not await problem(mesh, pod)

    await mesh.until("the problem is gone", gone, seconds=15)
    await mesh.settled()
    assert await greets(shop.legacy, pod)


async def test_successor_takes_over_listeners_that_came_back(mesh: Mesh, shop: Shop) -> None:
    node = shop.db.sandbox.node
    before = await dataplane_pid(mesh, node)
    end_listener(shop.db, HBONE)
    await mesh.until("it listens again", lambda: listens(shop.db, HBONE), seconds=10)
    mesh.processes[node.name].send_signal(1)

    async def replaced() -> bool:
        return await dataplane_pid(mesh, node) not in (0, before)

    await mesh.until("the successor", replaced, node.name)
    await mesh.settled()
    assert await http_get(shop.web, shop.api.sandbox.ipv4, HTTP_PORT)
    assert await greets(shop.web, shop.db)
