"""Wrong tokens, roots and files, ports that are taken, authorities that are away: the operator is
told what to do, and nobody else's traffic notices."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo import manifests
from agent.cli.demo.clients import http_get, refused
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.netns import inside
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT, NAMESPACE, serve_echo, serve_http
from agent.cli.demo.story import greets
from agent.cli.demo.wiretap import Wiretap
from agent.cli.demo.world import World
from controlplane.tokens import TokenKey
from tests.netns.test_lifecycle import rules_of
from tests.support.meshes import mesh_of
from tests.support.operator import ask, readiness, rows
from tests.support.small_ca import SmallCa

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import Node

pytestmark = pytest.mark.asyncio(loop_scope="module")


def listening(namespace: str, port: int) -> socket.socket:
    """An application of the pod that has one of our ports."""
    import socket

    def work() -> socket.socket:
        return socket.create_server(("", port))

    return inside(namespace, work)


@pytest.mark.parametrize("port", [15001, 15008])
async def test_pod_whose_port_is_taken_is_named_and_captured_once_it_is_free(
    mesh: Mesh, shop: Shop, port: int
) -> None:
    node = shop.db.sandbox.node
    pod = Pod(mesh.world.add_pod(node, f"taken{port}"), NAMESPACE, "taken")
    untouched = rules_of(pod.sandbox.namespace)
    await serve_echo(mesh, pod)
    with listening(pod.sandbox.namespace, port):
        mesh.add(pod)

        async def told() -> bool:
            found = {row["uid"]: row for row in await rows(mesh.run_dir, node.name, "pods")}
            row = found.get(pod.uid, {"problem": ""})
            if not row["problem"]:
                return False
            assert str(port) in row["problem"]
            assert f"{NAMESPACE}/{pod.name}" in row["problem"]
            assert "ss -ltnp" in row["remedy"]
            assert not row["captured"]
            assert not row["verified"]
            return True

        await mesh.until("the pod's problem", told, node.name)
        status = await ask(mesh.run_dir, node.name, "status")
        assert status.code == 1
        assert status.tells(f"pod {NAMESPACE}/{pod.name}", str(port), "ss -ltnp")
        assert rules_of(pod.sandbox.namespace) == untouched
        # A pod outside the mesh to everybody: what it serves is reached in clear.
        assert await greets(shop.legacy, pod)
        assert await greets(shop.web, shop.db)
    await mesh.settled()
    await mesh.until("it answers by the mesh", lambda: greets(shop.web, pod))
    mesh.remove(pod)
    await mesh.settled()
    mesh.world.remove_pod(pod.sandbox)


def foreign_root(mesh: Mesh, node: Node, folder: Path) -> tuple[str, ...]:
    (folder / "foreign.pem").write_text(SmallCa().root_pem)
    return (f"--xds-root={folder / 'foreign.pem'}",)


def expired_token(mesh: Mesh, node: Node, folder: Path) -> tuple[str, ...]:
    key = TokenKey.load(mesh.control_plane_state)
    token = key.issue(node.name, timedelta(hours=1), now=time.time() - 7200)
    (folder / "old.token").write_text(f"{token}\n")
    return (f"--xds-token={folder / 'old.token'}",)


def token_of_another_node(mesh: Mesh, node: Node, folder: Path) -> tuple[str, ...]:
    return (f"--xds-token={mesh.folder / f'{mesh.world.nodes[0].name}.token'}",)


def no_token_file(mesh: Mesh, node: Node, folder: Path) -> tuple[str, ...]:
    return (f"--xds-token={folder / 'absent.token'}",)


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (foreign_root, ("TLS failed", "CERTIFICATE_VERIFY_FAILED", "foreign.pem")),
        (expired_token, ("has expired", "underpass controlplane token --node")),
        (token_of_another_node, ("token", "made for node")),
        (no_token_file, ("absent.token", "No such file")),
    ],
)
async def test_node_that_may_not_join_says_why_and_the_other_node_goes_on(
    mesh: Mesh,
    shop: Shop,
    tmp_path: Path,
    mistake: Callable[[Mesh, Node, Path], tuple[str, ...]],
    told: tuple[str, ...],
) -> None:
    node = shop.db.sandbox.node
    await mesh.kill(node.name, signal.SIGTERM)
    good = mesh.agent_options
    mesh.agent_options = (*good, *mistake(mesh, node, tmp_path))
    try:
        await mesh.start_agent(node)

        async def status_tells() -> bool:
            said = await ask(mesh.run_dir, node.name, "status")
            return said.code == 1 and said.tells("NOT READY", "control plane", *told)

        await mesh.until(f"status tells {told}", status_tells, node.name, seconds=30)
        assert "pending: control plane" in await readiness(node.namespace)
        assert await greets(shop.web, shop.cart)
        # What was captured before stays closed.
        assert await refused(shop.legacy, shop.db.sandbox.ipv4, ECHO_PORT)
    finally:
        mesh.agent_options = good
        await mesh.kill(node.name, signal.SIGTERM)
    await mesh.start_agent(node)
    await mesh.settled()
    await mesh.until("db answers again", lambda: greets(shop.web, shop.db))


async def test_wrong_trust_domain_is_told_for_each_identity(mesh: Mesh, shop: Shop) -> None:
    node = shop.db.sandbox.node
    await mesh.kill(node.name, signal.SIGTERM)
    good = mesh.agent_options
    mesh.agent_options = (*good, "--trust-domain=other.example")
    try:
        await mesh.start_agent(node)
        identity = f"spiffe://other.example/ns/{NAMESPACE}/sa/db"

        async def status_tells() -> bool:
            said = await ask(mesh.run_dir, node.name, "status")
            return said.code == 1 and said.tells(
                f"no certificate for {identity}: its connections are refused",
                "trust domain 'other.example' isn't this mesh's, which is 'cluster.local'",
                "compare --trust-domain",
            )

        await mesh.until("status names the identity", status_tells, node.name)
        assert await refused(shop.web, shop.db.sandbox.ipv4, ECHO_PORT)
        assert await greets(shop.web, shop.cart)
    finally:
        mesh.agent_options = good
        await mesh.kill(node.name, signal.SIGTERM)
    await mesh.start_agent(node)
    await mesh.settled()
    await mesh.until("db answers again", lambda: greets(shop.web, shop.db))


async def test_control_plane_that_is_away_from_the_start_is_named_until_it_comes(
    mesh: Mesh, shop: Shop
) -> None:
    node = shop.db.sandbox.node
    await mesh.kill(node.name, signal.SIGTERM)
    await mesh.kill("controlplane")
    await mesh.start_agent(node)

    async def status_tells() -> bool:
        said = await ask(mesh.run_dir, node.name, "status")
        return said.code == 1 and said.tells(
            "connection refused; is the control plane running", "no pod is captured before"
        )

    await mesh.until("status names it", status_tells, node.name)
    assert "pending: control plane" in await readiness(node.namespace)
    assert await greets(shop.web, shop.cart)
    await mesh.start_control_plane()
    await mesh.settled()
    await mesh.until("db answers", lambda: greets(shop.web, shop.db))
    assert await readiness(node.namespace) == "ready"


async def test_half_broken_manifest_costs_only_what_is_broken(mesh: Mesh, shop: Shop) -> None:
    principal = f"cluster.local/ns/{NAMESPACE}/sa/batch"
    good = manifests.deny("keep-out", NAMESPACE, app="db", principals=[principal])
    bad = manifests.deny("bad", NAMESPACE, app="db", principals=[principal])
    bad["spec"]["action"] = "PERHAPS"
    mesh.apply("half", good)

    async def out() -> bool:
        return await refused(shop.batch, shop.db.sandbox.ipv4, ECHO_PORT)

    await mesh.until("batch is kept out", out)
    mesh.apply("half", bad, good)
    await mesh.until(
        "file and field are named",
        lambda: all(
            part in mesh.log("controlplane").read_text()
            for part in ("half.yaml", "spec.action", "PERHAPS")
        ),
    )
    assert await out()
    assert await greets(shop.web, shop.db)
    mesh.withdraw("half")
    await mesh.until("batch is let in", lambda: greets(shop.batch, shop.db))


@pytest.fixture
async def brief(
    new_prefix: Callable[[], str], capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    """Two nodes whose certificates live for seconds."""
    world = World(new_prefix())
    folder = tmp_path_factory.mktemp("brief")
    world.up()
    async with mesh_of(Mesh, world, capture, folder, "--ca-ttl=6s") as mesh:
        mesh.apply("namespace", manifests.namespace(NAMESPACE))
        yield mesh


@pytest.mark.asyncio(loop_scope="function")
async def test_expired_certificates_refuse_new_connections_and_never_fall_back_to_plaintext(
    brief: Mesh,
) -> None:
    one, two = brief.world.nodes
    client = Pod(brief.world.add_pod(one, "client"), NAMESPACE, "client")
    server = Pod(brief.world.add_pod(two, "server"), NAMESPACE, "server")
    brief.add(client, server)
    await serve_http(brief, server)
    await brief.start()
    host = server.sandbox.ipv4

    async def served() -> bool:
        try:
            await http_get(client, host, HTTP_PORT, "/marker-91ab", timeout=3)
        except Exception:  # refused in any way
            return False
        return True

    with Wiretap(one.namespace, "wire", b"marker-91ab") as tap:
        await brief.until("service", served)
        await brief.kill("controlplane")

        async def status_tells() -> bool:
            said = await ask(brief.run_dir, one.name, "status")
            return said.code == 1 and said.tells(
                f"no certificate for spiffe://cluster.local/ns/{NAMESPACE}/sa/client: "
                "its connections are refused",
                "connection refused; is the control plane running",
            )

        await brief.until("status says that the certificate is gone", status_tells, one.name)
        for _ in range(5):
            assert not await served()
        assert "expired" in brief.log(one.name).read_text()
        await brief.start_control_plane()
        await brief.until("service again", served)
    assert tap.sightings == 0
    assert os.path.exists(f"/proc/{brief.processes[one.name].pid}")
