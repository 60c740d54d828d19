"""The control socket's client against a server that misbehaves on demand."""

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from agent import calls
from agent import dataplane as client
from agent.channel import Channel
from agent.dataplane import Dataplane
from agent.secret import Secret
from proto.gen import control_pb2
from tests.support.eventually import eventually
from tests.support.fake_dataplane import FakeConnection, FakeDataplane


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeDataplane]:
    async with FakeDataplane(tmp_path / "control.sock") as fake:
        yield fake


async def connected(server: FakeDataplane) -> Dataplane:
    return await Dataplane.connect(
        server.path, role="agent", config=control_pb2.InstanceConfig(node="n1")
    )


async def test_hello_carries_role_version_and_config(server: FakeDataplane) -> None:
    dataplane = await connected(server)
    hello = server.requests[0].hello
    assert (hello.role, hello.version, hello.config.node) == (control_pb2.Hello.AGENT, 1, "n1")
    assert dataplane.hello.instance_id == "fake"
    await dataplane.close()


async def test_nobody_listening_is_retryable_and_names_the_socket(tmp_path: Path) -> None:
    with pytest.raises(client.DataplaneLost, match=r"absent\.sock") as caught:
        await Dataplane.connect(tmp_path / "absent.sock", role="observer")
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("code", "kind", "retryable"),
    [
        (control_pb2.Error.VERSION, client.VersionMismatch, False),
        (control_pb2.Error.IN_USE, client.AgentRoleTaken, True),
        (control_pb2.Error.INVALID, client.InvalidRequest, False),
        (control_pb2.Error.PERMISSION, client.PermissionMissing, False),
        (control_pb2.Error.NETNS_GONE, client.NetnsGone, False),
        (control_pb2.Error.DRAINING, client.Draining, True),
        (77, client.DataplaneError, False),
    ],
)
async def test_refusal_becomes_its_exception(
    server: FakeDataplane, code: int, kind: type[client.DataplaneError], retryable: bool
) -> None:
    server.hello_error = control_pb2.Error(code=code, subject="x", text="because")  # type: ignore[arg-type]
    with pytest.raises(client.DataplaneError) as caught:
        await connected(server)
    assert type(caught.value) is kind
    assert caught.value.retryable is retryable
    assert str(caught.value) == "x: because"


async def test_a_key_arrives_with_its_certificate_and_no_frame_keeps_it(
    server: FakeDataplane, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes | bytearray] = []
    send = Channel.send

    async def watched(channel: Channel, payload: bytes | bytearray, fds: Sequence[int]) -> None:
        sent.append(payload)
        await send(channel, payload, fds)

    monkeypatch.setattr(Channel, "send", watched)
    dataplane = await connected(server)
    # Long enough for lengths of two bytes.
    content = bytes(range(1, 200))
    await dataplane.install_certificate("i", ["leaf"], ["root"], Secret(memoryview(content)))
    await dataplane.install_certificate("i", ["leaf"], ["root"])
    with_key, without = (request.install_certificate for request in server.requests[1:])
    assert with_key.private_key == content
    assert with_key.identity == "i"
    assert [*with_key.chain, *with_key.roots] == ["leaf", "root"]
    assert without.private_key == b""
    assert isinstance(sent[1], bytearray)
    assert not any(sent[1])
    await dataplane.close()


async def test_namespace_descriptor_arrives_and_the_callers_stays_open(
    server: FakeDataplane, tmp_path: Path
) -> None:
    inodes: list[int] = []

    async def answer(
        connection: FakeConnection, request: control_pb2.Request, fds: list[int]
    ) -> None:
        inodes.extend(os.fstat(fd).st_ino for fd in fds)
        for fd in fds:
            os.close(fd)
        await connection.reply(request, done=control_pb2.Done())

    server.answer = answer
    dataplane = await connected(server)
    with (tmp_path / "netns").open("w") as handle:
        await dataplane.add_pod(
            control_pb2.Pod(uid="u"), control_pb2.PodSettings(), handle.fileno(), prepare_only=True
        )
        assert inodes == [os.fstat(handle.fileno()).st_ino]
    assert server.requests[-1].fds == 1
    assert server.requests[-1].add_pod.prepare_only
    await dataplane.close()


async def test_replies_out_of_order_reach_their_requests(server: FakeDataplane) -> None:
    held: list[tuple[FakeConnection, control_pb2.Request]] = []

    async def answer(
        connection: FakeConnection, request: control_pb2.Request, _: list[int]
    ) -> None:
        held.append((connection, request))
        if len(held) == 3:
            for waiting, asked in reversed(held):
                csr = control_pb2.NewCsrReply(csr=f"for {asked.new_csr.identity}")
                await waiting.reply(asked, new_csr=csr)

    server.answer = answer
    dataplane = await connected(server)
    got = await asyncio.gather(*(dataplane.new_csr(name) for name in ("a", "b", "c")))
    assert got == ["for a", "for b", "for c"]
    await dataplane.close()


async def test_lost_connection_fails_every_waiting_request_and_ends_the_events(
    server: FakeDataplane,
) -> None:
    async def answer(
        connection: FakeConnection, request: control_pb2.Request, _: list[int]
    ) -> None:
        await connection.event(pod_drained=control_pb2.PodDrained(uid="u"))

    server.answer = answer
    dataplane = await connected(server)
    waiting = [asyncio.ensure_future(dataplane.list_pods()) for _ in range(3)]
    await eventually(lambda: len(server.requests) == 4)
    events: list[control_pb2.Event] = []

    async def listen() -> None:
        async for event in dataplane.events():
            events.append(event)
            if len(events) == 3:
                server.hang_up()

    await asyncio.wait_for(listen(), 5)
    assert [event.pod_drained.uid for event in events] == ["u"] * 3
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, client.DataplaneLost)
    with pytest.raises(client.DataplaneLost):
        await dataplane.list_pods()
    assert not dataplane.connected
    await dataplane.close()


async def test_chunks_arrive_in_order_and_a_stream_left_early_blocks_nobody(
    server: FakeDataplane,
) -> None:
    count = 50

    async def answer(
        connection: FakeConnection, request: control_pb2.Request, _: list[int]
    ) -> None:
        if request.WhichOneof("body") == "list_pods":
            await connection.reply(request, pods=control_pb2.PodsReply())
            return
        for index in range(count):
            chunk = control_pb2.Chunk(data=b"%d\n" % index)
            await connection.reply(request, more=index < count - 1, chunk=chunk)

    server.answer = answer
    dataplane = await connected(server)
    whole = b"".join([chunk async for chunk in dataplane.metrics()])
    assert whole == b"".join(b"%d\n" % index for index in range(count))

    left = dataplane.dump("workloads")
    assert await anext(left) == b"0\n"
    await left.aclose()  # type: ignore[attr-defined]
    assert await asyncio.wait_for(dataplane.list_pods(), 5) == []
    await dataplane.close()


async def test_large_response_crosses_whole_while_the_receiver_is_slow(
    server: FakeDataplane,
) -> None:
    sizes: list[int] = []

    async def answer(
        connection: FakeConnection, request: control_pb2.Request, _: list[int]
    ) -> None:
        sizes.append(len(request.apply.response))
        reply = control_pb2.ApplyReply(accepted=len(sizes))
        await connection.reply(request, apply=reply)

    server.answer = answer
    dataplane = await connected(server)
    payload = bytes(8 * 1024 * 1024)
    replies = await asyncio.gather(*(dataplane.apply(payload) for _ in range(3)))
    assert sizes == [len(payload)] * 3
    assert [reply.accepted for reply in replies] == [1, 2, 3]
    await dataplane.close()


async def test_cancelled_request_does_not_tear_the_frame(server: FakeDataplane) -> None:
    async def answer(
        connection: FakeConnection, request: control_pb2.Request, _: list[int]
    ) -> None:
        if request.WhichOneof("body") == "list_pods":
            await connection.reply(request, pods=control_pb2.PodsReply())

    server.answer = answer
    dataplane = await connected(server)
    big = asyncio.ensure_future(dataplane.apply(bytes(16 * 1024 * 1024)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    big.cancel()
    assert await asyncio.wait_for(dataplane.list_pods(), 10) == []
    await dataplane.close()


async def test_senseless_length_is_an_end_with_a_reason(server: FakeDataplane) -> None:
    async def answer(
        connection: FakeConnection, request: control_pb2.Request, _: list[int]
    ) -> None:
        await connection.send_raw(struct.pack(">I", 0xFFFF_FFFF))

    server.answer = answer
    dataplane = await connected(server)
    with pytest.raises(client.DataplaneLost, match="4294967295 bytes"):
        await dataplane.list_pods()
    await dataplane.close()


async def test_silent_data_plane_is_named_after_the_time_limit(
    server: FakeDataplane, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(
        connection: FakeConnection, request: control_pb2.Request, _: list[int]
    ) -> None:
        pass

    server.answer = answer
    dataplane = await connected(server)
    monkeypatch.setattr(calls, "REQUEST_TIMEOUT", timedelta(milliseconds=50))
    with pytest.raises(client.DataplaneSilent, match="list_pods"):
        await dataplane.list_pods()
    assert dataplane.connected
    await dataplane.close()
