"""The delta client against a real gRPC server over TLS."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from agent.dataplane import DataplaneLost
from agent.xds import ADDRESS, AUTHORIZATION, TYPES, Backoff, NodeInfo, XdsClient, XdsConfig
from agent.xds import requests as xds_requests
from proto.gen import discovery_pb2
from tests.support.control_plane import FakeControlPlane, FakeStream
from tests.support.eventually import eventually
from tests.support.small_ca import SmallCa
from tests.support.targets import RecordingDataplane

FAST = Backoff(start=timedelta(milliseconds=5), cap=timedelta(milliseconds=50))


@pytest.fixture(scope="module")
def ca() -> SmallCa:
    return SmallCa()


@pytest.fixture
async def plane(ca: SmallCa) -> AsyncIterator[FakeControlPlane]:
    async with FakeControlPlane(ca) as plane:
        yield plane


@contextlib.asynccontextmanager
async def running(config: XdsConfig) -> AsyncIterator[XdsClient]:
    client = XdsClient(config)
    task = asyncio.create_task(client.run())
    try:
        yield client
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def config(plane: FakeControlPlane, **changes: Any) -> XdsConfig:
    fields: dict[str, Any] = {
        "address": plane.address,
        "root_cert": plane.ca.root_pem,
        "node": NodeInfo(node_name="n1", pod_name="up-1", pod_namespace="mesh"),
        "backoff": FAST,
        "healthy_after": timedelta(milliseconds=10),
    }
    return XdsConfig(**(fields | changes))


def response(
    *resources: tuple[str, str],
    nonce: str = "1",
    type_url: str = ADDRESS,
    removed: Sequence[str] = (),
) -> discovery_pb2.DeltaDiscoveryResponse:
    message = discovery_pb2.DeltaDiscoveryResponse(
        type_url=type_url, nonce=nonce, removed_resources=removed
    )
    for name, version in resources:
        message.resources.add(name=name, version=version)
    return message


async def stream_of(plane: FakeControlPlane, index: int = 0) -> FakeStream:
    await eventually(lambda: len(plane.streams) > index, what=lambda: plane.streams)
    stream = plane.streams[index]
    await eventually(lambda: len(stream.requests) >= len(TYPES))
    return stream


async def test_subscribes_to_everything_as_a_ztunnel_of_this_node(
    plane: FakeControlPlane, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    settings = config(plane, token_path=token, cluster_id="c1", headers={"X-Extra": "yes"})
    async with running(settings) as client:
        client.attach(RecordingDataplane(), [])
        stream = await stream_of(plane)
        first = stream.first(ADDRESS)
        assert first.node.id == "ztunnel~1.1.1.1~up-1.mesh~mesh.svc.cluster.local"
        assert first.node.metadata["NODE_NAME"] == "n1"
        assert first.node.metadata["NAMESPACE"] == "mesh"
        assert not first.resource_names_subscribe
        assert not first.initial_resource_versions
        assert stream.first(AUTHORIZATION).type_url == AUTHORIZATION
        assert stream.metadata["authorization"] == "Bearer secret"
        assert stream.metadata["clusterid"] == "c1"
        assert stream.metadata["x-extra"] == "yes"
        await eventually(lambda: client.status().connected)


async def test_response_reaches_the_data_plane_byte_for_byte_and_is_acknowledged(
    plane: FakeControlPlane,
) -> None:
    target = RecordingDataplane()
    async with running(config(plane)) as client:
        client.attach(target, [])
        stream = await stream_of(plane)
        # An unknown field, which re-serialising by another version could lose.
        raw = response(("a", "1")).SerializeToString() + b"\xfa\x3f\x01x"
        stream.push(raw)
        await eventually(stream.answers)
        assert target.responses == [raw]
        assert stream.answers()[0].response_nonce == "1"
        assert not stream.answers()[0].HasField("error_detail")
        status = client.status()
        assert status.types[ADDRESS].processed
        assert not status.processed
        assert status.last_push is not None
        stream.push(response(nonce="2", type_url=AUTHORIZATION))
        await eventually(lambda: client.status().processed)


async def test_rejected_resources_are_named_in_a_nack_until_a_good_version_comes(
    plane: FakeControlPlane,
) -> None:
    target = RecordingDataplane()
    target.reject = {"bad": "no address", "worse": "no type"}
    async with running(config(plane)) as client:
        client.attach(target, [])
        stream = await stream_of(plane)
        stream.push(response(("good", "1"), ("bad", "1"), ("worse", "1")))
        await eventually(stream.answers)
        assert stream.answers()[0].error_detail.message == "bad: no address; worse: no type"
        assert client.status().types[ADDRESS].rejected == target.reject
        assert client.status().types[ADDRESS].processed
        del target.reject["bad"]
        stream.push(response(("bad", "2"), nonce="2", removed=("worse",)))
        await eventually(lambda: len(stream.answers()) == 2)
        assert not stream.answers()[1].HasField("error_detail")
        assert client.status().types[ADDRESS].rejected == {}


async def test_response_that_cant_be_decoded_is_refused_and_the_stream_goes_on(
    plane: FakeControlPlane,
) -> None:
    target = RecordingDataplane()
    async with running(config(plane)) as client:
        client.attach(target, [])
        stream = await stream_of(plane)
        # A resource that is no message; the outer fields are well-formed.
        stream.push(b"\x12\x02\xff\xff" + response(nonce="7").SerializeToString())
        await eventually(stream.answers)
        assert stream.answers()[0].response_nonce == "7"
        assert "can't be decoded" in stream.answers()[0].error_detail.message
        assert "response refused" in client.status().last_error
        stream.push(response(("a", "1"), nonce="8"))
        await eventually(lambda: target.held.get(ADDRESS) == {"a": "1"})
        assert not stream.ended


async def test_reconnect_tells_only_good_versions(plane: FakeControlPlane) -> None:
    target = RecordingDataplane()
    target.reject = {"bad": "no"}
    async with running(config(plane)) as client:
        client.attach(target, [])
        stream = await stream_of(plane)
        stream.push(response(("a", "1"), ("b", "1"), ("bad", "1")))
        stream.push(response(nonce="2", removed=("b",)))
        await eventually(lambda: len(stream.answers()) == 2)
        stream.end(grpc.StatusCode.UNAVAILABLE, "going away")
        again = await stream_of(plane, 1)
        assert dict(again.first(ADDRESS).initial_resource_versions) == {"a": "1"}
        await eventually(lambda: client.status().connected)
        assert client.status().types[ADDRESS].rejected == {"bad": "no"}


async def test_new_data_plane_gets_everything_again(plane: FakeControlPlane) -> None:
    first, second = RecordingDataplane(), RecordingDataplane()
    async with running(config(plane)) as client:
        client.attach(first, [])
        stream = await stream_of(plane)
        stream.push(response(("a", "1")))
        await eventually(stream.answers)
        client.attach(second, [])
        again = await stream_of(plane, 1)
        assert not again.first(ADDRESS).initial_resource_versions
        assert not client.status().types[ADDRESS].processed
        again.push(response(("a", "1")))
        await eventually(lambda: second.held.get(ADDRESS) == {"a": "1"})
        assert len(first.responses) == 1
        await eventually(lambda: stream.ended)


async def test_adopted_data_plane_is_asked_for_what_changed_only(plane: FakeControlPlane) -> None:
    target = RecordingDataplane()
    target.held = {ADDRESS: {"a": "5"}, AUTHORIZATION: {"p": ""}}
    async with running(config(plane)) as client:
        client.attach(target, target.types_now())
        stream = await stream_of(plane)
        assert dict(stream.first(ADDRESS).initial_resource_versions) == {"a": "5"}
        assert dict(stream.first(AUTHORIZATION).initial_resource_versions) == {"p": ""}
        assert client.status().processed


async def test_nothing_is_read_while_no_data_plane_is_attached(plane: FakeControlPlane) -> None:
    target = RecordingDataplane()
    async with running(config(plane)) as client:
        assert client.status().last_error == "waiting for the data plane"
        client.attach(target, [])
        stream = await stream_of(plane)
        client.detach()
        stream.push(response(("a", "1")))
        await eventually(lambda: stream.ended)
        assert not target.responses
        client.attach(target, target.types_now())
        again = await stream_of(plane, 1)
        again.push(response(("a", "1")))
        await eventually(lambda: target.held.get(ADDRESS) == {"a": "1"})


async def test_data_plane_lost_during_a_push_gets_it_again(plane: FakeControlPlane) -> None:
    target = RecordingDataplane()
    async with running(config(plane)) as client:
        client.attach(target, [])
        stream = await stream_of(plane)
        target.fail = DataplaneLost("nobody answers")
        stream.push(response(("a", "1")))
        again = await stream_of(plane, 1)
        assert not stream.answers()
        again.push(response(("a", "1")))
        await eventually(lambda: target.held.get(ADDRESS) == {"a": "1"})


async def test_control_plane_away_and_back(plane: FakeControlPlane) -> None:
    target = RecordingDataplane()
    async with running(config(plane)) as client:
        client.attach(target, [])
        stream = await stream_of(plane)
        stream.push(response(("a", "1")))
        stream.push(response(type_url=AUTHORIZATION))
        await eventually(lambda: client.status().processed)
        await plane.stop()
        await eventually(
            lambda: "connection refused" in client.status().last_error,
            what=lambda: client.status().last_error,
        )
        assert not client.status().connected
        assert plane.address in client.status().last_error
        await plane.start()
        again = await stream_of(plane, 1)
        assert dict(again.first(ADDRESS).initial_resource_versions) == {"a": "1"}
        await eventually(lambda: client.status().connected)
        assert client.status().last_error == ""


async def test_silent_control_plane_is_told_from_a_good_one(plane: FakeControlPlane) -> None:
    async with running(config(plane)) as client:
        client.attach(RecordingDataplane(), [])
        stream = await stream_of(plane)
        await eventually(lambda: "hasn't sent" in client.status().last_error)
        assert client.status().connected
        assert ADDRESS in client.status().last_error
        stream.push(response())
        await eventually(lambda: ADDRESS not in client.status().last_error)
        assert AUTHORIZATION in client.status().last_error
        stream.push(response(type_url=AUTHORIZATION))
        await eventually(lambda: client.status().last_error == "")


async def fails_with(settings: XdsConfig, *parts: str) -> None:
    async with running(settings) as client:
        client.attach(RecordingDataplane(), [])

        def named() -> bool:
            return all(part in client.status().last_error for part in parts)

        await eventually(named, what=lambda: client.status().last_error)
        assert not client.status().connected


async def test_wrong_root_is_named(plane: FakeControlPlane, tmp_path: Path) -> None:
    roots = tmp_path / "root.pem"
    roots.write_text(SmallCa("another").root_pem)
    await fails_with(config(plane, root_cert=str(roots)), "TLS failed", str(roots), plane.address)


async def test_expired_server_certificate_is_named(ca: SmallCa) -> None:
    plane = FakeControlPlane(ca)
    plane.credentials = ca.server("127.0.0.1", expired=True)
    async with plane:
        await fails_with(config(plane), "TLS failed", "certificate has expired")


async def test_missing_root_file_is_named(plane: FakeControlPlane, tmp_path: Path) -> None:
    missing = tmp_path / "none.pem"
    await fails_with(config(plane, root_cert=str(missing)), str(missing), "No such file")


async def test_root_file_without_certificates_is_named(
    plane: FakeControlPlane, tmp_path: Path
) -> None:
    roots = tmp_path / "root.pem"
    roots.write_text("nothing")
    await fails_with(config(plane, root_cert=str(roots)), str(roots), "no usable PEM")


async def test_plain_http_is_refused(plane: FakeControlPlane) -> None:
    await fails_with(config(plane, address="http://127.0.0.1:15010"), "only https")


@pytest.mark.parametrize(
    ("content", "said"), [("", "is empty"), ("two words", "more than one"), (None, "No such file")]
)
async def test_bad_token_file_is_named(
    plane: FakeControlPlane, tmp_path: Path, content: str | None, said: str
) -> None:
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content)
    await fails_with(config(plane, token_path=token), str(token), said)


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, ("UNAUTHENTICATED", "authentication failure", "token")),
        (grpc.StatusCode.PERMISSION_DENIED, ("PERMISSION_DENIED", "n1", "token")),
        (grpc.StatusCode.UNIMPLEMENTED, ("UNIMPLEMENTED", "15012")),
    ],
)
async def test_refusals_name_cause_and_remedy(
    plane: FakeControlPlane, tmp_path: Path, code: grpc.StatusCode, parts: tuple[str, ...]
) -> None:
    token = tmp_path / "token"
    token.write_text("t")
    plane.refuse = (code, "authentication failure")
    await fails_with(config(plane, token_path=token), *parts, plane.address)


async def test_rotated_token_is_used_at_the_next_connect(
    plane: FakeControlPlane, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("one")
    async with running(config(plane, token_path=token)) as client:
        client.attach(RecordingDataplane(), [])
        stream = await stream_of(plane)
        token.write_text("two\n")
        stream.end(grpc.StatusCode.UNAVAILABLE, "restart")
        again = await stream_of(plane, 1)
        assert stream.metadata["authorization"] == "Bearer one"
        assert again.metadata["authorization"] == "Bearer two"


async def test_rotated_root_is_used_at_the_next_connect(ca: SmallCa, tmp_path: Path) -> None:
    roots = tmp_path / "root.pem"
    roots.write_text(ca.root_pem)
    async with (
        FakeControlPlane(ca) as plane,
        running(config(plane, root_cert=str(roots))) as client,
    ):
        client.attach(RecordingDataplane(), [])
        await stream_of(plane)
        newer = SmallCa("newer")
        await plane.stop()
        plane.credentials = newer.server("127.0.0.1")
        await plane.start()
        await eventually(lambda: "TLS failed" in client.status().last_error)
        roots.write_text(newer.root_pem)
        await stream_of(plane, 1)
        await eventually(lambda: client.status().connected)


async def test_alternative_hostname_is_accepted(ca: SmallCa) -> None:
    async with FakeControlPlane(ca, names=("istiod.mesh.svc",)) as plane:
        await fails_with(config(plane), "TLS failed", "another name")
        async with running(config(plane, alt_hostname="istiod.mesh.svc")) as client:
            client.attach(RecordingDataplane(), [])
            await eventually(
                lambda: client.status().connected, what=lambda: client.status().last_error
            )


async def test_host_in_the_address_stays_good_beside_an_alternative(
    plane: FakeControlPlane,
) -> None:
    async with running(config(plane, alt_hostname="istiod.mesh.svc")) as client:
        client.attach(RecordingDataplane(), [])
        await eventually(lambda: client.status().connected)


async def test_held_versions_that_dont_fit_one_message_are_resynchronised(
    plane: FakeControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xds_requests, "FIRST_REQUEST_LIMIT", 1000)
    target = RecordingDataplane()
    target.held = {ADDRESS: {f"pod-{number}": "1" for number in range(500)}}
    async with running(config(plane)) as client:
        client.attach(target, target.types_now())
        stream = await stream_of(plane)
        assert not stream.first(ADDRESS).initial_resource_versions
        stream.push(response(("pod-1", "1"), ("pod-2", "2")))
        await eventually(stream.answers)
        assert target.held[ADDRESS] == {"pod-1": "1", "pod-2": "2"}
        stream.push(response(("pod-3", "1"), nonce="2"))
        await eventually(lambda: len(stream.answers()) == 2)
        assert len(target.held[ADDRESS]) == 3


async def test_versions_are_left_out_after_the_server_found_them_too_large(ca: SmallCa) -> None:
    plane = FakeControlPlane(ca)
    plane.receive_limit = 4000
    target = RecordingDataplane()
    target.held = {ADDRESS: {f"pod-{number}": "1" for number in range(500)}}
    async with plane, running(config(plane)) as client:
        client.attach(target, target.types_now())
        await eventually(
            lambda: plane.streams and len(plane.streams[-1].requests) >= len(TYPES),
            what=lambda: client.status().last_error,
        )
        plane.streams[-1].push(response(("pod-1", "1")))
        await eventually(lambda: target.held[ADDRESS] == {"pod-1": "1"})


async def test_failing_control_plane_is_asked_less_and_less_often(
    plane: FakeControlPlane,
) -> None:
    waits: list[int] = []

    class Watched(Backoff):
        def delay(self, failures: int) -> timedelta:
            waits.append(failures)
            return timedelta(milliseconds=1)

    settings = config(plane, backoff=Watched(), healthy_after=timedelta(milliseconds=200))
    plane.refuse = (grpc.StatusCode.UNAVAILABLE, "not yet")
    async with running(settings) as client:
        client.attach(RecordingDataplane(), [])
        await eventually(lambda: len(waits) >= 4)
        assert waits[:4] == [1, 2, 3, 4]
        plane.refuse = None
        await eventually(lambda: plane.streams)
        stream = plane.streams[0]
        stream.push(response(("a", "1")))
        await eventually(stream.answers)
        await asyncio.sleep(0.25)  # the stream's age is the claim
        seen = len(waits)
        stream.end(grpc.StatusCode.UNAVAILABLE, "restart")
        await eventually(lambda: len(waits) > seen)
        assert waits[seen] == 1


async def test_on_demand_subscribes_to_names_as_they_become_wanted(
    plane: FakeControlPlane,
) -> None:
    target = RecordingDataplane()
    async with running(config(plane, on_demand=True)) as client:
        client.attach(target, [])
        client.wanted(target, "net/10.0.0.1")
        stream = await stream_of(plane)
        first = stream.first(ADDRESS)
        assert list(first.resource_names_subscribe) == ["*"]
        assert list(first.resource_names_unsubscribe) == ["*"]
        assert not stream.first(AUTHORIZATION).resource_names_subscribe
        for name in ("shop/api.shop.svc", "net/10.0.0.1"):
            client.wanted(target, name)
        await eventually(
            lambda: subscribed(stream) == ["net/10.0.0.1", "shop/api.shop.svc"],
            what=lambda: stream.requests,
        )
        stream.push(response(("a", "1")))
        await eventually(stream.answers)
        assert subscribed(stream) == ["net/10.0.0.1", "shop/api.shop.svc"]


async def test_on_demand_a_new_stream_asks_again_for_all_names(plane: FakeControlPlane) -> None:
    target, other = RecordingDataplane(), RecordingDataplane()
    async with running(config(plane, on_demand=True)) as client:
        client.attach(target, [])
        stream = await stream_of(plane)
        stream.push(response(("a", "1")))
        await eventually(stream.answers)
        client.wanted(target, "net/10.0.0.1")
        client.wanted(other, "net/10.0.0.2")
        await eventually(lambda: subscribed(stream))
        stream.end(grpc.StatusCode.UNAVAILABLE, "moving")
        again = await stream_of(plane, 1)
        await eventually(lambda: subscribed(again) == ["net/10.0.0.1"])
        assert dict(again.first(ADDRESS).initial_resource_versions) == {"a": "1"}
        # Asked for before it became the present one.
        client.attach(other, [])
        others = await stream_of(plane, 2)
        await eventually(lambda: subscribed(others) == ["net/10.0.0.2"])


async def test_on_demand_many_held_names_are_subscribed_and_none_is_removed(
    plane: FakeControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xds_requests, "FIRST_REQUEST_LIMIT", 1000)
    monkeypatch.setattr("agent.xds.demand.AT_ONCE", 30)
    target = RecordingDataplane()
    held = {f"cluster//Pod/shop/pod-{n}": "1" for n in range(100)}
    target.held = {ADDRESS: dict(held)}
    async with running(config(plane, on_demand=True)) as client:
        client.attach(target, target.types_now())
        stream = await stream_of(plane)
        assert not stream.first(ADDRESS).initial_resource_versions
        await eventually(lambda: sorted(subscribed(stream)) == sorted(held))
        assert max(len(r.resource_names_subscribe) for r in stream.requests) == 30
        stream.push(response(("local", "1")))
        await eventually(stream.answers)
        assert target.held[ADDRESS] == held | {"local": "1"}


def subscribed(stream: FakeStream) -> list[str]:
    names = [name for request in stream.requests for name in request.resource_names_subscribe]
    return [name for name in names if name != "*"]
