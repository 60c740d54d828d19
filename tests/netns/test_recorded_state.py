"""What capture remembers of connections can't be turned against it: chosen source ports, repeated
tuples, addresses used again, numbers of connections."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.clients import Conversation
from agent.cli.demo.manifests import Pod, namespace
from agent.cli.demo.mesh import access_lines
from agent.cli.demo.netns import open_socket
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE, serve_echo
from agent.cli.demo.story import greets, spiffe
from tests.support.intruder import HOST, finished, run, started
from tests.support.policies import applied, becomes, policy, source
from tests.support.proof import Logs, new_marker, nothing_in_clear
from tests.support.sockets import ESTABLISHED, TIME_WAIT, tcp_sockets, tracked
from tests.support.sysctl import always_cookies, write
from tests.support.vitals import Vitals, counted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import PodSandbox
    from tests.support.intruder import Heard

pytestmark = pytest.mark.asyncio(loop_scope="module")

# At once; the issue asks for as many.
BURST = 10_000
# `make test-long`.
LONG = "UNDERPASS_TEST_LONG" in os.environ
# In turn. test_no_leaks.py has ten thousand; here it is ports and states that would show. The issue
# asks for the larger number, which takes minutes.
CHURN = 100_000 if LONG else 5_000
# Local ports that are left to a pod, and how many of them it uses towards each destination.
PORTS, USED = 600, 500
# The local ports that a pod can have, and how many connections it makes to one destination at once.
# Beyond its budget, which is below what a process may have open here, they are refused.
# None of the ports above: some of those may be in TIME_WAIT yet.
WIDE, TO_ONE = ((1024, 65_535), 30_000) if LONG else ((42_000, 42_599), 580)
# The default of limits.pod-max-connections.
AT_MOST = 16_384
# A local port that nobody else uses, and how often it is used.
PORT, TIMES = 45_678, 60
# SO_NETNS_COOKIE of asm-generic/socket.h.
NETNS_COOKIE = 71
# The budget of a pod while the test of budgets runs.
BUDGET = 100


def echo(pod: Pod) -> str:
    return f"{pod.sandbox.ipv4}:{ECHO_PORT}={pod.name}"


def echo6(pod: Pod) -> str:
    return f"{pod.sandbox.ipv6}:{ECHO_PORT}={pod.name}"


@pytest.mark.timeout(200)
async def test_a_pod_at_its_budget_is_refused_alone(mesh: Mesh, shop: Shop) -> None:
    # First of all: attempts towards a pod that was deleted count for ten seconds more.
    node = shop.web.sandbox.node
    await limited(mesh, shop, f"--limits-pod-max-connections={BUDGET}")
    reason = {"reason": "too_many_connections"}
    before = await counted(node, "underpass_refusals_total", **reason)
    async with started(shop.web, "hold", BUDGET + 50, echo(shop.db)) as (held, process):
        assert held.facts["right"] == {"db": BUDGET}, held
        assert sum(held.facts["errors"].values()) == 50
        assert await counted(node, "underpass_refusals_total", **reason) == before + 50
        # The neighbour has all of its own.
        async with started(shop.batch, "hold", BUDGET - 10, echo(shop.db)) as (beside, other):
            assert beside.facts["right"] == {"db": BUDGET - 10}, beside
            await finished(other)
        await finished(process)
    await mesh.until("web is let in again", lambda: greets(shop.web, shop.db))
    await limited(mesh, shop)


async def test_a_client_that_chooses_the_port_of_a_recorded_connection_gets_its_own_verdict(
    mesh: Mesh, shop: Shop
) -> None:
    async def attempt(port: int) -> str:
        arguments = (f"source_port={port}", shop.web.sandbox.ipv4, ECHO_PORT, new_marker())
        (said,) = await run(shop.legacy, "odd_sockets", *arguments)
        return said.greeting or said.error

    content = policy("only-batch", "ALLOW", [source(serviceAccounts=["batch"])], app="web")
    async with answers(mesh, shop, shop.web):
        async with started(shop.web, "hold", 5, echo(shop.db)) as (held, process):
            assert held.facts["right"] == {"db": 5}, held
            ports = held.facts["ports"]
            for port in ports[:2]:
                assert await attempt(port) == f"web sees {shop.legacy.sandbox.ipv4}"
            async with applied(mesh, shop, "only-batch", content):
                await becomes(mesh, shop.legacy, shop.web, allowed=False)
                live = [await attempt(port) for port in ports[2:4]]
                await finished(process)
                stale = [await attempt(port) for port in ports]
                for outcome in live + stale:
                    assert "sees" not in outcome
        await becomes(mesh, shop.legacy, shop.web, allowed=True)


@pytest.mark.parametrize("cookies", [False, True], ids=["", "cookies"])
async def test_the_tuple_of_a_relayed_connection_opens_no_way_to_the_app(
    mesh: Mesh, shop: Shop, *, cookies: bool
) -> None:
    """What the data plane dialled towards the app is exempt from capture: a SYN from the network
    with the same four numbers, while that lives and after, is not."""
    node, web, batch = shop.web.sandbox.node, shop.web.sandbox, shop.batch.sandbox
    mac = hardware(web)

    async def spoof(port: int) -> Heard:
        ends = (batch.ipv4, port, web.ipv4, ECHO_PORT)
        (said,) = await run(node, "spoof", web.link, mac, *ends, rights=HOST)
        return said

    content = policy("only-batch", "ALLOW", [source(serviceAccounts=["batch"])], app="web")
    async with answers(mesh, shop, shop.web), AsyncExitStack() as policies:
        if cookies:
            policies.enter_context(always_cookies(shop.web))
        with silenced(batch):
            # The handshake works, and reaches the app as long as the policy lets anybody in.
            control = await spoof(50_123)
            assert control.facts.get("said") == f"web sees {batch.ipv4}\n", control
        await policies.enter_async_context(applied(mesh, shop, "only-batch", content))
        await becomes(mesh, shop.legacy, shop.web, allowed=False)
        async with Conversation(shop.batch, web.ipv4, ECHO_PORT) as talk:
            assert talk.greeting == f"web sees {batch.ipv4}"
            (port,) = relayed(shop.web, batch)
            # Whose address it is must not answer to what it didn't send.
            with silenced(batch):
                live = await spoof(port)
            assert not live.facts["accepted"], live
            assert await talk.echo("not disturbed")
        await mesh.until("the relay's end", lambda: not relayed(shop.web, batch))
        with silenced(batch):
            stale, fresh = await spoof(port), await spoof(port + 1)
        for said in (stale, fresh):
            assert not said.facts.get("said"), said


async def test_addresses_used_again_carry_nothing_of_their_last_pods_identity(
    mesh: Mesh, shop: Shop
) -> None:
    node = shop.web.sandbox.node
    content = policy("no-first", "DENY", [source(serviceAccounts=["first"])])
    byte = node.next_pod
    first = await joined(mesh, Pod(mesh.world.add_pod(node, "first"), NAMESPACE, "first"))
    async with applied(mesh, shop, "no-first", content):
        await becomes(mesh, first, shop.db, allowed=False)
        # Another namespace with the same addresses.
        cookie = netns_cookie(first)
        await left(mesh, first)
        sandbox = mesh.world.add_pod(node, "second", host_byte=byte)
        assert sandbox.ipv4 == first.sandbox.ipv4
        second = await joined(mesh, Pod(sandbox, NAMESPACE, "second"))
        # The kernel gives no number again before the machine starts anew.
        assert netns_cookie(second) != cookie
        logs = Logs(mesh, second, shop.db)
        await becomes(mesh, second, shop.db, allowed=True)
        await logs.both_name()
        # The same namespace for another pod.
        mesh.remove(second)
        await mesh.settled(node)
        mesh.apply("namespace-other", namespace("other"))
        third = await joined(mesh, Pod(sandbox, "other", "first"))
        logs = Logs(mesh, third, shop.db)
        await becomes(mesh, third, shop.db, allowed=True)
        await logs.both_name()
    await left(mesh, third)


async def test_a_pod_deleted_while_it_connects_sends_nothing_in_clear(
    mesh: Mesh, shop: Shop
) -> None:
    node = shop.web.sandbox.node
    victim = await joined(mesh, Pod(mesh.world.add_pod(node, "victim"), NAMESPACE, "victim"))
    await serve_echo(mesh, victim)
    await mesh.until("victim answers", lambda: greets(shop.batch, victim), "victim")
    async with (
        nothing_in_clear(mesh, new_marker()),
        started(victim, "churn", echo(shop.db), 0),
        started(shop.web, "churn", echo(victim), 0) as (_, towards),
    ):
        node_log = mesh.log(node.name)
        await mesh.until(
            "both are connecting",
            lambda: (
                bool(access_lines(node_log, spiffe(victim), spiffe(shop.db)))
                and bool(access_lines(node_log, spiffe(shop.web), spiffe(victim)))
            ),
        )
        # As a kubelet does: first the processes and the namespace, then the list.
        mesh.world.remove_pod(victim.sandbox)
        mesh.remove(victim)
        await mesh.settled(node)
        (said,) = await finished(towards)
    assert said.facts["right"] > 0
    assert said.facts["wrong"] == {}
    assert await greets(shop.web, shop.db)


async def test_each_destination_has_all_the_local_ports_of_a_pod(mesh: Mesh, shop: Shop) -> None:
    write(shop.web, "net/ipv4/ip_local_port_range", f"40000 {40000 + PORTS - 1}")
    arguments = (2 * USED, echo(shop.db), echo(shop.cart))
    async with started(shop.web, "hold", *arguments) as (held, process):
        assert held.facts["right"] == {"db": USED, "cart": USED}, held
        assert held.facts["wrong"] == []
        await finished(process)
    write(shop.web, "net/ipv4/ip_local_port_range", "32768 60999")


@pytest.mark.timeout(600)
async def test_one_destination_takes_as_many_connections_as_a_pod_may_have(
    mesh: Mesh, shop: Shop
) -> None:
    node, fits = shop.web.sandbox.node, min(TO_ONE, AT_MOST)
    reason = {"reason": "too_many_connections"}
    before = await counted(node, "underpass_refusals_total", **reason)
    async with AsyncExitStack() as processes:
        write(shop.web, "net/ipv4/ip_local_port_range", f"{WIDE[0]} {WIDE[1]}")
        processes.callback(write, shop.web, "net/ipv4/ip_local_port_range", "32768 60999")
        # More than one process may have open.
        halves = [
            processes.enter_async_context(
                started(shop.web, "hold", TO_ONE // 2, echo(shop.db), seconds=200)
            )
            for _ in range(2)
        ]
        held = [heard for heard, _ in await asyncio.gather(*halves)]
        assert [half.facts["wrong"] for half in held] == [[], []]
        assert sum(half.facts["right"]["db"] for half in held) == fits, held
        refused = await counted(node, "underpass_refusals_total", **reason) - before
        assert refused == TO_ONE - fits
    await quiet(mesh, shop)
    await mesh.until("web is let in again", lambda: greets(shop.web, shop.db))


async def test_a_source_port_used_again_at_once_leads_to_whom_it_dialled(
    mesh: Mesh, shop: Shop
) -> None:
    for to in (echo, echo6):
        # Another one and the same one after each of them.
        servers = (to(shop.db), to(shop.cart), to(shop.cart))
        (said,) = await run(shop.web, "same_port", PORT, TIMES, *servers)
        assert said.facts["wrong"] == []
        assert said.facts["right"] == {"db": TIMES // 3, "cart": TIMES * 2 // 3}, said


@pytest.mark.timeout(200)
async def test_ten_thousand_connects_in_a_burst_reach_whom_they_were_meant_for(
    mesh: Mesh, shop: Shop, capture: str
) -> None:
    node = shop.db.sandbox.node
    stock = await joined(mesh, Pod(mesh.world.add_pod(node, "stock"), NAMESPACE, "stock"))
    async with answers(mesh, shop, stock):
        async with nothing_in_clear(mesh, new_marker()):
            arguments = (BURST, echo(shop.db), echo(stock))
            async with started(shop.web, "hold", *arguments) as (held, process):
                assert held.facts["wrong"] == []
                assert held.facts["right"] == {"db": BURST // 2, "stock": BURST // 2}, held
                for pod in (shop.web, shop.db):
                    entries = tracked(pod)
                    # Rules need connection tracking; hooks do without.
                    assert (entries == 0) if capture == "ebpf" else (entries >= BURST // 2), entries
                await finished(process)
        await quiet(mesh, shop)
    await left(mesh, stock)


@pytest.mark.timeout(900)
async def test_many_connections_in_turn_leave_no_time_wait_of_ours_and_no_memory(
    mesh: Mesh, shop: Shop, capture: str
) -> None:
    assert await greets(shop.web, shop.db)
    vitals = await Vitals.of(mesh, *mesh.world.nodes)
    # Local ports of the data plane's connections to the application are used more than once.
    write(shop.db, "net/ipv4/ip_local_port_range", f"40000 {40000 + min(CHURN * 3 // 5, 20_000)}")
    for _ in range(2):
        _, said = await run(shop.web, "churn", echo(shop.db), CHURN // 2, seconds=400)
        assert said.facts == {"right": CHURN // 2, "wrong": {}, "errors": {}}
        # The kernel gives none of them out again within two seconds (tcp_tw_reuse).
        await asyncio.sleep(2.5)
    write(shop.db, "net/ipv4/ip_local_port_range", "32768 60999")
    ours = {15001, 15006, 15008}
    for pod in (shop.web, shop.db):
        waiting = [sock for sock in tcp_sockets(pod) if sock.state == TIME_WAIT]
        assert not [sock for sock in waiting if sock.local_port in ours]
        # By eBPF those are the applications' own, which they have without a mesh as well.
        if capture == "nftables":
            assert not [sock for sock in waiting if sock.remote_port in ours]
        else:
            assert tracked(pod) == 0
    await vitals.recovered(mesh)


@asynccontextmanager
async def answers(mesh: Mesh, shop: Shop, pod: Pod) -> AsyncIterator[None]:
    """An echo server in the pod for the length of the block."""
    await serve_echo(mesh, pod)
    await mesh.until(f"{pod.name} answers", lambda: greets(shop.batch, pod), pod.name)
    yield
    await mesh.kill(pod.name)


async def quiet(mesh: Mesh, shop: Shop) -> None:
    """Waits until the first node carries nothing any more."""

    async def ended() -> bool:
        return not await mesh.admin(shop.web.sandbox.node, "connections")

    await mesh.until("every connection's end", ended)


def relayed(server: Pod, client: PodSandbox) -> set[int]:
    """The client's ports, as the server's pod sees its live connections to the echo server."""
    return {
        sock.remote_port
        for sock in tcp_sockets(server)
        if (sock.local_port, sock.remote, sock.state) == (ECHO_PORT, client.ipv4, ESTABLISHED)
    }


async def limited(mesh: Mesh, shop: Shop, *options: str) -> None:
    """The first node's agent starts anew with further options; its data plane goes on."""
    node = shop.web.sandbox.node
    await mesh.kill(node.name)
    usual = mesh.agent_options
    mesh.agent_options = (*usual, *options)
    await mesh.start_agent(node)
    mesh.agent_options = usual
    await mesh.settled(node)


async def joined(mesh: Mesh, pod: Pod) -> Pod:
    mesh.add(pod)
    await mesh.settled(pod.sandbox.node)
    return pod


async def left(mesh: Mesh, pod: Pod) -> None:
    mesh.world.remove_pod(pod.sandbox)
    mesh.remove(pod)
    await mesh.settled(pod.sandbox.node)


@contextmanager
def silenced(sandbox: PodSandbox) -> Iterator[None]:
    """Nothing reaches the pod: what is sent to it gets no answer of its kernel."""
    # A black hole answers nothing either: an unreachable address would end the handshake.
    ip(sandbox.node.namespace, f"route replace blackhole {sandbox.ipv4}/32")
    try:
        yield
    finally:
        ip(sandbox.node.namespace, f"route replace {sandbox.ipv4}/32 dev {sandbox.link}")


def netns_cookie(pod: Pod) -> int:
    with open_socket(pod.sandbox.namespace, socket.AF_INET) as made:
        cookie = made.getsockopt(socket.SOL_SOCKET, NETNS_COOKIE, 8)
    return int.from_bytes(cookie, sys.byteorder)


def hardware(sandbox: PodSandbox) -> str:
    """The link-layer address of the pod's end."""
    shown = json.loads(ip(sandbox.namespace, "-json link show dev eth0"))
    return str(shown[0]["address"])


def ip(namespace: str, command: str) -> str:
    arguments = ["ip", "-netns", namespace, *command.split()]
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
