"""HBONE with a real Envoy at the other end, in both roles."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo.clients import FAILURES, Conversation, refused
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import access_lines
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE, serve_echo
from agent.cli.demo.story import greets, spiffe
from tests.interop import envoy

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def peer(mesh: Mesh, shop: Shop) -> Pod:
    """A pod that isn't captured and speaks HBONE by itself, through Envoy."""
    node = mesh.world.nodes[0]
    labels = {"networking.istio.io/tunnel": "http"}
    pod = Pod(mesh.world.add_pod(node, "envoy"), NAMESPACE, "envoy", labels, ambient=False)
    mesh.add(pod)
    # Its echo stands for the application behind Envoy.
    await serve_echo(mesh, pod)
    token = (mesh.folder / f"{node.name}.token").read_text().strip()
    root = mesh.control_plane_state / "root-cert.pem"
    address = f"{node.ipv4}:15012"
    folder = mesh.folder / "envoy"
    folder.mkdir()

    async def signed() -> bool:
        try:
            await fetch(mesh, folder, address, root, token, spiffe(pod))
        except MeshRefused:
            return False
        return True

    await mesh.until("the CA to know envoy's pod", signed, "controlplane")
    config = envoy.configuration(
        folder,
        own_ip=pod.sandbox.ipv4,
        peer=(shop.db.sandbox.ipv4, ECHO_PORT),
        peer_identity=spiffe(shop.db),
    )
    (folder / "envoy.json").write_text(config)
    binary = Path(sys.executable).with_name("envoy")
    arguments = [str(binary), "-c", str(folder / "envoy.json"), "--use-dynamic-base-id"]
    arguments += ["--concurrency", "1", "--log-level", "warning"]
    await mesh.spawn("envoy-proxy", arguments, pod.sandbox.namespace)

    async def published() -> bool:
        workloads = await mesh.admin(node, "workloads")
        return any(w["name"] == "envoy" and w["protocol"] == "HBONE" for w in workloads)

    await mesh.until("envoy's pod to be published as HBONE", published)
    return pod


class MeshRefused(Exception):
    """The CA doesn't sign for this identity yet."""


async def fetch(
    mesh: Mesh, folder: Path, address: str, root: Path, token: str, identity: str
) -> None:
    """In a child inside the node's namespace: grpc makes its sockets on threads of its own."""
    code = (
        "import asyncio, sys; from pathlib import Path; from tests.interop import envoy;"
        "a = sys.argv; asyncio.run(envoy.certificate(Path(a[1]), a[2], Path(a[3]), a[4], a[5]))"
    )
    arguments = [sys.executable, "-c", code, str(folder), address, str(root), token, identity]
    process = await mesh.spawn("envoy-csr", arguments, mesh.world.nodes[0].namespace)
    if await process.wait():
        raise MeshRefused(mesh.tail("envoy-csr"))


async def test_envoy_as_client_reaches_a_captured_pod(mesh: Mesh, shop: Shop, peer: Pod) -> None:
    async def greeted() -> bool:
        try:
            async with Conversation(peer, "127.0.0.1", envoy.CLIENT_PORT) as talk:
                return bool(talk.greeting)
        except FAILURES:
            return False

    await mesh.until("envoy serves", greeted, "envoy-proxy")
    async with Conversation(peer, "127.0.0.1", envoy.CLIENT_PORT) as talk:
        assert talk.greeting == f"db sees {peer.sandbox.ipv4}"
        assert await talk.echo("x" * 100_000)
        assert await talk.finish() == "bye\n"
    needles = ('direction="inbound"', f'src.identity="{spiffe(peer)}"', "connection complete")
    log = mesh.log(mesh.world.nodes[1].name)
    await mesh.until("the access log", lambda: bool(access_lines(log, *needles)))


@pytest.mark.parametrize("client", ["web", "api"])
async def test_envoy_as_server_is_reached_from_both_nodes(
    mesh: Mesh, shop: Shop, peer: Pod, client: str
) -> None:
    pod = getattr(shop, client)
    async with Conversation(pod, peer.sandbox.ipv4, ECHO_PORT) as talk:
        # Envoy connects to its application from loopback: the proof that it came through it.
        assert talk.greeting == "envoy sees 127.0.0.1"
        assert await talk.echo("x" * 100_000)
        assert await talk.finish() == "bye\n"
    log = mesh.log(pod.sandbox.node.name)
    needles = (f'dst.identity="{spiffe(peer)}"', f"{peer.sandbox.ipv4}:15008", "complete")
    await mesh.until("the access log", lambda: bool(access_lines(log, *needles)))


async def test_envoy_with_another_identity_than_published_is_refused(
    mesh: Mesh, shop: Shop, peer: Pod
) -> None:
    mesh.write_manifest(replace(peer, service_account="somebody-else"))
    node = mesh.world.nodes[0]

    async def account(name: str) -> bool:
        workloads = await mesh.admin(node, "workloads")
        return any(w["name"] == "envoy" and w["serviceAccount"] == name for w in workloads)

    await mesh.until("the new account", partial(account, "somebody-else"))
    assert await refused(shop.web, peer.sandbox.ipv4, ECHO_PORT)
    mesh.write_manifest(peer)
    await mesh.until("the old account", partial(account, peer.service_account))
    await mesh.until("reached again", partial(greets, shop.web, peer))
