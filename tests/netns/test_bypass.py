"""`underpass bypass` against a real mesh: what is past it is named, what is in it isn't."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.clients import Conversation
from agent.cli.demo.manifests import Pod
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE, serve_echo
from tests.support.operator import ask

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_connections_of_the_mesh_are_not_past_it(mesh: Mesh, shop: Shop) -> None:
    async with (
        Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT),
        Conversation(shop.web, shop.cart.sandbox.ipv6, ECHO_PORT),
        # Plain TCP, in both directions, but through the proxy.
        Conversation(shop.legacy, shop.db.sandbox.ipv4, ECHO_PORT),
    ):
        for node in mesh.world.nodes:
            said = await ask(mesh.run_dir, node.name, "bypass")
            assert (said.code, said.text.strip()) == (
                0,
                "Nothing goes past the mesh, as far as can be seen.",
            )


async def test_older_connections_and_pods_without_capture_are_named(mesh: Mesh, shop: Shop) -> None:
    node = shop.db.sandbox.node
    late = Pod(mesh.world.add_pod(node, "late"), NAMESPACE, "late")
    await serve_echo(mesh, late)
    await mesh.until("its server", lambda: "listening" in mesh.log("late").read_text())
    async with Conversation(shop.legacy, late.sandbox.ipv4, ECHO_PORT) as old:
        # The control plane knows it before the agent's list does.
        mesh.pods.append(late)
        mesh.write_manifest(late)

        async def unlisted() -> bool:
            said = await ask(mesh.run_dir, node.name, "bypass", "-o", "wide")
            return said.code == 1 and said.tells("shop/late", "list of pods doesn't have it")

        await mesh.until("it is missed", unlisted, node.name)
        mesh.write_pods(node)
        await mesh.settled()
        said = await ask(mesh.run_dir, node.name, "bypass", "-o", "wide")
        assert said.code == 1
        local = f"{late.sandbox.ipv4}:{ECHO_PORT}"
        assert said.tells("shop/late", local, "older than the pod's capture")
        assert not said.tells("list of pods doesn't have it")
        assert old.greeting
    said = await ask(mesh.run_dir, node.name, "bypass")
    assert said.code == 0, said.text
