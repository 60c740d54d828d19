"""On-demand discovery through real processes: from an application's connect to a subscription, and
from its answer to the bytes."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.netns import connect, inside
from agent.xds.types import ADDRESS, AUTHORIZATION
from proto.gen import discovery_pb2, workload_pb2
from tests.netns.test_agent_process import Node
from tests.support.control_plane import FakeControlPlane, FakeStream
from tests.support.dns import NOERROR, ask
from tests.support.eventually import eventually
from tests.support.small_ca import SmallCa

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

OWN = "Kubernetes//Pod/shop/a"
POD, SERVER, PORT = "10.0.0.1", "10.0.0.2", 8080


@pytest.fixture
async def plane() -> AsyncIterator[FakeControlPlane]:
    async with FakeControlPlane(SmallCa()) as plane:
        yield plane


@pytest.fixture
async def node(tmp_path: Path, plane: FakeControlPlane) -> AsyncIterator[Node]:
    """With a server beyond a wire that the pod can reach."""
    made = Node(tmp_path)
    root = tmp_path / "root.pem"
    root.write_text(plane.ca.root_pem)
    made.source = [f"--xds-address={plane.address}", f"--xds-root={root}", "--xds-on-demand=on"]
    # The agent's own namespace is the machine's: the pod's address is elsewhere from there.
    made.source.append("--prove-interval=off")
    beyond = wire(made)
    sock = inside(beyond, lambda: socket.create_server((SERVER, PORT)))
    server = await asyncio.start_server(greet, sock=sock)
    try:
        yield made
    finally:
        server.close()
        await made.close()
        ip(f"netns del {beyond}")


def wire(node: Node) -> str:
    """The namespace at the other end."""
    beyond = f"{node.name}-server"
    for command in (
        f"netns add {beyond}",
        f"-n {node.name} link add eth0 type veth peer name eth0 netns {beyond}",
        f"-n {node.name} addr add {POD}/24 dev eth0",
        f"-n {node.name} link set eth0 up",
        f"-n {beyond} addr add {SERVER}/24 dev eth0",
        f"-n {beyond} link set eth0 up",
    ):
        ip(command)
    return beyond


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello\n")
    writer.close()


def workload(name: str, address: str, *aliases: str, node: str = "") -> discovery_pb2.Resource:
    record = workload_pb2.Workload(
        uid=f"Kubernetes//Pod/shop/{name}",
        name=name,
        namespace="shop",
        node=node,
        addresses=[ip_address(address).packed],
    )
    resource = discovery_pb2.Resource(name=record.uid, version="1", aliases=aliases)
    resource.resource.Pack(workload_pb2.Address(workload=record), "type.googleapis.com/")
    return resource


def service(name: str, vip: str) -> discovery_pb2.Resource:
    record = workload_pb2.Service(
        name=name,
        namespace="shop",
        hostname=f"{name}.shop.svc.cluster.local",
        addresses=[workload_pb2.NetworkAddress(address=ip_address(vip).packed)],
    )
    resource = discovery_pb2.Resource(name=f"shop/{record.hostname}", version="1")
    resource.resource.Pack(workload_pb2.Address(service=record), "type.googleapis.com/")
    return resource


def push(
    stream: FakeStream, type_url: str, *resources: discovery_pb2.Resource, removed: str = ""
) -> None:
    stream.push(
        discovery_pb2.DeltaDiscoveryResponse(
            type_url=type_url,
            nonce=f"{len(stream.requests)}",
            resources=resources,
            removed_resources=[removed] if removed else [],
        )
    )


def subscribed(stream: FakeStream) -> set[str]:
    return {name for request in stream.requests for name in request.resource_names_subscribe}


async def stream_of(plane: FakeControlPlane, index: int) -> FakeStream:
    await eventually(lambda: len(plane.streams) > index, within=30, what=lambda: plane.streams)
    stream = plane.streams[index]
    push(stream, AUTHORIZATION)
    return stream


async def test_a_connect_becomes_a_subscription_and_its_answer_the_way(
    node: Node, plane: FakeControlPlane
) -> None:
    agent = await node.agent()
    stream = await stream_of(plane, 0)
    await eventually(lambda: OWN in subscribed(stream), what=lambda: stream.requests)
    push(stream, ADDRESS, workload("a", POD, node=node.name))
    await node.ready()

    reader, writer = await connect(node.name, SERVER, PORT)
    wanted = f"/{SERVER}"
    await eventually(lambda: wanted in subscribed(stream), what=lambda: stream.requests)
    assert not reader.at_eof()
    push(stream, ADDRESS, workload("server", SERVER, wanted))
    async with asyncio.timeout(10):
        assert await reader.readline() == b"hello\n"
    writer.close()
    await eventually(lambda: 'dst.workload="server"' in node.log.read_text())

    # The agent dies; what was asked for is subscribed again by the next one.
    agent.send_signal(signal.SIGKILL)
    await agent.wait()
    await node.agent()
    again = await stream_of(plane, 1)
    await eventually(lambda: {OWN, wanted} <= subscribed(again), what=lambda: again.requests)
    first = again.first(ADDRESS)
    assert set(first.initial_resource_versions) == {OWN, "Kubernetes//Pod/shop/server"}


async def test_what_the_control_plane_denies_knowing_is_plain_tcp(
    node: Node, plane: FakeControlPlane
) -> None:
    await node.agent()
    stream = await stream_of(plane, 0)
    push(stream, ADDRESS, workload("a", POD, node=node.name))
    await node.ready()
    reader, writer = await connect(node.name, SERVER, PORT)
    wanted = f"/{SERVER}"
    await eventually(lambda: wanted in subscribed(stream), what=lambda: stream.requests)
    push(stream, ADDRESS, removed=wanted)
    async with asyncio.timeout(10):
        assert await reader.readline() == b"hello\n"
    writer.close()


async def test_a_pods_question_becomes_a_subscription_and_its_answer_the_services(
    node: Node, plane: FakeControlPlane
) -> None:
    await node.agent("--dns-nameservers=192.0.2.53")
    stream = await stream_of(plane, 0)
    push(stream, ADDRESS, workload("a", POD, node=node.name))
    await node.ready()
    asking = asyncio.create_task(ask(node.name, SERVER, "db.shop.svc.cluster.local"))
    wanted = "shop/db.shop.svc.cluster.local"
    await eventually(lambda: wanted in subscribed(stream), what=lambda: stream.requests)
    push(stream, ADDRESS, service("db", "10.9.0.1"))
    answer = await asking
    assert (answer.rcode, answer.addresses) == (NOERROR, ("10.9.0.1",))
