"""UDP that the mesh doesn't carry: refused where a namespace says so, and counted everywhere."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo import manifests
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import Mesh, MeshError
from agent.cli.demo.netns import inside
from tests.attacks.datagrams import UDP, UDP_LITE
from tests.netns.test_traffic import metrics
from tests.support.dns import NOERROR, Nameserver
from tests.support.intruder import Heard, run, started
from tests.support.leaks import Leaks
from tests.support.meshes import mesh_of, stocked
from tests.support.operator import ask
from tests.support.proof import new_marker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import World

pytestmark = pytest.mark.asyncio(loop_scope="module")

PORT = 9300
STRICT = "strict"
DENY = f"namespaces: {{{STRICT}: {{udp: deny}}}}\n"
FAMILIES = pytest.mark.parametrize("family", ["ipv4", "ipv6"])
KNOWN = "known.example"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    options = ("--verify-interval=1s",)
    async with mesh_of(Mesh, world, capture, folder, *options, settings=DENY) as made:
        yield made


@dataclass(frozen=True)
class Town:
    mesh: Mesh
    shop: Shop
    # In the strict namespace, beside web.
    quiet: Pod

    def write(self, **settings: object) -> None:
        """The pod list of quiet's node, with these settings of its own for quiet."""
        node = self.quiet.sandbox.node
        mine = [pod for pod in self.mesh.pods if pod.ambient and pod.sandbox.node is node]
        more = {self.quiet.uid: settings}
        entries = [pod.entry() | more.get(pod.uid, {}) for pod in mine]
        manifests.write_list(self.mesh.pods_file(node), entries)

    async def counted(self, pod: Pod) -> tuple[int, int]:
        """Refused and unprotected."""
        found = await self.mesh.admin(pod.sandbox.node, "pods")
        row = next(one for one in found if one["uid"] == pod.uid)
        return row["udp_refused"], row["udp_unprotected"]

    async def counts(self, pod: Pod, refused: int, unprotected: int) -> None:
        """Waits until exactly so much is told."""

        async def told() -> bool:
            return await self.counted(pod) == (refused, unprotected)

        try:
            await self.mesh.until("the pod's counts", told, seconds=10)
        except MeshError:
            assert await self.counted(pod) == (refused, unprotected)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def town(mesh: Mesh) -> AsyncIterator[Town]:
    """All but batch serve UDP."""
    shop = await stocked(mesh)
    quiet = Pod(mesh.world.add_pod(mesh.world.nodes[0], "quiet"), STRICT, "quiet")
    mesh.apply("strict", manifests.namespace(STRICT))
    mesh.add(quiet)
    await mesh.start()
    async with AsyncExitStack() as servers:
        for pod in (quiet, shop.web, shop.db, shop.legacy):
            # Such a socket may be nobody's where UDP is denied.
            protocols = (UDP,) if pod is quiet else (UDP, UDP_LITE)
            server = started(pod, "datagrams", "serve", PORT, pod.name, *protocols)
            await servers.enter_async_context(server)
        yield Town(mesh, shop, quiet)


async def exchange(
    client: Pod, host: str, *cases: str, marker: str = "", port: int = PORT
) -> dict[str, Heard]:
    arguments = [f"{case}={host}" for case in cases]
    own = client.sandbox.ipv6 if ":" in host else client.sandbox.ipv4
    said = await run(client, "datagrams", marker or new_marker(), port, own, *arguments)
    return {one.name: one for one in said}


@FAMILIES
async def test_where_udp_is_denied_datagrams_reach_the_pod_itself_alone(
    town: Town, family: str
) -> None:
    cases = ["connected", "unconnected", "reused", "elsewhere", "multicast"]
    cases += ["udplite", "udplite_connected"]
    if family == "ipv4":
        cases += ["mapped", "mapped_connected"]
    marker = new_marker()
    refused, passed = await town.counted(town.quiet)
    with Leaks(town.mesh.world.nodes[0].namespace, "wire", marker) as wire:
        host = getattr(town.shop.db.sandbox, family)
        said = await exchange(town.quiet, host, *cases, marker=marker)
        host = getattr(town.shop.legacy.sandbox, family)
        beside = await exchange(town.quiet, host, "connected", "unconnected", marker=marker)
    assert list(said) == cases
    # The application is told at once.
    for one in (*said.values(), *beside.values()):
        assert one.error in ("EPERM", "ECONNREFUSED"), one
    assert wire.sightings == 0
    for host in (getattr(town.quiet.sandbox, family), "127.0.0.1" if family == "ipv4" else "::1"):
        own = await exchange(town.quiet, host, "connected", "unconnected")
        assert {one.facts.get("answer") for one in own.values()} == {"quiet "}, own
    await town.counts(town.quiet, refused + len(said) + len(beside), passed)


@FAMILIES
async def test_where_udp_is_denied_nobody_is_heard(town: Town, family: str) -> None:
    refused, passed = await town.counted(town.quiet)
    host = getattr(town.quiet.sandbox, family)
    _, webs = await town.counted(town.shop.web)
    clients = (town.shop.web, town.shop.batch, town.shop.legacy)
    for said in await asyncio.gather(
        *(exchange(client, host, "connected", "unconnected") for client in clients)
    ):
        assert said["connected"].error == "ECONNREFUSED", said
        assert said["unconnected"].error == "ETIMEDOUT", said
    await town.counts(town.quiet, refused + 6, passed)
    # Nothing refused them where they are.
    await town.counts(town.shop.web, 0, webs + 2)


@FAMILIES
async def test_neighbours_talk_and_their_flows_are_counted(town: Town, family: str) -> None:
    web, db = town.shop.web, town.shop.db
    _, mine = await town.counted(web)
    _, theirs = await town.counted(db)
    cases = ["connected", "unconnected", "thrice", "udplite_connected"]
    said = await exchange(web, getattr(db.sandbox, family), *cases)
    assert {one.facts.get("answer") for one in said.values()} == {"db "}, said
    await town.counts(web, 0, mine + len(cases))
    await town.counts(db, 0, theirs + len(cases))


@FAMILIES
async def test_dns_works_where_udp_is_denied_captured_or_not(town: Town, family: str) -> None:
    server = getattr(town.shop.legacy.sandbox, family)
    conf = town.mesh.folder / f"{family}.resolv.conf"
    conf.write_text(f"nameserver {server}\n")

    async def answered() -> bool:
        said = await run(town.quiet, "dns_client", "connected", KNOWN, server)
        said += await run(town.quiet, "dns_client", "unconnected", KNOWN, server)
        return {one.facts.get("rcode") for one in said} == {NOERROR}

    async with Nameserver(town.shop.legacy.sandbox.namespace) as names:
        town.write(resolvConf=str(conf))
        await town.mesh.until("DNS through the data plane", answered, seconds=15)
        asked = len(names.asked)
        town.write(dnsCapture=False)

        async def asked_itself() -> bool:
            # What passes is shown: each question is a flow of its own.
            before = len(names.asked)
            try:
                return await answered() and len(names.asked) == before + 12
            except AssertionError:
                # A socket connected before the change keeps loopback as its own address, and can't
                # be connected elsewhere.
                return False

        await town.mesh.until("DNS past the data plane", asked_itself, seconds=15)
        assert len(names.asked) > asked
        said = await exchange(town.quiet, server, "connected", "unconnected")
        assert all(one.error for one in said.values()), said
    town.write()


async def test_another_setting_holds_for_pods_that_live(town: Town, capture: str) -> None:
    mesh, quiet = town.mesh, town.quiet
    node, file = quiet.sandbox.node, mesh.folder / "agent.yaml"
    host = town.shop.db.sandbox.ipv4

    async def heard() -> bool:
        said = await exchange(quiet, host, "connected", "unconnected")
        answers = {one.facts.get("answer") for one in said.values()}
        assert answers in ({"db "}, {None})
        return answers == {"db "}

    assert not await heard()
    for text, wanted in (("", True), (DENY, False)):
        file.write_text(text)
        await mesh.kill(node.name, signal.SIGUSR2)
        await mesh.start_agent(node)
        await mesh.settled(node)

        async def as_wanted(wanted: bool = wanted) -> bool:
            return await heard() == wanted

        await mesh.until("the other setting", as_wanted, seconds=10)
    row = next(one for one in await mesh.admin(node, "pods") if one["uid"] == quiet.uid)
    assert row["repairs"] == 0, "nobody had changed it"


async def test_counts_are_in_the_table_and_the_metrics(town: Town) -> None:
    quiet = town.quiet
    node = quiet.sandbox.node
    await exchange(quiet, town.shop.db.sandbox.ipv4, "unconnected")
    await exchange(town.shop.web, town.shop.db.sandbox.ipv4, "unconnected")

    def told() -> bool:
        text = inside(node.namespace, lambda: metrics("127.0.0.1", 15020))
        found = re.findall(r'^underpass_agent_udp_total{result="(\w+)"} (\S+)', text, re.M)
        return {name for name, value in found if float(value) > 0} == {"refused", "unprotected"}

    await town.mesh.until("metrics", told, seconds=10)
    table = await ask(town.mesh.run_dir, node.name, "pods", "-o", "wide")
    assert table.tells("UDP REFUSED", "UDP FLOWS"), table.text


async def test_sockets_whose_packets_cannot_be_captured_are_shown(town: Town) -> None:
    pod, mesh = town.shop.batch, town.mesh

    def opened() -> list[socket.socket]:
        packet = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
        kinds = (socket.AF_INET, socket.AF_INET6)
        return [
            packet,
            *(socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_TCP) for kind in kinds),
        ]

    async def shown(count: int) -> bool:
        found = await mesh.admin(pod.sandbox.node, "pods")
        return bool(next(one for one in found if one["uid"] == pod.uid)["raw_sockets"] == count)

    held = inside(pod.sandbox.namespace, opened)
    try:
        await mesh.until("three raw sockets", lambda: shown(3), seconds=10)
        said = await ask(mesh.run_dir, pod.sandbox.node.name, "pods", "-o", "wide")
        assert "RAW SOCKETS" in said.text
    finally:
        for one in held:
            one.close()
    await mesh.until("none any more", lambda: shown(0), seconds=10)
