"""DNS as pods see it: captured for real, answered by the mesh or relayed, never let past."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from functools import partial
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo import manifests
from agent.cli.demo.clients import Conversation, http_get
from agent.cli.demo.mesh import access_lines
from agent.cli.demo.netns import connect
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE
from tests.support.dns import AAAA, NOERROR, NXDOMAIN, Nameserver, ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop
    from tests.support.dns import Answer

pytestmark = pytest.mark.asyncio(loop_scope="module")

DB = f"db.{NAMESPACE}.svc.cluster.local"
# What Kubernetes would write: no search domain of another cluster, five dots.
SEARCH = f"search {NAMESPACE}.svc.cluster.local svc.cluster.local cluster.local"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def names(mesh: Mesh, shop: Shop) -> AsyncIterator[Nameserver]:
    """A nameserver outside the mesh, which every pod of the first node has in its resolv.conf."""
    async with Nameserver(shop.legacy.sandbox.namespace) as server:
        resolv_conf(mesh, shop).write_text(
            f"nameserver {shop.legacy.sandbox.ipv4}\n{SEARCH}\noptions ndots:5\n"
        )
        write_pods(mesh, shop)
        await mesh.until("the nameserver", partial(reaches, shop.web, server_of(shop)))
        yield server


def server_of(shop: Shop) -> str:
    return shop.legacy.sandbox.ipv4


def resolv_conf(mesh: Mesh, shop: Shop) -> Path:
    return mesh.folder / f"{shop.web.name}.resolv.conf"


def write_pods(mesh: Mesh, shop: Shop, *, capture: bool = True) -> None:
    """The first node's pod file, as an operator writes it."""
    node = mesh.world.nodes[0]
    mine = [pod for pod in mesh.pods if pod.ambient and pod.sandbox.node is node]
    more = {"resolvConf": str(resolv_conf(mesh, shop)), "dnsCapture": capture}
    manifests.write_list(mesh.pods_file(node), [pod.entry() | more for pod in mine])


async def look(pod: Pod, server: str, name: str, kind: int = 1) -> Answer:
    return await ask(pod.sandbox.namespace, server, name, kind)


async def reaches(pod: Pod, server: str) -> bool:
    try:
        answer = await ask(pod.sandbox.namespace, server, "known.example", timeout=2)
    except (OSError, TimeoutError):
        return False
    return answer.addresses == ("203.0.113.9",)


def rules(pod: Pod) -> str:
    enter = ["nsenter", f"--net=/run/netns/{pod.sandbox.namespace}", "nft", "list", "ruleset"]
    return subprocess.run(enter, capture_output=True, text=True, check=True).stdout


async def getent(pod: Pod, conf: Path, database: str, name: str) -> str:
    """The libc's own answer, with the pod's resolv.conf where it looks for it."""
    script = f"mount --bind {conf} /etc/resolv.conf && exec getent {database} {name}"
    process = await asyncio.create_subprocess_exec(
        *("nsenter", f"--net=/run/netns/{pod.sandbox.namespace}"),
        *("unshare", "--mount", "sh", "-c", script),
        stdout=subprocess.PIPE,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    return out.decode()


async def test_libc_finds_a_service_by_its_short_name_and_reaches_it_through_the_mesh(
    mesh: Mesh, shop: Shop, names: Nameserver
) -> None:
    before = len(names.asked)
    found = await getent(shop.web, resolv_conf(mesh, shop), "ahostsv4", "api")
    address = found.split()[0]
    assert address not in (shop.api.sandbox.ipv4, server_of(shop))
    answer = await http_get(shop.web, address, 80, "/by-name")
    assert f"api sees {shop.web.sandbox.ipv4} asking for /by-name" in answer
    log = mesh.log(mesh.world.nodes[0].name)
    told = partial(access_lines, log, f"api.{NAMESPACE}.svc.cluster.local", "dst.service")
    await mesh.until("the access log line", lambda: bool(told()))
    # Nobody outside was told what the pod looks for.
    assert len(names.asked) == before


async def test_service_names_are_answered_over_both_families(shop: Shop, names: Nameserver) -> None:
    for server in (shop.legacy.sandbox.ipv4, shop.legacy.sandbox.ipv6):
        for name in ("db", f"db.{NAMESPACE}", DB):
            answer = await look(shop.web, server, name)
            assert (answer.rcode, answer.authoritative) == (NOERROR, True)
            assert len(answer.addresses) == 1
        answer = await look(shop.web, server, DB, AAAA)
        assert (answer.rcode, answer.authoritative) == (NOERROR, True)
    assert not any(b"\x02db" in asked for asked in names.asked)


async def test_other_names_are_relayed_with_their_authority(shop: Shop, names: Nameserver) -> None:
    server = server_of(shop)
    assert (await look(shop.web, server, "known.example")).addresses == ("203.0.113.9",)
    gone = await look(shop.web, server, "gone.example")
    assert (gone.rcode, gone.authorities) == (NXDOMAIN, 1)
    assert any(b"\x04gone" in asked for asked in names.asked)
    # Whichever server the pod asks, its own resolv.conf's is asked for it.
    assert (await look(shop.web, "192.0.2.53", "known.example")).addresses == ("203.0.113.9",)


async def test_many_questions_leave_no_descriptor_behind(
    mesh: Mesh, shop: Shop, names: Nameserver
) -> None:
    pid = (await mesh.admin(mesh.world.nodes[0], "status"))["dataplane"]["pid"]

    def held() -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    before = held()
    for batch in range(20):
        questions = [f"n{batch}-{n}.example" for n in range(50)]
        answers = await asyncio.gather(
            *(look(shop.web, server_of(shop), name) for name in questions)
        )
        assert {answer.rcode for answer in answers} == {NXDOMAIN}
    # Tunnels of earlier tests may have come and gone.
    await mesh.until("descriptors given back", lambda: held() <= before + 2)


async def test_opting_out_is_live_and_leaves_connections_alone(
    mesh: Mesh, shop: Shop, names: Nameserver, capture: str
) -> None:
    server = server_of(shop)

    async def answers(rcode: int) -> bool:
        # One that is asked in the very moment of the change may be lost.
        with contextlib.suppress(TimeoutError):
            answer = await ask(shop.web.sandbox.namespace, server, DB, timeout=1)
            return answer.rcode == rcode
        return False

    async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        write_pods(mesh, shop, capture=False)
        await mesh.until("the nameserver's own answer", lambda: answers(NXDOMAIN))
        if capture == "nftables":
            assert ":15053" not in rules(shop.web)
            assert ":15001" in rules(shop.web)
        assert any(b"\x02db" in asked for asked in names.asked)
        assert await talk.echo("while DNS is off")
        write_pods(mesh, shop)
        await mesh.until("the mesh's answer", lambda: answers(NOERROR))
        assert await talk.echo("while DNS is on again")


async def test_killed_dataplane_lets_no_question_past_and_answers_again(
    mesh: Mesh, shop: Shop, names: Nameserver
) -> None:
    node = mesh.world.nodes[0]
    server = server_of(shop)
    before = len(names.asked)
    # Without its agent the data plane stays dead for as long as this looks.
    pid = (await mesh.admin(node, "status"))["dataplane"]["pid"]
    await mesh.kill(node.name)
    os.kill(pid, signal.SIGKILL)
    for name in ("known.example", "known.example", DB):
        with pytest.raises((OSError, TimeoutError)):
            await ask(shop.web.sandbox.namespace, server, name, timeout=1)
    assert len(names.asked) == before
    await mesh.start_agent(node)
    await mesh.until("answers again", partial(reaches, shop.web, server), node.name)
    assert (await look(shop.web, server, DB)).rcode == NOERROR
    await mesh.settled()


async def test_metrics_tell_who_asked_what(mesh: Mesh, shop: Shop, names: Nameserver) -> None:
    await look(shop.web, server_of(shop), DB)
    node = mesh.world.nodes[0].namespace
    reader, writer = await connect(node, "127.0.0.1", 15020)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    text = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    row = 'request_query_type="a",request_protocol="udp",source_canonical_service="web"'
    assert f"istio_dns_requests_total{{{row}" in text
    assert f"istio_dns_upstream_requests_total{{{row}" in text
