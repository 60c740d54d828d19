"""A CNI node agent's words and what comes of them: pods, answers, and what happens to rude ones."""

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.dataplane import InUse, InvalidRequest
from agent.errors import NetnsRefused
from agent.pods import netns, zds, zds_link
from agent.pods.reconciler import Reconciler
from agent.pods.zds import ZdsSource
from agent.pods.zds_link import Link, ProtocolError
from proto.gen import control_pb2, zds_pb2
from tests.support.eventually import eventually
from tests.support.fake_target import FakeTarget
from tests.support.zds_server import ZdsConnection, ZdsPod, ZdsServer


class Node:
    """A node agent's server, our client, and a data plane that remembers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = ZdsServer(folder / "zds.sock")
        self.source = ZdsSource(folder / "zds.sock")
        self.target = FakeTarget()
        self.reconciler = Reconciler(None, verify_interval=timedelta(seconds=1), external=True)
        self.following: asyncio.Task[None] | None = None

    def pod(self, name: str, *, file: str | None = None) -> ZdsPod:
        """Files stand for namespaces."""
        path = self.folder / (file or name)
        path.touch()
        return ZdsPod(f"uid-{name}", name, "shop", "default", path)

    def inode(self, name: str) -> int:
        return (self.folder / name).stat().st_ino

    def start(self) -> None:
        follow = self.reconciler.follow(self.source.events(), once_synced=self.source.after_sync)
        self.following = asyncio.create_task(follow)

    async def served(self, *names: str) -> None:
        wanted = {f"uid-{name}": self.inode(name) for name in names}
        await eventually(lambda: self.target.up == wanted, what=lambda: self.target.up)

    async def stop(self) -> None:
        if self.following is not None:
            self.following.cancel()
            await asyncio.gather(self.following, return_exceptions=True)
        await self.reconciler.close()


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    monkeypatch.setattr(netns, "check", lambda *_, **__: None)
    made = Node(tmp_path)
    async with made.server:
        yield made
        await made.stop()


@pytest.fixture
async def client(node: Node) -> ZdsConnection:
    """Connected, an empty snapshot done, a data plane that knows the mesh."""
    node.reconciler.attach(node.target, synced=True)
    node.start()
    return await node.server.client()


def request(**fields: object) -> bytes:
    return zds_pb2.WorkloadRequest(**fields).SerializeToString()  # type: ignore[arg-type]


async def test_server_is_met_with_a_bare_hello_once_the_mesh_is_known(node: Node) -> None:
    node.start()
    node.reconciler.attach(node.target, synced=False)
    await asyncio.sleep(0)
    assert node.server.connections == []
    assert node.source.problems()
    node.reconciler.dataplane_synced()
    client = await node.server.client()
    assert client.hello == zds_pb2.ZdsHello(version=zds_pb2.V1)
    assert node.source.connected
    assert node.source.problems() == ()


async def test_add_is_answered_once_the_data_plane_listens(
    node: Node, client: ZdsConnection
) -> None:
    node.target.hold = asyncio.Event()
    adding = asyncio.create_task(node.server.add(node.pod("a")))
    while not node.reconciler.views():
        await asyncio.sleep(0.01)
    assert not adding.done()
    node.target.hold.set()
    assert await adding == ""
    await node.served("a")
    assert client.acks == [("snapshot_sent", ""), ("add uid-a", "")]


async def test_deleted_pod_is_cut_before_the_answer(node: Node, client: ZdsConnection) -> None:
    await node.server.add(node.pod("a"))
    assert await node.server.delete("uid-a") == [""]
    assert node.target.removed == [("uid-a", False)]
    assert await node.server.delete("uid-never-there") == [""]


async def test_same_pod_in_another_namespace_is_cut_and_served_there(
    node: Node, client: ZdsConnection
) -> None:
    await node.server.add(node.pod("a"))
    assert await node.server.add(node.pod("a")) == ""
    assert node.target.removed == []
    assert await node.server.add(node.pod("a", file="b")) == ""
    assert node.target.removed == [("uid-a", False)]
    assert node.target.up == {"uid-a": node.inode("b")}


async def test_held_ports_are_an_error_answer_and_tried_until_they_are_free(
    node: Node, client: ZdsConnection
) -> None:
    node.target.faults = [InUse("15008 is held", subject="uid-a")] * 4
    before = asyncio.get_running_loop().time()
    assert "15008 is held" in await node.server.add(node.pod("a"))
    await node.served("a")
    # Three pauses of a tenth of a second, spread by a tenth of it.
    assert 0.25 < asyncio.get_running_loop().time() - before < 2
    assert len(node.server.connections) == 1
    assert not client.closed


async def test_ports_that_one_pod_got_are_tried_for_all_at_once(
    node: Node, client: ZdsConnection
) -> None:
    pods = [node.pod(f"p{number}") for number in range(40)]
    node.target.taken = True
    for pod in pods:
        assert await node.server.add(pod)
    node.target.taken = False
    freed = asyncio.get_running_loop().time()
    await node.served(*(pod.name for pod in pods))
    assert asyncio.get_running_loop().time() - freed < 1


async def test_pod_that_can_never_be_served_is_told_and_the_next_one_works(
    node: Node, client: ZdsConnection
) -> None:
    node.target.faults = [InvalidRequest("no such thing", subject="uid-a")]
    assert "no such thing" in await node.server.add(node.pod("a"))
    assert await node.server.add(node.pod("b")) == ""
    await node.served("b")


async def test_without_a_data_plane_the_answer_comes_in_the_servers_time(
    node: Node, client: ZdsConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zds, "PATIENCE", timedelta(milliseconds=50))
    node.reconciler.detach()
    assert await node.server.add(node.pod("a")) == zds.NOT_YET
    node.reconciler.attach(node.target, synced=True)
    await node.served("a")


async def test_what_a_snapshot_doesnt_name_is_cut_and_the_rest_left_alone(
    node: Node, client: ZdsConnection
) -> None:
    for name in ("a", "b", "c"):
        await node.server.add(node.pod(name))
    del node.server.pods["uid-b"]
    node.server.pods["uid-c"] = ZdsPod("uid-c", "c", "shop", "default", None)
    client.close()
    again = await node.server.client(2)
    assert again.acks == [("add uid-a", ""), ("keep uid-c", ""), ("snapshot_sent", "")]
    await node.served("a", "c")
    assert node.target.removed == [("uid-b", False)]


async def test_pods_go_on_while_the_server_is_away(node: Node, client: ZdsConnection) -> None:
    await node.server.add(node.pod("a"))
    await node.server.__aexit__(None, None, None)
    await eventually(lambda: not node.source.connected)
    assert str(node.folder / "zds.sock") in node.source.problems()[0]
    await node.served("a")
    assert node.target.removed == []
    node.server = ZdsServer(node.folder / "zds.sock")
    node.server.pods = {"uid-a": node.pod("a")}
    async with node.server:
        await node.server.client()
        assert node.source.connected
        await node.served("a")


async def test_kept_pod_that_only_the_data_plane_has_stays_until_it_is_deleted(node: Node) -> None:
    node.server.pods["uid-k"] = ZdsPod("uid-k", "k", "shop", "default", None)
    node.reconciler.attach(node.target, synced=True)
    node.start()
    await node.server.client()
    await eventually(lambda: node.target.kept == [{"uid-k"}])
    assert await node.server.delete("uid-k") == [""]
    assert node.target.removed == [("uid-k", False)]


async def test_kept_pod_outlives_its_data_plane_where_a_process_lives_in_it(node: Node) -> None:
    node.server.pods["uid-k"] = ZdsPod("uid-k", "k", "shop", "default", None)
    namespace = os.stat("/proc/self/ns/net")
    node.target.told = [
        control_pb2.PodStatus(
            pod=control_pb2.Pod(uid="uid-k", name="k", namespace="shop", service_account="default"),
            netns_inode=namespace.st_ino,
            netns_dev=namespace.st_dev,
        )
    ]
    node.reconciler.attach(node.target, synced=True)
    node.start()
    await node.server.client()
    await eventually(lambda: node.target.up == {"uid-k": namespace.st_ino})
    node.reconciler.detach()
    successor = FakeTarget()
    node.reconciler.attach(successor, synced=True)
    await eventually(lambda: successor.up == {"uid-k": namespace.st_ino})
    assert await node.server.delete("uid-k") == [""]
    assert successor.removed == [("uid-k", False)]


RUDE = {
    "add without a descriptor": (request(add=zds_pb2.AddWorkload(uid="u")), 0),
    "add with two": (request(add=zds_pb2.AddWorkload(uid="u")), 2),
    "del with one": (b"\x12\x03\x12\x01u", 1),
    "keep with one": (request(keep=zds_pb2.KeepWorkload(uid="u")), 1),
    "add without workload_info": (request(add=zds_pb2.AddWorkload(uid="u")), 1),
    "add without a uid": (
        request(add=zds_pb2.AddWorkload(workload_info=zds_pb2.WorkloadInfo(name="n"))),
        1,
    ),
    "del without a uid": (b"\x12\x00", 0),
    "keep after the snapshot": (request(keep=zds_pb2.KeepWorkload(uid="u")), 0),
    "a second snapshot_sent": (request(snapshot_sent=zds_pb2.SnapshotSent()), 0),
    "an unknown kind": (b"\xaa\x01\x00", 0),
    "garbage": (b"\xff\xff\xff", 0),
    "garbage with a descriptor": (b"\xff\xff\xff", 1),
    "over 1024 bytes": (request(keep=zds_pb2.KeepWorkload(uid="u" * 1100)), 0),
}


@pytest.mark.parametrize("case", RUDE)
async def test_broken_protocol_is_told_and_met_by_a_new_connection_not_by_an_exit(
    node: Node, client: ZdsConnection, case: str
) -> None:
    await node.server.add(node.pod("a"))
    packet, count = RUDE[case]
    fds = [os.open(node.folder / "a", os.O_RDONLY) for _ in range(count)]
    before = open_fds()
    assert await client.ask_raw(packet, fds)
    with pytest.raises(ConnectionError):
        await client.receive()
    client.close()
    await node.server.client(2)
    await node.served("a")
    assert node.target.removed == []
    # The new connection has two ends; whatever came with the packet is closed.
    await eventually(lambda: open_fds() == before, what=lambda: (before, open_fds()))
    for fd in fds:
        os.close(fd)


async def test_descriptor_that_is_no_namespace_is_told_and_the_connection_stays(
    node: Node, client: ZdsConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NetnsRefused("the descriptor: not a network namespace")

    monkeypatch.setattr(netns, "check", refuse)
    assert "not a network namespace" in await node.server.add(node.pod("a"))
    monkeypatch.setattr(netns, "check", lambda *_, **__: None)
    assert await node.server.add(node.pod("b")) == ""
    await node.served("b")
    assert len(node.server.connections) == 1


async def test_descriptors_are_as_many_as_pods(node: Node, client: ZdsConnection) -> None:
    before = open_fds()
    for _ in range(3):
        for name in ("a", "b"):
            await node.server.add(node.pod(name))
    # One as it came and one of the reconciler.
    assert open_fds() == before + 4
    for name in ("a", "b"):
        await node.server.delete(f"uid-{name}")
    await eventually(lambda: open_fds() == before)


@given(st.binary(max_size=1100))
def test_no_bytes_do_worse_than_a_protocol_error(data: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)

    async def received() -> None:
        packet = await Link(ours).receive()
        assert packet is None or packet.request.WhichOneof("payload") != "add"

    with ours, theirs:
        theirs.send(data)
        with contextlib.suppress(ProtocolError):
            asyncio.run(received())


@pytest.mark.parametrize("uid", ["u" * 1000, "\u00fc" * 500], ids=["ascii", "two bytes each"])
async def test_answers_fit_into_what_a_server_reads(client: ZdsConnection, uid: str) -> None:
    packet = request(add=zds_pb2.AddWorkload(uid=uid))
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        said = await client.ask_raw(packet, [fd])
    finally:
        os.close(fd)
    assert said.startswith(f"add of {uid[:400]}")
    assert said.endswith("\u2026")
    answer = zds_pb2.WorkloadResponse(ack=zds_pb2.Ack(error=said)).SerializeToString()
    assert 1000 < len(answer) <= 1024


def test_answer_to_a_done_request_is_present_and_empty() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        asyncio.run(zds_link.Link(ours).answer(""))
        response = zds_pb2.WorkloadResponse.FromString(theirs.recv(100))
        assert response.HasField("ack")
        assert response.ack.error == ""


def open_fds() -> int:
    # What an earlier test left in cycles isn't ours to count.
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
