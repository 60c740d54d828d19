"""Processes killed in the middle of traffic, two agents at once, a control plane that comes back
with other content: what is told and counted, and who doesn't notice."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo import manifests
from agent.cli.demo.clients import Conversation, Load, refused
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT, NAMESPACE
from agent.cli.demo.story import greets, progress
from agent.cli.demo.wiretap import Wiretap
from agent.cli.demo.world import BPF_FOLDER
from tests.netns.test_lifecycle import dataplane_pid
from tests.support.older_maps import lay_out, layout
from tests.support.operator import ask
from tests.support.vitals import Vitals, counted

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_time_without_a_data_plane_is_measured_and_told(mesh: Mesh, shop: Shop) -> None:
    node = shop.db.sandbox.node
    for client, server in ((shop.web, shop.db), (shop.web, shop.cart), (shop.batch, shop.cart)):
        # Tunnels are kept for the next connection.
        assert await greets(client, server)
    vitals = await Vitals.of(mesh, *mesh.world.nodes)
    losses = await counted(node, "underpass_agent_dataplane_losses_total")
    told_before = (await mesh.admin(node, "status"))["dataplane"]["seconds_without_service"]
    async with Conversation(shop.web, shop.cart.sandbox.ipv4, ECHO_PORT) as beside:
        killed = time.monotonic()
        os.kill(await dataplane_pid(mesh, node), signal.SIGKILL)
        assert await refused(shop.web, shop.db.sandbox.ipv4, ECHO_PORT)
        await mesh.until("db answers", lambda: greets(shop.web, shop.db), node.name)
        absent = time.monotonic() - killed

        async def counted_too() -> bool:
            found = (await mesh.admin(node, "status"))["dataplane"]
            return bool(found["seconds_without_service"] > told_before)

        await mesh.until("the agent's figure", counted_too, node.name)
        assert await beside.echo("the other node didn't notice")
    await mesh.settled()
    status = await ask(mesh.run_dir, node.name, "status")
    match = re.search(r"\((\d+\.\d) s without service\)", " ".join(status.text.split()))
    assert match is not None, status.text
    # Until the first answer it was away for sure; the agent may call it back a bit later, when
    # every pod was added.
    assert 0 < float(match[1]) - told_before < absent + 5
    assert "seconds_without_service=" in mesh.log(node.name).read_text()
    assert await counted(node, "underpass_agent_dataplane_losses_total") == losses + 1
    assert await counted(node, "underpass_agent_without_service_seconds_total") > 0
    await vitals.recovered(mesh)


@pytest.mark.modes("ebpf")
async def test_maps_of_another_version_are_renewed_and_nothing_leaves_bare(
    mesh: Mesh, shop: Shop
) -> None:
    node = shop.web.sandbox.node
    maps = BPF_FOLDER / node.name / "maps"
    present = layout(maps / "pods")
    assert await greets(shop.web, shop.db)
    with Wiretap(node.namespace, "wire", b"marker-5d20") as tap:
        lay_out(maps / "pods", value_size=present.value_size - 16)
        os.kill(await dataplane_pid(mesh, node), signal.SIGKILL)
        assert await refused(shop.web, shop.db.sandbox.ipv4, ECHO_PORT)
        await mesh.until("web is served", lambda: greets(shop.web, shop.db), node.name)
        await mesh.settled()
        # In: by the program that was renewed in the pod's namespace.
        assert await greets(shop.web, shop.cart)
    assert tap.ports[15008] > 0
    assert ECHO_PORT not in tap.ports
    assert layout(maps / "pods") == present
    assert sorted(path.name for path in maps.parent.iterdir()) == ["links", "maps", "pods"]
    lines = mesh.log(node.name).read_text().splitlines()
    (line,) = [line for line in lines if "map of another layout: carried over" in line]
    assert "pods" in line
    assert f"value {present.value_size}," in line


async def test_a_whole_node_and_the_control_plane_killed_at_once_come_back(
    mesh: Mesh, shop: Shop
) -> None:
    here, there = mesh.world.nodes
    vitals = await Vitals.of(mesh, here)
    host = shop.db.sandbox.ipv4
    with Wiretap(here.namespace, "wire", b"marker-77e1") as tap:
        async with (
            Conversation(shop.web, shop.cart.sandbox.ipv4, ECHO_PORT) as beside,
            Conversation(shop.web, host, ECHO_PORT) as talk,
        ):
            assert await talk.echo("marker-77e1 before")
            dataplane = await dataplane_pid(mesh, there)
            doomed = [mesh.processes[name] for name in (there.name, "controlplane")]
            for process in doomed:
                process.kill()
            os.kill(dataplane, signal.SIGKILL)
            assert await talk.ended(10)
            for name in (there.name, "controlplane"):
                await mesh.kill(name)
            assert await refused(shop.web, host, ECHO_PORT)
            # Closed from outside the mesh too, not bare.
            assert await refused(shop.legacy, host, ECHO_PORT)
            assert await beside.echo("a node that knows all it needs")
            assert await greets(shop.batch, shop.cart)
            await mesh.start_control_plane()
            await mesh.start_agent(there)
            await mesh.settled()
            await mesh.until("db answers", lambda: greets(shop.web, shop.db), there.name)
            assert await beside.echo("never cut")
    assert tap.sightings == 0
    assert [leaf.name for leaf in leaves(there.name)] == ["dataplane-1"]
    await vitals.recovered(mesh)


def leaves(node: str) -> list[os.DirEntry[str]]:
    from agent.config import cgroup2_mount

    mount = cgroup2_mount()
    assert mount is not None
    return [entry for entry in os.scandir(mount / "underpass" / node) if entry.is_dir()]


async def test_what_a_control_plane_forgot_while_away_is_forgotten_here(
    mesh: Mesh, shop: Shop
) -> None:
    node = mesh.world.nodes[0]
    principal = f"cluster.local/ns/{NAMESPACE}/sa/batch"
    mesh.apply("old", manifests.deny("old", NAMESPACE, app="db", principals=[principal]))
    mesh.apply("old-service", manifests.service("old", NAMESPACE, 7000, ECHO_PORT, {"app": "cart"}))

    async def services() -> set[str]:
        return {row["name"] for row in await mesh.admin(node, "services")}

    async def known() -> bool:
        kept_out = await refused(shop.batch, shop.db.sandbox.ipv4, ECHO_PORT)
        return kept_out and "old" in await services()

    await mesh.until("the old content", known)
    async with (
        Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk,
        Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load,
    ):
        await mesh.kill("controlplane")
        mesh.withdraw("old")
        mesh.withdraw("old-service")
        mesh.apply(
            "new-service", manifests.service("new", NAMESPACE, 7000, ECHO_PORT, {"app": "cart"})
        )

        async def told() -> bool:
            return (await ask(mesh.run_dir, node.name, "status")).tells(
                "control plane", "the last known state serves on"
            )

        await mesh.until("status tells that it is away", told, node.name)
        assert await counted(node, "underpass_agent_xds_connected") == 0
        assert await refused(shop.batch, shop.db.sandbox.ipv4, ECHO_PORT)
        await mesh.start_control_plane()
        await mesh.until("batch is let in", lambda: greets(shop.batch, shop.db), seconds=40)

        async def renewed() -> bool:
            found = await services()
            return "new" in found and "old" not in found

        await mesh.until("the new content alone", renewed, seconds=40)
        await progress(load, 5)
        assert await talk.echo("not cut")
    assert load.failures == []
    mesh.withdraw("new-service")


async def test_of_two_agents_that_take_over_at_once_one_serves_and_one_says_why(
    mesh: Mesh, shop: Shop
) -> None:
    node = shop.db.sandbox.node
    before = await dataplane_pid(mesh, node)
    async with (
        Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk,
        Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load,
    ):
        await progress(load, 5)
        await mesh.kill(node.name, signal.SIGUSR2)
        await mesh.start_agent(node)
        one = mesh.processes[node.name]
        await mesh.start_agent(node)
        two = mesh.processes[node.name]
        done, _ = await asyncio.wait(
            [asyncio.create_task(one.wait()), asyncio.create_task(two.wait())],
            timeout=30,
            return_when=asyncio.FIRST_COMPLETED,
        )
        assert [task.result() for task in done] == [1]
        left, gone = (two, one) if one.returncode is not None else (one, two)
        mesh.processes[node.name] = left
        assert left.returncode is None
        text = mesh.log(node.name).read_text()
        assert f"another agent of this node runs, process {left.pid}" in text
        await mesh.settled()
        assert await dataplane_pid(mesh, node) == before
        assert gone.pid != (await mesh.admin(node, "status"))["pid"] == left.pid
        await progress(load, 5)
        assert await talk.echo("not cut")
    assert load.failures == []
