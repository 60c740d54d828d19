"""Connections older than their pod's capture, as an operator meets them: they live on, are counted
until none is left, and are cut where that is asked for."""

from __future__ import annotations

import json
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo import manifests
from agent.cli.demo.clients import Conversation
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.netns import inside
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE, serve_echo
from agent.cli.demo.story import greets
from redirect import nft, ruleset
from tests.support.meshes import mesh_of
from tests.support.operator import ask
from tests.support.vitals import counted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import World

pytestmark = pytest.mark.asyncio(loop_scope="module")

STRICT = "cautious"
SETTINGS = f"namespaces: {{{STRICT}: {{cutPrecapture: true}}}}\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    async with mesh_of(Mesh, world, capture, folder, settings=SETTINGS) as made:
        made.apply("cautious", manifests.namespace(STRICT))
        yield made


@asynccontextmanager
async def late(
    mesh: Mesh, shop: Shop, name: str, namespace: str = NAMESPACE
) -> AsyncIterator[tuple[Pod, list[Conversation]]]:
    """A pod of the second node with four connections, both directions, IPv4 and IPv6, before it is
    captured."""
    pod = Pod(mesh.world.add_pod(shop.db.sandbox.node, name), namespace, name)
    await serve_echo(mesh, pod)
    await mesh.until("its server", lambda: "listening" in mesh.log(name).read_text())
    async with AsyncExitStack() as stack:
        talks = [
            await stack.enter_async_context(Conversation(*ends, ECHO_PORT))
            for ends in (
                (shop.legacy, pod.sandbox.ipv4),
                (shop.legacy, pod.sandbox.ipv6),
                (pod, shop.legacy.sandbox.ipv4),
                (pod, shop.legacy.sandbox.ipv6),
            )
        ]
        mesh.add(pod)
        await mesh.settled()
        yield pod, talks
    mesh.remove(pod)
    await mesh.settled()
    mesh.world.remove_pod(pod.sandbox)


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def outside(mesh: Mesh, shop: Shop) -> None:
    """A server that is never captured."""
    await serve_echo(mesh, shop.legacy)
    await mesh.until("it", lambda: "listening" in mesh.log(shop.legacy.name).read_text())


async def row(mesh: Mesh, pod: Pod) -> dict[str, object]:
    rows = await mesh.admin(pod.sandbox.node, "pods")
    return next(row for row in rows if row["uid"] == pod.uid)


async def left(mesh: Mesh, pod: Pod) -> object:
    return (await row(mesh, pod))["precapture_connections"]


async def becomes(mesh: Mesh, pod: Pod, count: int) -> None:
    async def there() -> bool:
        return await left(mesh, pod) == count

    await mesh.until(f"{count} older connections", there, pod.sandbox.node.name, seconds=20)


async def was_reset(talk: Conversation) -> bool:
    reader, _ = talk._streams
    try:
        await reader.read(1)
    except (ConnectionResetError, ConnectionAbortedError):
        return True
    return False


async def test_older_connections_live_on_and_count_until_none_is_left(
    mesh: Mesh, shop: Shop
) -> None:
    async with late(mesh, shop, "late") as (pod, talks):
        node = pod.sandbox.node
        await becomes(mesh, pod, len(talks))
        assert not (await row(mesh, pod))["enforced"]
        assert await counted(node, "underpass_precapture_connections") == len(talks)
        said = await ask(mesh.run_dir, node.name, "pods", "-o", "wide")
        assert said.tells("shop/late", f"{pod.sandbox.ipv4}:{ECHO_PORT} ↔")
        status = await ask(mesh.run_dir, node.name, "status")
        assert status.tells("2 enforced (4 connections are older than capture)"), status.text
        # New ones are captured, whichever way, and not counted.
        async with (
            Conversation(shop.web, pod.sandbox.ipv4, ECHO_PORT) as inward,
            Conversation(pod, shop.legacy.sandbox.ipv6, ECHO_PORT) as outward,
            Conversation(pod, pod.sandbox.ipv4, ECHO_PORT),
        ):
            for talk in (*talks, inward, outward):
                assert await talk.echo("on it goes")
            assert await left(mesh, pod) == len(talks)
            listed = await mesh.admin(node, "precapture")
            assert [entry["pod"] for entry in listed] == ["shop/late"] * len(talks)
            for number, talk in enumerate(talks, 1):
                assert await talk.finish() == "bye\n"
                await becomes(mesh, pod, len(talks) - number)
            assert (await row(mesh, pod))["enforced"]
            assert await inward.echo("still")
        assert await counted(node, "underpass_precapture_connections") == 0
        assert "no connection is older than the pod's capture any more" in (
            mesh.log(node.name).read_text()
        )
        status = await ask(mesh.run_dir, node.name, "status")
        assert status.tells("3 verified, 3 enforced"), status.text


async def test_cut_resets_older_connections_of_one_pod_and_of_nobody_else(
    mesh: Mesh, shop: Shop
) -> None:
    async with (
        late(mesh, shop, "doomed") as (pod, talks),
        late(mesh, shop, "spared") as (other, others),
        Conversation(shop.web, pod.sandbox.ipv4, ECHO_PORT) as captured,
    ):
        node = pod.sandbox.node
        cuts = await counted(node, "underpass_precapture_cut_total")
        said = await ask(mesh.run_dir, node.name, "cut-precapture")
        assert said.code == 2, said.text
        assert said.tells("name a pod, or write --all")
        said = await ask(mesh.run_dir, node.name, "cut-precapture", "shop/doomed")
        assert (said.code, said.text) == (0, "4 connections cut.\n")
        assert all([await was_reset(talk) for talk in talks])
        await becomes(mesh, pod, 0)
        assert await captured.echo("captured")
        await becomes(mesh, other, len(others))
        assert all([await talk.echo("spared") for talk in others])
        said = await ask(mesh.run_dir, node.name, "cut-precapture", "--all", "-o", "json")
        assert json.loads(said.text) == {"cut": len(others)}
        assert all([await was_reset(talk) for talk in others])
        assert await counted(node, "underpass_precapture_cut_total") == cuts + 8
        assert await greets(pod, other)


async def test_an_agent_that_starts_anew_counts_the_same_connections(
    mesh: Mesh, shop: Shop
) -> None:
    async with late(mesh, shop, "lasting") as (pod, talks):
        node = pod.sandbox.node
        async with (
            Conversation(shop.web, pod.sandbox.ipv4, ECHO_PORT) as inward,
            Conversation(pod, shop.legacy.sandbox.ipv4, ECHO_PORT) as outward,
        ):
            await mesh.kill(node.name, signal.SIGKILL)
            assert await talks[0].finish() == "bye\n"
            await mesh.start_agent(node)
            await mesh.settled(node)
            await becomes(mesh, pod, len(talks) - 1)
            # A note that is lost is no connection lost.
            await mesh.kill(node.name, signal.SIGKILL)
            (mesh.run_dir / node.name / "precapture.json").unlink()
            await mesh.start_agent(node)
            await mesh.settled(node)
            await becomes(mesh, pod, len(talks) - 1)
            for talk in (*talks[1:], inward, outward):
                assert await talk.echo("never cut")
            said = await ask(mesh.run_dir, node.name, "cut-precapture", "--all")
            assert said.text == "3 connections cut.\n"
            assert await inward.echo("captured")
            assert await outward.echo("captured")
        assert not (mesh.run_dir / node.name / "precapture.json").exists()


async def test_namespace_that_cuts_has_none_once_a_pod_is_captured(mesh: Mesh, shop: Shop) -> None:
    async with late(mesh, shop, "cautious", STRICT) as (pod, talks):
        assert all([await was_reset(talk) for talk in talks])
        assert await left(mesh, pod) == 0
        assert (await row(mesh, pod))["enforced"]
        assert await greets(shop.web, pod)


@pytest.mark.modes("nftables")
async def test_connections_made_while_rules_were_gone_are_counted(mesh: Mesh, shop: Shop) -> None:
    pod = shop.db
    node = pod.sandbox.node
    inside(pod.sandbox.namespace, lambda: nft.run(ruleset.delete()))
    async with Conversation(pod, shop.legacy.sandbox.ipv4, ECHO_PORT) as bare:
        await becomes(mesh, pod, 1)
        assert await bare.echo("it lives")
        said = await ask(mesh.run_dir, node.name, "bypass")
        assert said.tells("shop/db", "cut-precapture POD"), said.text
    await becomes(mesh, pod, 0)


async def test_connections_accepted_by_a_successor_are_captured_ones(
    mesh: Mesh, shop: Shop
) -> None:
    """Its listeners were made in a cgroup that is gone, and so count what it accepts."""
    node = shop.db.sandbox.node
    await mesh.admin(node, "dataplane/replace", method="POST")

    async def alone() -> bool:
        return not (await mesh.admin(node, "status"))["dataplane"]["draining"]

    await mesh.until("the former to end", alone, node.name)
    async with (
        Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as inward,
        Conversation(shop.legacy, shop.db.sandbox.ipv6, ECHO_PORT) as plain,
        Conversation(shop.db, shop.legacy.sandbox.ipv4, ECHO_PORT) as outward,
    ):
        await mesh.kill(node.name, signal.SIGKILL)
        await mesh.start_agent(node)
        await mesh.settled(node)
        await becomes(mesh, shop.db, 0)
        said = await ask(mesh.run_dir, node.name, "bypass")
        assert said.code == 0, said.text
        for talk in (inward, plain, outward):
            assert await talk.echo("captured")
