"""What applications notice of the mesh while nothing goes wrong: bytes, addresses, identities."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from functools import partial
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo import manifests
from agent.cli.demo.clients import FAILURES, Conversation, http_get, refused
from agent.cli.demo.mesh import access_lines
from agent.cli.demo.netns import connect, inside
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT, NAMESPACE
from agent.cli.demo.story import spiffe
from agent.cli.demo.wiretap import Wiretap

if TYPE_CHECKING:
    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import Node

pytestmark = pytest.mark.asyncio(loop_scope="module")

FAMILIES = pytest.mark.parametrize("family", ["ipv4", "ipv6"])


def address(pod: Pod, family: str) -> str:
    return pod.sandbox.ipv4 if family == "ipv4" else pod.sandbox.ipv6


@FAMILIES
async def test_wire_carries_only_hbone_and_app_sees_real_client(
    mesh: Mesh, shop: Shop, family: str
) -> None:
    with Wiretap(mesh.world.nodes[0].namespace, "wire", b"marker-a81c") as tap:
        answer = await http_get(shop.web, address(shop.api, family), HTTP_PORT, "/marker-a81c")
    assert f"api sees {address(shop.web, family)} asking for /marker-a81c" in answer
    assert tap.sightings == 0
    assert tap.ports[15008] > 0
    assert set(tap.ports) <= {15008, 15012}


@FAMILIES
async def test_server_speaks_first_and_half_close_is_kept(shop: Shop, family: str) -> None:
    async with Conversation(shop.web, address(shop.db, family), ECHO_PORT) as talk:
        assert talk.greeting == f"db sees {address(shop.web, family)}"
        assert await talk.echo("ping")
        assert await talk.finish() == "bye\n"


@FAMILIES
async def test_pods_of_one_node_talk_over_mtls_too(mesh: Mesh, shop: Shop, family: str) -> None:
    async with Conversation(shop.web, address(shop.cart, family), ECHO_PORT) as talk:
        assert talk.greeting == f"cart sees {address(shop.web, family)}"
        rows = await mesh.admin(mesh.world.nodes[0], "connections")
        inbound = [r for r in rows if r["direction"] == "inbound" and r["dst_workload"] == "cart"]
        assert [r["src_identity"] for r in inbound] == [spiffe(shop.web)]
        assert [r["protocol"] for r in inbound] == ["HBONE"]


@FAMILIES
async def test_large_streams_arrive_whole_both_ways(shop: Shop, family: str) -> None:
    sent, received = hashlib.sha256(), hashlib.sha256()
    reader, writer = await connect(shop.web.sandbox.namespace, address(shop.db, family), ECHO_PORT)
    await reader.readline()
    total, block = 64 << 20, os.urandom(1 << 20)

    async def send() -> None:
        for _ in range(total // len(block)):
            sent.update(block)
            writer.write(block)
            await writer.drain()
        writer.write_eof()

    async def receive() -> int:
        count = 0
        while count < total:
            data = await reader.read(min(1 << 18, total - count))
            assert data, f"the stream ended after {count} bytes"
            received.update(data)
            count += len(data)
        return count

    async with asyncio.timeout(60):
        _, count = await asyncio.gather(send(), receive())
        assert await reader.read() == b"bye\n"
    writer.close()
    assert count == total
    assert received.digest() == sent.digest()


async def test_many_connections_at_once(shop: Shop) -> None:
    async def one(number: int) -> None:
        async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
            for turn in range(3):
                assert await talk.echo(f"{number}/{turn}")

    await asyncio.gather(*(one(number) for number in range(300)))


async def test_service_address_reaches_every_endpoint(mesh: Mesh, shop: Shop) -> None:
    selector = {"kind": "echo"}
    mesh.apply("echo", manifests.service("echo", NAMESPACE, 7000, ECHO_PORT, selector))
    for pod in (shop.db, shop.cart):
        labelled = manifests.Pod(pod.sandbox, pod.namespace, pod.service_account, selector)
        manifests.write(mesh.manifests / f"pod-{pod.name}.yaml", labelled.manifest())
    vip = ""

    async def published() -> bool:
        nonlocal vip
        for entry in await mesh.admin(mesh.world.nodes[0], "services"):
            if entry["name"] == "echo" and len(entry["endpoints"]) == 2:
                vip = next(v.rpartition("/")[2] for v in entry["vips"] if ":" not in v)
        return bool(vip)

    await mesh.until("the echo service with two endpoints", published)
    seen = set()
    for _ in range(60):
        async with Conversation(shop.web, vip, 7000) as talk:
            seen.add(talk.greeting.split()[0])
        if len(seen) == 2:
            break
    assert seen == {"db", "cart"}


async def test_destination_outside_the_mesh_is_passed_through(mesh: Mesh, shop: Shop) -> None:
    await serve_legacy(mesh, shop)
    answer = await http_get(shop.web, shop.legacy.sandbox.ipv4, HTTP_PORT)
    assert f"legacy sees {shop.web.sandbox.ipv4} " in answer


async def test_plaintext_client_is_let_in_while_permissive(shop: Shop) -> None:
    answer = await http_get(shop.legacy, shop.api.sandbox.ipv4, HTTP_PORT)
    assert f"api sees {shop.legacy.sandbox.ipv4} " in answer


@FAMILIES
async def test_pod_reaches_itself_uncaptured(mesh: Mesh, shop: Shop, family: str) -> None:
    loopback = "127.0.0.1" if family == "ipv4" else "::1"
    for host in (address(shop.db, family), loopback):
        async with Conversation(shop.db, host, ECHO_PORT) as talk:
            assert talk.greeting == f"db sees {host}"
            rows = await mesh.admin(mesh.world.nodes[1], "connections")
            assert not [r for r in rows if r["src"].startswith(host)]


@pytest.mark.parametrize("port", [15001, 15006])
async def test_proxy_ports_lead_nowhere_from_outside(shop: Shop, port: int) -> None:
    for client in (shop.legacy, shop.web):
        assert await refused(client, shop.db.sandbox.ipv4, port)
    async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("others untouched")


async def test_garbage_on_15008_costs_nothing_but_itself(mesh: Mesh, shop: Shop) -> None:
    reader, writer = await connect(shop.legacy.sandbox.namespace, shop.db.sandbox.ipv4, 15008)
    writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n" * 100)
    async with asyncio.timeout(15):
        try:
            while await reader.read(1024):
                pass
        except ConnectionError:
            pass
    writer.close()
    async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("others untouched")
    log = mesh.log(mesh.world.nodes[1].name)
    source = shop.legacy.sandbox.ipv4
    await mesh.until("a log line", lambda: bool(access_lines(log, "connection failed", source)))


async def test_closed_port_of_the_app_refuses_and_says_so(mesh: Mesh, shop: Shop) -> None:
    with pytest.raises(FAILURES):
        await http_get(shop.web, shop.db.sandbox.ipv4, 4444)
    log = mesh.log(mesh.world.nodes[1].name)
    needles = (f"{shop.db.sandbox.ipv4}:4444", "inbound", "error")
    await mesh.until("a log line", lambda: bool(access_lines(log, *needles)))


async def test_both_reporters_log_and_count_with_identities(mesh: Mesh, shop: Shop) -> None:
    async with Conversation(shop.batch, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("x" * 99)
        assert await talk.finish() == "bye\n"
    for node, direction, reporter in (
        (mesh.world.nodes[0], "outbound", "source"),
        (mesh.world.nodes[1], "inbound", "destination"),
    ):
        needles = (
            f'direction="{direction}"',
            "connection complete",
            f'src.identity="{spiffe(shop.batch)}"',
            f'dst.identity="{spiffe(shop.db)}"',
        )
        await mesh.until(
            f"the access log of {node.name}",
            partial(logged, mesh, node, *needles),
        )
        text = inside(node.namespace, lambda: metrics("127.0.0.1", 15020))
        labels = (
            f'reporter="{reporter}"',
            f'source_principal="{spiffe(shop.batch)}"',
            f'destination_principal="{spiffe(shop.db)}"',
            'connection_security_policy="mutual_tls"',
        )
        for family, least in (
            ("istio_tcp_connections_opened_total", 1),
            ("istio_tcp_connections_closed_total", 1),
            ("istio_tcp_received_bytes_total", 100),
            ("istio_tcp_sent_bytes_total", 100),
        ):
            lines = [
                line
                for line in text.splitlines()
                if line.startswith(family + "{") and all(label in line for label in labels)
            ]
            assert sum(float(line.rpartition(" ")[2]) for line in lines) >= least, family


def logged(mesh: Mesh, node: Node, *needles: str) -> bool:
    return bool(access_lines(mesh.log(node.name), *needles))


def metrics(host: str, port: int) -> str:
    with socket.create_connection((host, port), timeout=10) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        chunks = []
        while data := sock.recv(1 << 16):
            chunks.append(data)
    return b"".join(chunks).decode()


async def serve_legacy(mesh: Mesh, shop: Shop) -> None:
    from agent.cli.demo.shop import serve_http
    from agent.cli.demo.story import answers

    await serve_http(mesh, shop.legacy)
    await mesh.until("legacy's nginx", lambda: answers(shop.legacy, shop.legacy), "legacy")
