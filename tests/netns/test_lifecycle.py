"""Agents and data planes that die, come back and are replaced; rules that somebody removes; pods
that come and go. Traffic and capture are what counts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent.cli.demo import manifests
from agent.cli.demo.clients import Conversation, Load, http_get, refused
from agent.cli.demo.manifests import Pod
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT, NAMESPACE, serve_echo
from agent.cli.demo.story import answers, greets, progress
from agent.cli.demo.wiretap import Wiretap
from agent.cli.demo.world import BPF_FOLDER
from tests.support.older_maps import lay_out, layout

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import Node

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def dataplane_pid(mesh: Mesh, node: Node) -> int:
    pid = (await mesh.admin(node, "status"))["dataplane"]["pid"]
    assert isinstance(pid, int)
    return pid


def run_in(namespace: str, *command: str) -> str:
    """A command's output inside a namespace; a failing one gives what it printed before."""
    enter = ["nsenter", f"--net=/run/netns/{namespace}", *command]
    return subprocess.run(enter, capture_output=True, text=True, check=False).stdout


def rules_of(namespace: str) -> str:
    """Everything capture leaves in a namespace: rule set, policy rules, table 100."""
    commands = (
        "nft list ruleset",
        "ip rule list fwmark 0x111/0xfff",
        "ip -6 rule list fwmark 0x111/0xfff",
        "ip route list table 100",
        "ip -6 route list table 100",
    )
    return "".join(run_in(namespace, *command.split()) for command in commands)


async def test_killed_agent_touches_no_connection(mesh: Mesh, shop: Shop) -> None:
    node = mesh.world.nodes[1]
    host = shop.db.sandbox.ipv4
    async with (
        Conversation(shop.web, host, ECHO_PORT) as talk,
        Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load,
    ):
        before = await dataplane_pid(mesh, node)
        await mesh.kill(node.name)
        await progress(load, 20)
        assert await talk.echo("without an agent")
        await mesh.start_agent(node)
        await mesh.settled()
        assert await dataplane_pid(mesh, node) == before
        await progress(load, 20)
        assert await talk.echo("with the new agent")
    assert load.failures == []


async def test_killed_dataplane_never_fails_open_and_comes_back(mesh: Mesh, shop: Shop) -> None:
    node = mesh.world.nodes[0]
    before = await dataplane_pid(mesh, node)
    with Wiretap(node.namespace, "wire", b"marker-55d0") as tap:
        async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
            os.kill(before, signal.SIGKILL)
            assert await talk.ended(10)

            async def asks() -> bool:
                with contextlib.suppress(Exception):
                    host = shop.api.sandbox.ipv4
                    await http_get(shop.web, host, HTTP_PORT, "/marker-55d0", timeout=2)
                    return True
                return False

            await mesh.until("service is back", asks, node.name)
    assert tap.sightings == 0
    await mesh.settled()
    assert await dataplane_pid(mesh, node) != before
    log = mesh.log(node.name).read_text()
    assert "seconds_without_service=" in log


async def replace_dataplane(mesh: Mesh, shop: Shop, node: Node) -> None:
    """Under load, of which nothing fails."""
    before = await dataplane_pid(mesh, node)
    async with (
        Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk,
        Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load,
    ):
        await progress(load, 20)
        mesh.processes[node.name].send_signal(signal.SIGHUP)

        async def replaced() -> bool:
            return await dataplane_pid(mesh, node) not in (0, before)

        await mesh.until("the successor", replaced, node.name)
        assert await talk.ended(30)
        await mesh.until("the old one to end", lambda: not Path(f"/proc/{before}").exists())
        await progress(load, 20)
    assert load.failures == []
    await mesh.settled()


@pytest.mark.modes("ebpf")
async def test_replaced_dataplane_whose_maps_differ_fails_no_request(
    mesh: Mesh, shop: Shop
) -> None:
    for node in mesh.world.nodes:
        maps = BPF_FOLDER / node.name / "maps"
        present = layout(maps / "pods")
        lay_out(maps / "pods", value_size=present.value_size + 16)
        await replace_dataplane(mesh, shop, node)
        assert layout(maps / "pods") == present
        assert "map of another layout: carried over" in mesh.log(node.name).read_text()


async def test_replaced_dataplane_fails_no_request(mesh: Mesh, shop: Shop, capture: str) -> None:
    node = mesh.world.nodes[1]
    await replace_dataplane(mesh, shop, node)
    # One exempt cgroup again: the old leaf is gone from every pod's rules.
    if capture == "nftables":
        assert rules_of(shop.api.sandbox.namespace).count("socket cgroupv2") > 0
    leaves = [f for f in cgroup_of(node).iterdir() if f.is_dir()]
    assert len(leaves) == 1


def cgroup_of(node: Node) -> Path:
    from agent.cli.demo.world import cgroup2_mounts

    return next(root / "underpass" / node.name for root in cgroup2_mounts())


@pytest.mark.modes("nftables")
async def test_removed_rules_are_put_back(mesh: Mesh, shop: Shop) -> None:
    namespace = shop.web.sandbox.namespace
    run_in(namespace, "nft", "flush", "ruleset")
    run_in(namespace, "ip", "rule", "del", "fwmark", "0x111/0xfff")
    assert "15001" not in rules_of(namespace)

    def back() -> bool:
        text = rules_of(namespace)
        return "15001" in text and "15006" in text and text.count("lookup 100") == 2

    await mesh.until("the rules to be back", back, seconds=30)
    await mesh.settled()
    with Wiretap(mesh.world.nodes[0].namespace, "wire", b"marker-c3") as tap:
        await http_get(shop.web, shop.api.sandbox.ipv4, HTTP_PORT, "/marker-c3")
    assert tap.sightings == 0


@pytest.mark.modes("ebpf")
async def test_removed_programs_are_put_back(mesh: Mesh, shop: Shop) -> None:
    """The folder of the pins is how an operator without our binary ends capture."""
    node, namespace = mesh.world.nodes[0], shop.web.sandbox.namespace
    shutil.rmtree(BPF_FOLDER / node.name)
    run_in(namespace, "ip", "rule", "del", "fwmark", "0x111/0xfff")

    async def captured() -> bool:
        with Wiretap(node.namespace, "wire", b"marker-c4") as tap:
            await http_get(shop.web, shop.api.sandbox.ipv4, HTTP_PORT, "/marker-c4")
        return tap.sightings == 0

    assert not await captured()
    await mesh.until("the programs to be back", captured, seconds=30)
    assert rules_of(namespace).count("lookup 100") == 2
    await mesh.settled()


async def test_pod_comes_and_goes_without_residue(mesh: Mesh, shop: Shop) -> None:
    node = mesh.world.nodes[1]
    pod = Pod(mesh.world.add_pod(node, "guest"), NAMESPACE, "guest")
    empty = rules_of(pod.sandbox.namespace)
    await serve_echo(mesh, pod)
    for _ in range(2):
        mesh.add(pod)
        await mesh.settled()
        await mesh.until("guest answers", lambda: greets(shop.web, pod), "guest")
        assert rules_of(pod.sandbox.namespace) != empty
        async with Conversation(shop.web, pod.sandbox.ipv4, ECHO_PORT) as talk:
            mesh.remove(pod)
            await mesh.settled()
            await mesh.until("no rules", lambda: rules_of(pod.sandbox.namespace) == empty)
            assert await talk.ended(15)
        listeners = run_in(pod.sandbox.namespace, "ss", "-Htln")
        assert not any(f":{port} " in listeners for port in (15001, 15006, 15008)), listeners
    mesh.world.remove_pod(pod.sandbox)


async def test_new_pod_reusing_an_address_is_not_taken_for_the_old_one(
    mesh: Mesh, shop: Shop
) -> None:
    node = mesh.world.nodes[1]
    for name in ("first", "second"):
        sandbox = mesh.world.add_pod(node, name, host_byte=77)
        pod = Pod(sandbox, NAMESPACE, name)
        await serve_echo(mesh, pod)
        mesh.add(pod)
        await mesh.settled()
        await mesh.until(f"{name} answers", partial(greets, shop.web, pod), name)
        async with Conversation(shop.web, sandbox.ipv4, ECHO_PORT) as talk:
            assert talk.greeting.startswith(f"{name} sees")
            rows = await mesh.admin(mesh.world.nodes[0], "connections")
            there = {r["dst_identity"] for r in rows if r["dst_workload"] == name}
            assert there == {f"spiffe://cluster.local/ns/{NAMESPACE}/sa/{name}"}
        mesh.remove(pod)
        mesh.world.remove_pod(sandbox)
    await mesh.settled()


async def test_half_broken_pod_file_costs_only_the_broken_entry(mesh: Mesh, shop: Shop) -> None:
    node = mesh.world.nodes[0]
    good = [p.entry() for p in mesh.pods if p.ambient and p.sandbox.node is node]
    broken: dict[str, Any] = {**good[0], "uid": "broken", "name": "broken"}
    broken["netns"] = "/run/netns/there-is-no-such-namespace"
    manifests.write_list(mesh.pods_file(node), [*good, broken, good[0]])
    log = mesh.log(node.name)

    def said() -> bool:
        text = log.read_text()
        return "there-is-no-such-namespace" in text and "twice" in text

    await mesh.until("both mistakes are named", said, node.name)
    assert await greets(shop.web, shop.db)
    mesh.pods_file(node).write_text("{ this is : not [ a list")
    await mesh.until(
        "the unreadable file is named",
        lambda: str(mesh.pods_file(node)) in log.read_text(),
        node.name,
    )
    assert await greets(shop.web, shop.db)
    mesh.write_pods(node)
    await mesh.settled()


async def test_node_serves_without_its_control_plane(mesh: Mesh, shop: Shop) -> None:
    await mesh.kill("controlplane")
    for _ in range(5):
        assert await greets(shop.web, shop.db)
    await mesh.start_control_plane()
    principal = f"cluster.local/ns/{NAMESPACE}/sa/batch"
    mesh.apply("later", manifests.deny("later", NAMESPACE, app="db", principals=[principal]))

    async def out() -> bool:
        return await refused(shop.batch, shop.db.sandbox.ipv4, ECHO_PORT)

    await mesh.until("what changed meanwhile arrives", out, seconds=40)
    mesh.withdraw("later")
    await mesh.until("and goes", lambda: greets(shop.batch, shop.db), seconds=20)


async def test_terminated_agent_drains_and_the_pods_stay_closed(mesh: Mesh, shop: Shop) -> None:
    node = mesh.world.nodes[1]
    async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        process = mesh.processes.pop(node.name)
        process.send_signal(signal.SIGTERM)
        assert await talk.echo("drain lets it live")
        assert await talk.ended(30)
    async with asyncio.timeout(30):
        assert await process.wait() == 0
    assert await refused(shop.web, shop.db.sandbox.ipv4, ECHO_PORT)
    assert not await answers(shop.legacy, shop.api)
    await mesh.start_agent(node)
    await mesh.settled()
    assert await greets(shop.web, shop.db)
