"""Sockets that applications open in unusual ways: carried by the mesh or refused, never past it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo.clients import Conversation
from agent.cli.demo.shop import ECHO_PORT, serve_echo
from agent.cli.demo.story import greets
from tests.support.intruder import run
from tests.support.leaks import Leaks
from tests.support.policies import applied, becomes, policy, source
from tests.support.proof import Logs, assert_talked, new_marker, nothing_in_clear
from tests.support.sysctl import always_cookies, netstat, write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")

CARRIED, REFUSED = "carried", "refused"
FAMILIES = pytest.mark.parametrize("family", ["ipv4", "ipv6"])
MPTCP_PORT = 9100
SECOND_ADDRESS = "10.99.1.200"
# To send data with the first SYN, without having been given a cookie before.
FAST_OPEN_WITHOUT_COOKIE = 1 | 4


@FAMILIES
@pytest.mark.parametrize(
    "case",
    [
        *("plain", "mptcp", "non_blocking", "io_uring", "io_uring=sqpoll"),
        *("fast_open", "fast_open_connect", "mark=0x539", "mark=0x1539"),
    ],
)
async def test_odd_ways_to_connect_are_carried_like_any_other(
    mesh: Mesh, shop: Shop, family: str, case: str
) -> None:
    write(shop.web, "net/ipv4/tcp_fastopen", FAST_OPEN_WITHOUT_COOKIE)
    host = getattr(shop.db.sandbox, family)
    marker, logs = new_marker(), Logs(mesh, shop.web, shop.db)
    async with nothing_in_clear(mesh, marker):
        (said,) = await run(shop.web, "odd_sockets", case, host, ECHO_PORT, marker)
    sees = getattr(shop.web.sandbox, family)
    assert_talked(said, shop.db, sees)
    # The application is told its real peer and its own address, whatever the kernel did.
    assert said.facts["peer"] == [host, ECHO_PORT]
    assert said.facts["local"][0] == sees
    await logs.both_name()


@FAMILIES
async def test_connections_are_carried_where_every_syn_is_answered_by_a_cookie(
    mesh: Mesh, shop: Shop, family: str
) -> None:
    """As under a flood: nothing is remembered of a SYN, so the last packet of the handshake looks
    for a listener again."""
    web, db, marker = shop.web, shop.db, new_marker()
    host, logs = getattr(db.sandbox, family), Logs(mesh, web, db)
    with always_cookies(web), always_cookies(db):
        before = [netstat(pod, "SyncookiesRecv") for pod in (web, db)]
        async with nothing_in_clear(mesh, marker):
            for case in ("plain", "mptcp", "non_blocking"):
                (said,) = await run(web, "odd_sockets", case, host, ECHO_PORT, marker)
                assert_talked(said, db, getattr(web.sandbox, family))
        (said,) = await run(shop.legacy, "odd_sockets", "plain", host, ECHO_PORT, new_marker())
        assert_talked(said, db, getattr(shop.legacy.sandbox, family))
        taken = [netstat(pod, "SyncookiesRecv") for pod in (web, db)]
    # Towards web's proxy; from the network to db's, and from there to the application.
    assert taken[0] >= before[0] + 3
    assert taken[1] >= before[1] + 5
    await logs.both_name(3)


@pytest.mark.parametrize("case", ["mapped", "mapped_mptcp"])
async def test_ipv4_destinations_on_ipv6_sockets_are_carried(
    mesh: Mesh, shop: Shop, case: str
) -> None:
    host = shop.db.sandbox.ipv4
    marker, logs = new_marker(), Logs(mesh, shop.web, shop.db)
    async with nothing_in_clear(mesh, marker):
        (said,) = await run(shop.web, "odd_sockets", case, host, ECHO_PORT, marker)
    assert_talked(said, shop.db, shop.web.sandbox.ipv4)
    assert said.facts["peer"] == [host, ECHO_PORT]
    await logs.both_name()


async def test_a_socket_without_memory_for_options_does_not_get_out(
    mesh: Mesh, shop: Shop, capture: str
) -> None:
    """The eBPF hook can't keep such a socket's destination, so it must refuse it."""
    verdict = {"nftables": CARRIED, "ebpf": REFUSED}[capture]
    marker = new_marker()
    arguments = ("option_memory=963", shop.db.sandbox.ipv4, ECHO_PORT, marker)
    async with nothing_in_clear(mesh, marker):
        keys, said = await run(shop.web, "odd_sockets", *arguments)
    assert keys.error == "ENOMEM", "nothing was exhausted"
    if verdict == CARRIED:
        assert_talked(said, shop.db, shop.web.sandbox.ipv4)
    else:
        assert said.error == "EPERM", said


@FAMILIES
async def test_sockets_bound_to_a_device_or_an_address_are_carried_or_reach_nobody(
    mesh: Mesh, shop: Shop, capture: str, family: str
) -> None:
    """What is bound to `lo` leaves by it, where eBPF leads everything anyway."""
    host, foreign = getattr(shop.db.sandbox, family), getattr(shop.batch.sandbox, family)
    cases = ["device=eth0", "device=lo", f"transparent={foreign}", f"free_bind={foreign}"]
    cases.append(f"mark_bound=0x111,{getattr(shop.web.sandbox, family)}")
    if family == "ipv4":
        cases += ["loopback_source=127.0.0.1", "loopback_source=127.0.0.77"]
    marker = new_marker()
    async with nothing_in_clear(mesh, marker):
        # Together, for each may take as long as a connection attempt lasts.
        said = await asyncio.gather(
            *(run(shop.web, "odd_sockets", case, host, ECHO_PORT, marker) for case in cases)
        )
    carried = {"nftables": (), "ebpf": ("device=lo", "mark_bound", "loopback_source")}[capture]
    for (one,) in said:
        if one.name.startswith(carried):
            assert_talked(one, shop.db, getattr(shop.web.sandbox, family))
        else:
            assert one.error, one


@FAMILIES
@pytest.mark.parametrize("case", ["device_late", "device_before_syn"])
async def test_a_socket_bound_to_a_device_after_connect_sends_nothing_past_us(
    mesh: Mesh, shop: Shop, family: str, case: str
) -> None:
    """Its packets still carry the address on loopback that it was led to, and would leave."""
    write(shop.web, "net/ipv4/tcp_fastopen", FAST_OPEN_WITHOUT_COOKIE)
    web, marker = shop.web.sandbox, new_marker()
    wire = Leaks(web.node.namespace, web.link, marker)
    with wire:
        (said,) = await run(
            shop.web, "odd_sockets", case, getattr(shop.db.sandbox, family), ECHO_PORT, marker
        )
    assert said.error, said
    assert wire.sightings == 0
    for seen in wire.seen:
        assert not ip_address(seen.destination).is_loopback, seen


@FAMILIES
async def test_one_socket_gets_each_destinations_own_verdict_in_every_order(
    mesh: Mesh, shop: Shop, family: str
) -> None:
    await serve_echo(mesh, shop.web)
    await mesh.until("web's own server", lambda: greets(shop.web, shop.web), "web")
    own, loopback = getattr(shop.web.sandbox, family), "127.0.0.1" if family == "ipv4" else "::1"
    places = {
        "allowed": getattr(shop.db.sandbox, family),
        "denied": getattr(shop.cart.sandbox, family),
        "loopback": loopback,
        "exempt": own,
    }
    marker, logs = new_marker(), Logs(mesh, shop.web, shop.db)
    content = policy("no-web", "DENY", [source(serviceAccounts=["web"])], app="cart")
    async with applied(mesh, shop, "no-web", content):
        await becomes(mesh, shop.web, shop.cart, allowed=False)
        async with nothing_in_clear(mesh, marker):
            arguments = [f"{name}={host}:{ECHO_PORT}" for name, host in places.items()]
            said = await run(shop.web, "reuse", marker, *arguments)
    await becomes(mesh, shop.web, shop.cart, allowed=True)
    assert len(said) == 24 * len(places)
    for one in said:
        if one.name == "denied":
            assert one.error, one
        elif one.name == "allowed":
            assert_talked(one, shop.db, own)
        else:
            # To itself, and as its own client.
            assert_talked(one, shop.web, places[one.name])
    await logs.both_name(24)


@FAMILIES
async def test_one_local_port_towards_two_destinations(
    mesh: Mesh, shop: Shop, capture: str, family: str
) -> None:
    """By eBPF all of IPv6 is led to ::1, where a port can't be used twice: refused at once."""
    hosts = {getattr(pod.sandbox, family): pod for pod in (shop.db, shop.cart)}
    marker = new_marker()
    async with nothing_in_clear(mesh, marker):
        said = await run(
            shop.web, "local_ports", "two_destinations", marker, ",".join(hosts), ECHO_PORT
        )
    assert [one.name for one in said] == list(hosts)
    first, second = said
    assert_talked(first, hosts[first.name], getattr(shop.web.sandbox, family))
    if (capture, family) == ("ebpf", "ipv6"):
        assert second.error == "EADDRNOTAVAIL", second
    else:
        assert_talked(second, hosts[second.name], getattr(shop.web.sandbox, family))


async def test_one_local_port_alternately_never_reaches_the_last_destination_again(
    mesh: Mesh, shop: Shop
) -> None:
    hosts = {pod.sandbox.ipv4: pod for pod in (shop.db, shop.cart)}
    marker = new_marker()
    async with nothing_in_clear(mesh, marker):
        said = await run(shop.web, "local_ports", "alternately", marker, ",".join(hosts), ECHO_PORT)
    assert len(said) == 6
    for one in said:
        assert_talked(one, hosts[one.name], shop.web.sandbox.ipv4)


@pytest.mark.parametrize("ending", ["again_after_reset", "again_after_close"])
async def test_a_source_port_is_used_again_within_a_second(
    mesh: Mesh, shop: Shop, ending: str
) -> None:
    marker, logs = new_marker(), Logs(mesh, shop.web, shop.db)
    async with nothing_in_clear(mesh, marker):
        said = await run(shop.web, "local_ports", ending, marker, shop.db.sandbox.ipv4, ECHO_PORT)
    assert len(said) == 3
    for one in said:
        assert_talked(one, shop.db, shop.web.sandbox.ipv4)
    await logs.both_name(3)


async def test_two_local_addresses_with_one_port_are_two_connections(
    mesh: Mesh, shop: Shop
) -> None:
    _second_address(shop)
    addresses = [shop.web.sandbox.ipv4, SECOND_ADDRESS]
    hosts = ",".join([shop.db.sandbox.ipv4, *addresses])
    marker, logs = new_marker(), Logs(mesh, shop.web, shop.db)
    async with nothing_in_clear(mesh, marker):
        said = await run(shop.web, "local_ports", "two_addresses", marker, hosts, ECHO_PORT)
    assert [one.name for one in said] == addresses
    for one in said:
        # The tunnel's own address: the server is told who called, not from which of its addresses.
        assert_talked(one, shop.db, shop.web.sandbox.ipv4)
        assert one.facts["local"][0] == one.name
    await logs.both_name(2)


async def test_nobody_in_the_pod_joins_our_listeners(mesh: Mesh, shop: Shop) -> None:
    web = shop.web.sandbox
    addresses = ["0.0.0.0", "127.0.0.1", "127.0.0.2", web.ipv4, "::", "::1", web.ipv6]
    ports = [15001, 15006, 15008]
    joined = ",".join(map(str, ports)), ",".join(addresses)
    said = await run(shop.web, "join_listeners", *joined)
    *attempts, done = said
    assert len(attempts) == len(addresses) * len(ports) * 5
    assert {one.error for one in attempts} == {"EADDRINUSE"}, attempts
    assert done.facts == {"listening": 0}
    async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("others untouched")


@FAMILIES
async def test_an_app_that_listens_by_mptcp_is_reached_through_the_mesh(
    mesh: Mesh, shop: Shop, mptcp_app: None, family: str
) -> None:
    host = getattr(shop.db.sandbox, family)
    for case in ("plain", "mptcp"):
        marker, logs = new_marker(), Logs(mesh, shop.web, shop.db)
        async with nothing_in_clear(mesh, marker):
            (said,) = await run(shop.web, "odd_sockets", case, host, MPTCP_PORT, marker)
        assert_talked(said, shop.db, getattr(shop.web.sandbox, family))
        await logs.both_name()


async def test_an_mptcp_client_outside_the_mesh_meets_the_policy_of_an_mptcp_app(
    mesh: Mesh, shop: Shop, mptcp_app: None
) -> None:
    host, marker = shop.db.sandbox.ipv4, new_marker()
    (said,) = await run(shop.legacy, "odd_sockets", "mptcp", host, MPTCP_PORT, marker)
    assert_talked(said, shop.db, shop.legacy.sandbox.ipv4)
    content = policy("meshed", "ALLOW", [source(principals=["*"])])
    async with applied(mesh, shop, "meshed", content):

        async def out() -> bool:
            return not await greets(shop.legacy, shop.db)

        await mesh.until("plaintext is out", out)
        (said,) = await run(shop.legacy, "odd_sockets", "mptcp", host, MPTCP_PORT, marker)
        assert said.error, said


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mptcp_app(mesh: Mesh, shop: Shop) -> AsyncIterator[None]:
    name = "mptcp-app"
    arguments = [sys.executable, "-m", "tests.attacks.mptcp_echo", "db", str(MPTCP_PORT)]
    await mesh.spawn(name, arguments, shop.db.sandbox.namespace)
    await mesh.until("the MPTCP app", lambda: "listening" in mesh.log(name).read_text(), name)
    yield
    await mesh.kill(name)


def _second_address(shop: Shop) -> None:
    """One more address of web's interface, routed to it."""
    web = shop.web.sandbox
    for namespace, command in (
        (web.namespace, f"ip addr add {SECOND_ADDRESS}/32 dev eth0"),
        (web.node.namespace, f"ip route add {SECOND_ADDRESS}/32 dev {web.link}"),
    ):
        subprocess.run(["nsenter", f"--net=/run/netns/{namespace}", *command.split()], check=True)
