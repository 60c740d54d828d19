"""`istioctl ztunnel-config` reads our dump (facts istio-ambient 10)."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
import pytest_asyncio

from agent.cli.demo import manifests
from agent.cli.demo.clients import Conversation
from agent.cli.demo.netns import open_socket
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE
from agent.cli.demo.story import spiffe

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import Node

pytestmark = pytest.mark.asyncio(loop_scope="module")

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
ISTIOCTL = CACHE / "underpass" / "tools" / "istioctl"


@pytest.fixture(scope="module")
def istioctl() -> Path:
    if not ISTIOCTL.exists():
        if os.environ.get("CI"):
            pytest.fail("tools/istioctl didn't build it")
        pytest.skip("there is no istioctl: run tools/istioctl, which takes several minutes")
    return ISTIOCTL


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def dump(mesh: Mesh, shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the first node, while `web` talks to `db`, with a policy for `db`."""
    node = mesh.world.nodes[0]
    name = spiffe(shop.batch).removeprefix("spiffe://")
    mesh.apply("deny", manifests.deny("no-batch", NAMESPACE, app="db", principals=[name]))

    async def known() -> bool:
        policies = await mesh.admin(node, "policies")
        return [policy["name"] for policy in policies] == ["no-batch"]

    await mesh.until("the policy to arrive", known, node.name)
    file = tmp_path_factory.mktemp("istioctl") / "dump.json"
    async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("here")
        file.write_bytes(await config_dump(node))
    return file


async def config_dump(node: Node) -> bytes:
    connector = aiohttp.TCPConnector(
        socket_factory=lambda info: open_socket(node.namespace, socket.AddressFamily(info[0]))
    )
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get("http://127.0.0.1:15000/config_dump", raise_for_status=True) as answer,
    ):
        return await answer.read()


async def table(istioctl: Path, kind: str, dump: Path) -> list[list[str]]:
    """Rows without the head, split at blanks."""
    process = await asyncio.create_subprocess_exec(
        str(istioctl),
        "ztunnel-config",
        kind,
        "-f",
        str(dump),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # No cluster is meant, whatever the user's environment says.
        env={"PATH": os.defpath, "HOME": str(dump.parent), "KUBECONFIG": "/dev/null"},
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    head, *rows = [line.split() for line in out.decode().splitlines() if line.strip()]
    assert head[0].isupper()
    return rows


async def test_workloads(istioctl: Path, dump: Path, shop: Shop) -> None:
    rows = await table(istioctl, "workload", dump)
    (web,) = [row for row in rows if row[1] == "web"]
    assert web[0] == NAMESPACE
    assert shop.web.sandbox.ipv4 in web[2]
    assert web[3] == shop.web.sandbox.node.name
    assert web[-1] == "HBONE"
    (legacy,) = [row for row in rows if row[1] == "legacy"]
    assert legacy[-1] == "TCP"


async def test_services(istioctl: Path, dump: Path) -> None:
    rows = await table(istioctl, "service", dump)
    assert {row[1]: row[-1] for row in rows} == {"api": "1/1", "db": "1/1"}


async def test_policies(istioctl: Path, dump: Path) -> None:
    rows = await table(istioctl, "policy", dump)
    assert rows == [[NAMESPACE, "no-batch", "Deny", "WorkloadSelector"]]


async def test_certificates(istioctl: Path, dump: Path, shop: Shop) -> None:
    rows = await table(istioctl, "certificate", dump)
    mine = [row for row in rows if row[0] == spiffe(shop.web)]
    assert {row[1] for row in mine} >= {"Leaf", "Root"}
    assert {(row[2], row[3]) for row in mine} == {("Available", "true")}


async def test_connections(istioctl: Path, dump: Path, shop: Shop) -> None:
    rows = await table(istioctl, "connections", dump)
    (outbound,) = [row for row in rows if "Outbound" in row]
    assert outbound[0] == f"web.{NAMESPACE}"
    assert any("db" in cell for cell in outbound)
    assert outbound[-1] == "HBONE"
