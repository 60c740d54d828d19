"""UDP sockets that ask nameservers in unusual ways: every question is the mesh's, and its answer
seems to come from the server that was asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo import manifests
from agent.cli.demo.shop import NAMESPACE
from agent.cli.demo.story import greets
from tests.support.dns import NOERROR, Nameserver
from tests.support.intruder import run
from tests.support.proof import nothing_in_clear

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")

# The name as it stands in a question.
ON_WIRE = f"\x02db\x04{NAMESPACE}"
DB = f"db.{NAMESPACE}.svc.cluster.local"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def names(mesh: Mesh, shop: Shop) -> AsyncIterator[Nameserver]:
    """The nameserver of web's resolv.conf, outside the mesh."""
    node = shop.web.sandbox.node
    async with Nameserver(shop.legacy.sandbox.namespace) as server:
        conf = mesh.folder / "web.resolv.conf"
        conf.write_text(f"nameserver {shop.legacy.sandbox.ipv4}\n")
        mine = [pod for pod in mesh.pods if pod.ambient and pod.sandbox.node is node]
        more = {"resolvConf": str(conf), "dnsCapture": True}
        manifests.write_list(mesh.pods_file(node), [pod.entry() | more for pod in mine])
        await mesh.settled(node)
        await mesh.until("web reaches db", lambda: greets(shop.web, shop.db))

        async def answered() -> bool:
            said = await run(shop.web, "dns_client", "mapped", DB, shop.legacy.sandbox.ipv4)
            return said[0].facts.get("rcode") == NOERROR

        await mesh.until("DNS of the mesh", answered)
        yield server


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
@pytest.mark.parametrize("case", ["unconnected", "crossed", "connected"])
async def test_answers_seem_to_come_from_the_server_that_was_asked(
    mesh: Mesh, shop: Shop, names: Nameserver, capture: str, case: str, family: str
) -> None:
    """What eBPF can't tell yet is whom an answer is from while two servers are asked at once."""
    # One that serves and one that doesn't, on another node, so that a question past us shows.
    servers = [getattr(shop.legacy.sandbox, family), getattr(shop.db.sandbox, family)]
    before = len(names.asked)
    async with nothing_in_clear(mesh, ON_WIRE):
        said = await run(shop.web, "dns_client", case, DB, *servers)
    assert {one.name for one in said} == set(servers)
    for one in said:
        known = servers[-1:] if (capture, case) == ("ebpf", "crossed") else [one.name]
        assert one.facts.get("sender") in [[name, 53] for name in known], one
        assert one.facts["rcode"] == NOERROR
        assert len(one.facts["addresses"]) == 1
    # A name of the mesh is told to nobody outside.
    assert len(names.asked) == before


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
async def test_a_connected_socket_that_asks_another_server_asks_nobody_past_us(
    mesh: Mesh, shop: Shop, names: Nameserver, capture: str, family: str
) -> None:
    servers = [getattr(pod.sandbox, family) for pod in (shop.db, shop.legacy)]
    before = len(names.asked)
    async with nothing_in_clear(mesh, ON_WIRE):
        (said,) = await run(shop.web, "dns_client", "elsewhere", DB, *servers)
        (other,) = await run(shop.web, "dns_client", "elsewhere", DB, *reversed(servers))
    # Such a socket hears its own server only, which by eBPF is ours for both.
    expected = {"nftables": "ETIMEDOUT", "ebpf": ""}[capture]
    assert (said.error, other.error) == (expected, expected)
    assert len(names.asked) == before


async def test_ipv4_nameservers_on_an_ipv6_socket_are_the_meshs_too(
    shop: Shop, names: Nameserver
) -> None:
    servers = [shop.legacy.sandbox.ipv4, shop.db.sandbox.ipv4]
    before = len(names.asked)
    said = await run(shop.web, "dns_client", "mapped", DB, *servers)
    assert [(one.name, one.facts.get("sender")) for one in said] == [
        (server, [server, 53]) for server in servers
    ]
    assert len(names.asked) == before
