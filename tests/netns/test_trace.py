"""`underpass trace` against the truth: real connections, questions and refused packets of pods."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.clients import Conversation
from agent.cli.demo.netns import inside
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE
from tests.support.dns import Nameserver, ask
from tests.support.eventually import eventually
from tests.support.operator import ask as run
from tests.support.trace import Trace

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")

# bpf(2)
_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
_PROG_GET_NEXT_ID = 11


def local(talk: Conversation, capture: str) -> str:
    """As the kernel has it: eBPF leads the socket to loopback, and shows it as it was meant."""
    host, port = talk._streams[1].get_extra_info("sockname")[:2]
    return f"{host if capture == 'nftables' else '127.0.0.1'}:{port}"


async def test_a_live_connection_is_printed_within_two_seconds(
    mesh: Mesh, shop: Shop, capture: str
) -> None:
    where = shop.db.sandbox.ipv4
    async with Conversation(shop.web, where, ECHO_PORT) as talk:
        assert await talk.echo("x" * 999)
        async with Trace(mesh, "connections", "--pod", "web") as trace:
            row = await trace.row(event="open", source=local(talk, capture))
            took = time.monotonic() - trace.started
    assert took < 2
    assert row["destination"] == f"{where}:{ECHO_PORT}"
    assert (row["pod"], row["pod_uid"]) == (f"{NAMESPACE}/web", shop.web.uid)
    assert (row["direction"], row["captured"], row["via"]) == ("outbound", True, 15001)
    greeting = len(talk.greeting) + 1
    assert (row["sent"], row["received"]) == (1000, greeting + 1000)


async def test_a_new_connection_is_told_at_both_ends_as_it_was(
    mesh: Mesh, shop: Shop, capture: str
) -> None:
    where = shop.db.sandbox.ipv4
    async with (
        Trace(mesh, "connections", "--pod", "web") as trace,
        Trace(mesh, "connections", "--pod", "db", node=1) as far,
    ):
        await trace.ready()
        await far.ready()
        async with Conversation(shop.web, where, ECHO_PORT) as talk:
            source, greeting = local(talk, capture), len(talk.greeting) + 1
            opened = await trace.row(event="opened", source=source)
            assert await talk.echo("y" * 4999)
            said = await talk.finish()
        closed = await trace.row(event="closed", source=source)
        served = await far.row(event="closed", direction="inbound", by="app")
        far_opened = await far.row(event="opened", source=served["source"])
    assert opened["destination"] == closed["destination"] == f"{where}:{ECHO_PORT}"
    assert (opened["captured"], opened["via"], opened["pod"]) == (True, 15001, f"{NAMESPACE}/web")
    assert opened["pid"] == os.getpid()
    assert (closed["sent"], closed["received"]) == (5000, greeting + 5000 + len(said))
    assert 0 < closed["connect_us"] <= 1000 * (closed["duration_ms"] + 1)
    # The application sees the client's own address; the bytes are the same.
    assert served["source"].startswith(f"{shop.web.sandbox.ipv4}:")
    assert served["destination"] == f"{where}:{ECHO_PORT}"
    assert (served["sent"], served["received"]) == (closed["received"], closed["sent"])
    assert (far_opened["captured"], far_opened["via"]) == (True, 15008)
    assert far_opened["pod"] == f"{NAMESPACE}/db"
    # Only these pods' applications were asked for.
    assert {row["by"] for row in (*trace.rows, *far.rows)} == {"app"}
    assert {row["pod"] for row in trace.rows} == {f"{NAMESPACE}/web"}


async def test_plaintext_from_outside_the_mesh_is_told_by_its_own_port(
    mesh: Mesh, shop: Shop
) -> None:
    async with Trace(mesh, "connections", "--pod", "cart") as trace:
        await trace.ready()
        async with Conversation(shop.legacy, shop.cart.sandbox.ipv4, ECHO_PORT) as talk:
            assert talk.greeting
            row = await trace.row(event="opened", direction="inbound")
    assert (row["captured"], row["via"]) == (True, 15006)


async def test_ipv6_and_a_refused_connection_past_the_mesh(mesh: Mesh, shop: Shop) -> None:
    where = shop.db.sandbox.ipv6
    async with Trace(mesh, "connections", "--namespace", NAMESPACE) as trace:
        await trace.ready()
        async with Conversation(shop.web, where, ECHO_PORT):
            row = await trace.row(event="opened", destination=f"[{where}]:{ECHO_PORT}")
        assert row["pod"] == f"{NAMESPACE}/web"
        # Loopback isn't captured, and nobody listens there.
        inside(shop.web.sandbox.namespace, lambda: _refused("127.0.0.1", 9))
        failed = await trace.row(event="failed", destination="127.0.0.1:9")
    assert (failed["captured"], failed["pod"]) == (False, f"{NAMESPACE}/web")


async def test_of_a_burst_each_is_told_once_and_as_captured(mesh: Mesh, shop: Shop) -> None:
    async def once() -> None:
        async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
            assert talk.greeting

    async with Trace(mesh, "connections", "--pod", "web", "--port", str(ECHO_PORT)) as trace:
        await trace.ready()
        for _ in range(10):
            await asyncio.gather(*(once() for _ in range(30)))
        await eventually(
            lambda: len(trace.rows) >= 600 or "lost" in trace.notes,
            what=lambda: (len(trace.rows), trace.notes),
        )
    told = Counter((row["event"], row["captured"]) for row in trace.rows)
    if "lost" in trace.notes:
        # The kernel runs no program twice at once on a core: what it left out is told.
        assert {captured for _, captured in told} <= {True, None}
        assert max(Counter((row["event"], row["source"]) for row in trace.rows).values()) == 1
    else:
        assert told == {("opened", True): 300, ("closed", True): 300}


async def test_all_shows_the_data_planes_tunnel_and_port_chooses(mesh: Mesh, shop: Shop) -> None:
    async with Trace(mesh, "connections", "--all", "--port", "15008") as trace:
        await trace.ready()
        async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT):
            row = await trace.row(by="underpass", direction="outbound", pod=f"{NAMESPACE}/web")
    assert row["destination"] == f"{shop.db.sandbox.ipv4}:15008"
    assert all("15008" in row["source"] + row["destination"] for row in trace.rows)


async def test_latency_is_told_by_connection_and_summed_up(
    mesh: Mesh, shop: Shop, capture: str
) -> None:
    async with Trace(mesh, "latency", "--pod", "web") as trace:
        await trace.ready()
        for _ in range(5):
            async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
                source = local(talk, capture)
        row = await trace.row(event="connected", source=source)
    assert 0 < row["latency_us"] < 1_000_000
    (summary,) = [row for row in trace.rows if row["event"] == "summary"]
    told = [row["latency_us"] for row in trace.rows if row["event"] == "connected"]
    assert summary["count"] == len(told) == sum(b["count"] for b in summary["histogram"]) == 5
    assert summary["max_us"] == max(told)
    assert min(told) <= summary["p50_us"] <= summary["p99_us"] <= max(told)


async def test_questions_are_told_with_answers_and_who_relayed_them(
    mesh: Mesh, shop: Shop, capture: str
) -> None:
    server = shop.legacy.sandbox.ipv4
    async with (
        Nameserver(shop.legacy.sandbox.namespace),
        Trace(mesh, "dns", "--pod", "web", "--all") as trace,
    ):
        await trace.ready()
        name = f"db.{NAMESPACE}.svc.cluster.local"
        truth = await ask(shop.web.sandbox.namespace, server, name)
        row = await trace.row(name=name, type="A", by="app")
    assert tuple(row["addresses"]) == truth.addresses
    assert (row["code"], row["captured"]) == ("NOERROR", True)
    assert row["pod"] == f"{NAMESPACE}/web"
    if capture == "nftables":
        assert row["server"] == f"{server}:53"
        assert row["client"].startswith(f"{shop.web.sandbox.ipv4}:")
    assert 0 < row["latency_us"] < 1_000_000


async def test_a_drop_is_told_with_the_kernels_reason_and_with_our_rule(
    mesh: Mesh, shop: Shop, capture: str
) -> None:
    async with Trace(mesh, "drops", "--pod", "web") as trace:
        await trace.ready()
        inside(shop.web.sandbox.namespace, lambda: _refused("127.0.0.1", 9))
        dropped = await trace.row(event="dropped", destination="127.0.0.1:9")
        assert (dropped["reason"], dropped["flags"]) == ("NO_SOCKET", "SYN")
        assert (dropped["protocol"], dropped["pod"]) == ("tcp", f"{NAMESPACE}/web")
        if capture != "nftables":
            # Programs refuse at the call: there is no packet.
            return
        # A socket bound to the device keeps it although its packet was redirected to loopback.
        inside(shop.web.sandbox.namespace, lambda: _leak(shop.db.sandbox.ipv4, ECHO_PORT))
        ours = await trace.row(event="refused", reason="loopback-leak-v4")
        kernel = await trace.row(event="dropped", reason="NETFILTER_DROP")
    assert ours["count"] >= 1
    assert kernel["where"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_no_program_outlives_the_command(
    mesh: Mesh, shop: Shop, number: signal.Signals
) -> None:
    async with Trace(mesh, "connections") as trace:
        await trace.ready()
        (child,) = children(trace.process.pid)
        loaded = programs_of(child)
        assert loaded
        assert loaded <= programs()
        trace.process.send_signal(number)
        code = await asyncio.wait_for(trace.process.wait(), 10)
    assert code == (-number if number is signal.SIGKILL else 0)
    await eventually(lambda: not os.path.exists(f"/proc/{child}"))
    await eventually(lambda: not programs() & loaded)


async def test_a_duration_ends_it_well_and_mistakes_are_told(mesh: Mesh, shop: Shop) -> None:
    node = mesh.world.nodes[0].name
    done = await run(mesh.run_dir, node, "trace", "connections", "--duration", "0.5")
    assert done.code == 0, done.text
    wrong = await run(mesh.run_dir, node, "trace", "dns", "--pod", "nobody")
    assert wrong.code == 1
    assert "no pod nobody on this node" in wrong.text
    wrong = await run(mesh.run_dir, node, "trace", "drops", "--namespace", "nowhere")
    assert wrong.code == 1
    assert "namespace nowhere" in wrong.text


async def test_a_killed_tracing_process_is_told_as_an_error(mesh: Mesh, shop: Shop) -> None:
    async with Trace(mesh, "latency") as trace:
        await trace.ready()
        (child,) = children(trace.process.pid)
        os.kill(child, signal.SIGKILL)
        code = await asyncio.wait_for(trace.process.wait(), 10)
    assert code == 1
    assert "the tracing process ended" in trace.notes


async def test_without_privileges_it_says_which_are_wanted() -> None:
    drop = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    child = await asyncio.create_subprocess_exec(
        *drop,
        *(sys.executable, "-m", "agent.trace.child", "tcp", str(os.getpid()), "15053"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    out, _ = await asyncio.wait_for(child.communicate(), 30)
    assert child.returncode == 1
    assert "run this as root, with CAP_BPF" in json.loads(out)["error"]


# ---- helpers


def _refused(host: str, port: int) -> None:
    with socket.socket() as made, contextlib.suppress(ConnectionRefusedError):
        made.connect((host, port))


def _leak(host: str, port: int) -> None:
    with socket.socket() as made, contextlib.suppress(OSError):
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        made.settimeout(0.5)
        made.connect((host, port))


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(text) for text in file.read().split()]


def programs_of(pid: int) -> set[int]:
    """BPF programs that a process holds."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fdinfo"):
        with open(f"/proc/{pid}/fdinfo/{name}") as file:
            for line in file:
                if line.startswith("prog_id:"):
                    found.add(int(line.split()[1]))
    return found


def programs() -> set[int]:
    """BPF programs that the kernel holds, whoever loaded them; numbers aren't used again."""
    libc, found = ctypes.CDLL(None, use_errno=True), set()
    attributes = ctypes.create_string_buffer(128)
    while libc.syscall(_BPF, _PROG_GET_NEXT_ID, attributes, len(attributes)) == 0:
        (number,) = struct.unpack_from("=I", attributes, 4)
        found.add(number)
        struct.pack_into("=I", attributes, 0, number)
    return found
