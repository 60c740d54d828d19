"""Certificates for a recording data plane from a real CA server over TLS."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from agent.identity import CaConfig, IdentityManager, IdentityState
from agent.xds.backoff import Backoff
from proto.gen import citadel_pb2, control_pb2
from tests.support.control_plane import FakeControlPlane, Refused
from tests.support.eventually import eventually
from tests.support.small_ca import SmallCa
from tests.support.targets import RecordingKeeper

FAST = Backoff(start=timedelta(milliseconds=20), cap=timedelta(milliseconds=60))
SLOW = Backoff(start=timedelta(minutes=5), cap=timedelta(minutes=5))
Request = citadel_pb2.IstioCertificateRequest


def spiffe(account: str, domain: str = "cluster.local") -> str:
    return f"spiffe://{domain}/ns/shop/sa/{account}"


WEB = spiffe("web")


@pytest.fixture(scope="module")
def ca() -> SmallCa:
    return SmallCa()


@pytest.fixture
async def plane(ca: SmallCa) -> AsyncIterator[FakeControlPlane]:
    async with FakeControlPlane(ca) as plane:
        yield plane


@contextlib.asynccontextmanager
async def running(
    plane: FakeControlPlane, *, retry: Backoff = FAST, **changes: Any
) -> AsyncIterator[IdentityManager]:
    fields: dict[str, Any] = {
        "address": plane.address,
        "root_cert": plane.ca.root_pem,
        "node_name": "n1",
    }
    manager = IdentityManager(CaConfig(**(fields | changes)), "cluster.local", retry=retry)
    task = asyncio.create_task(manager.run())
    try:
        yield manager
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def status_of(manager: IdentityManager, identity: str) -> Any:
    return next(entry for entry in manager.status() if entry.identity == identity)


async def test_wanted_certificate_is_asked_with_impersonation_and_installed(
    plane: FakeControlPlane, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    keeper = RecordingKeeper()
    requests: list[Request] = []
    sign = plane.sign

    async def watched(request: Request, identity: str) -> Sequence[str]:
        requests.append(request)
        return await sign(request, identity)

    plane.sign = watched
    async with running(plane, token_path=token, cluster_id="c1", ttl=timedelta(hours=2)) as manager:
        manager.attach(keeper, [])
        manager.wanted(WEB, connection=True)
        await eventually(lambda: WEB in keeper.installed)
        assert plane.asked == [WEB]
        assert plane.ca_metadata[0]["authorization"] == "Bearer secret"
        assert plane.ca_metadata[0]["clusterid"] == "c1"
        assert requests[0].validity_duration == 7200
        assert len(keeper.chains[WEB]) == 1
        assert keeper.roots[WEB] == (plane.ca.root_pem,)
        await eventually(lambda: status_of(manager, WEB).state is IdentityState.AVAILABLE)
        shown = status_of(manager, WEB)
        assert shown.serial == keeper.installed[WEB].serial
        assert shown.last_error == ""
        half = shown.not_before + (shown.not_after - shown.not_before) / 2
        assert abs(shown.next_attempt - half) <= (shown.not_after - shown.not_before) / 20


async def test_intermediates_and_a_bundle_of_roots_are_told_apart(
    plane: FakeControlPlane,
) -> None:
    keeper = RecordingKeeper()
    middle, other = SmallCa("middle"), SmallCa("other")

    async def sign(request: Request, identity: str) -> Sequence[str]:
        leaf = plane.ca.workload(request.csr, identity)
        return [leaf, middle.root_pem, plane.ca.root_pem + other.root_pem]

    plane.sign = sign
    async with running(plane) as manager:
        manager.attach(keeper, [])
        manager.wanted(WEB, connection=False)
        await eventually(lambda: WEB in keeper.installed)
        assert keeper.chains[WEB][1:] == (middle.root_pem,)
        assert keeper.roots[WEB] == (plane.ca.root_pem, other.root_pem)


async def refused(
    plane: FakeControlPlane, *parts: str, identity: str = WEB, **changes: Any
) -> RecordingKeeper:
    """Nothing is installed, those who wait hear why, and status shows it."""
    keeper = RecordingKeeper()
    async with running(plane, **changes) as manager:
        manager.attach(keeper, [])
        manager.wanted(identity, connection=True)
        await eventually(
            lambda: any(all(part in text for part in parts) for _, text in keeper.failures),
            what=lambda: keeper.failures,
        )
        shown = status_of(manager, identity)
        assert shown.state is IdentityState.UNAVAILABLE
        assert all(part in shown.last_error for part in parts)
        assert not keeper.installed
    return keeper


async def test_certificate_for_somebody_else_is_refused(plane: FakeControlPlane) -> None:
    async def sign(request: Request, identity: str) -> Sequence[str]:
        return [plane.ca.workload(request.csr, spiffe("root")), plane.ca.root_pem]

    plane.sign = sign
    await refused(plane, WEB, spiffe("root"))


async def test_answer_without_a_root_is_refused(plane: FakeControlPlane) -> None:
    async def sign(request: Request, identity: str) -> Sequence[str]:
        return [plane.ca.workload(request.csr, identity)]

    plane.sign = sign
    await refused(plane, "1 certificates", "root")


async def test_expired_leaf_is_refused(plane: FakeControlPlane) -> None:
    async def sign(request: Request, identity: str) -> Sequence[str]:
        ended = datetime.now(UTC) - timedelta(minutes=1)
        return [plane.ca.workload(request.csr, identity, not_after=ended), plane.ca.root_pem]

    plane.sign = sign
    await refused(plane, "expired", "clocks")


async def test_leaf_of_the_future_is_refused(plane: FakeControlPlane) -> None:
    async def sign(request: Request, identity: str) -> Sequence[str]:
        start = datetime.now(UTC) + timedelta(hours=1)
        return [plane.ca.workload(request.csr, identity, not_before=start), plane.ca.root_pem]

    plane.sign = sign
    await refused(plane, "valid from", "clocks")


async def test_answer_that_is_no_pem_is_refused(plane: FakeControlPlane) -> None:
    async def sign(request: Request, identity: str) -> Sequence[str]:
        return ["leaf", "root"]

    plane.sign = sign
    await refused(plane, "isn't PEM")


async def test_foreign_trust_domain_is_never_asked_for(plane: FakeControlPlane) -> None:
    evil = spiffe("web", "evil.td")
    keeper = await refused(plane, "evil.td", "cluster.local", identity=evil)
    assert not plane.asked
    assert not keeper.csrs


async def test_malformed_identity_is_refused(plane: FakeControlPlane) -> None:
    await refused(plane, "not an identity", identity="spiffe://cluster.local/web")


async def test_refusal_names_node_and_token_file(plane: FakeControlPlane, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("t")

    async def sign(request: Request, identity: str) -> Sequence[str]:
        raise Refused(grpc.StatusCode.PERMISSION_DENIED, "no pod of it here")

    plane.sign = sign
    await refused(plane, "no pod of it here", "n1", str(token), token_path=token)


async def test_wrong_root_is_named(plane: FakeControlPlane, tmp_path: Path) -> None:
    roots = tmp_path / "root.pem"
    roots.write_text(SmallCa("another").root_pem)
    await refused(plane, "TLS failed", str(roots), root_cert=str(roots))


async def test_expired_server_certificate_is_named(ca: SmallCa) -> None:
    plane = FakeControlPlane(ca)
    plane.credentials = ca.server("127.0.0.1", expired=True)
    async with plane:
        await refused(plane, "TLS failed", "certificate has expired")


async def test_silent_ca_is_given_up(plane: FakeControlPlane) -> None:
    async def sign(request: Request, identity: str) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    plane.sign = sign
    await refused(plane, "no answer in time", timeout=timedelta(milliseconds=100))


async def test_ca_away_and_back(plane: FakeControlPlane) -> None:
    keeper = RecordingKeeper()
    await plane.stop()
    async with running(plane) as manager:
        manager.attach(keeper, [])
        manager.wanted(WEB, connection=False)
        await eventually(lambda: len(keeper.failures) >= 2)
        assert "connection refused" in keeper.failures[0][1]
        await plane.start()
        await eventually(lambda: WEB in keeper.installed)
        await eventually(lambda: status_of(manager, WEB).last_error == "")


async def test_rotated_roots_and_token_are_used_without_a_restart(
    ca: SmallCa, tmp_path: Path
) -> None:
    roots, token = tmp_path / "root.pem", tmp_path / "token"
    roots.write_text(ca.root_pem)
    token.write_text("one")
    keeper = RecordingKeeper()
    async with (
        FakeControlPlane(ca) as plane,
        running(plane, root_cert=str(roots), token_path=token) as manager,
    ):
        manager.attach(keeper, [])
        manager.wanted(WEB, connection=False)
        await eventually(lambda: WEB in keeper.installed)
        newer = SmallCa("newer")
        await plane.stop()
        plane.credentials = newer.server("127.0.0.1")
        await plane.start()
        roots.write_text(newer.root_pem)
        token.write_text("two")
        manager.wanted(spiffe("db"), connection=False)
        await eventually(lambda: spiffe("db") in keeper.installed, what=lambda: keeper.failures)
        sent = [entry["authorization"] for entry in plane.ca_metadata]
        assert sent == ["Bearer one", "Bearer two"]


async def test_slow_ca_sees_eight_at_a_time_and_each_identity_once(
    plane: FakeControlPlane,
) -> None:
    release = asyncio.Semaphore(0)
    busy = highest = 0
    sign = plane.sign

    async def slow(request: Request, identity: str) -> Sequence[str]:
        nonlocal busy, highest
        busy += 1
        highest = max(highest, busy)
        await release.acquire()
        busy -= 1
        return await sign(request, identity)

    plane.sign = slow
    keeper = RecordingKeeper()
    identities = [spiffe(f"a{number}") for number in range(20)]
    async with running(plane) as manager:
        manager.attach(keeper, [])
        for identity in identities * 3:
            manager.wanted(identity, connection=False)
        await eventually(lambda: busy == 8)
        for identity in identities:
            manager.wanted(identity, connection=True)
        for done in range(20):
            await eventually(lambda done=done: len(plane.asked) == min(8 + done, 20))  # type: ignore[misc]
            release.release()
        await eventually(lambda: len(keeper.installed) == 20)
    assert highest == 8
    assert sorted(plane.asked) == sorted(identities)


async def test_who_waits_goes_before_prefetch(plane: FakeControlPlane) -> None:
    keeper = RecordingKeeper()
    keeper.gate.clear()
    async with running(plane) as manager:
        manager.attach(keeper, [])
        for number in range(12):
            manager.wanted(spiffe(f"a{number}"), connection=False)
        await eventually(lambda: len(keeper.csrs) == 8)
        late, raised = spiffe("late"), spiffe("a11")
        manager.wanted(late, connection=True)
        manager.wanted(raised, connection=True)
        keeper.gate.set()
        await eventually(lambda: len(keeper.installed) == 13)
        assert set(keeper.csrs[8:10]) == {late, raised}


async def test_certificate_is_renewed_at_half_life(plane: FakeControlPlane) -> None:
    keeper = RecordingKeeper()

    async def sign(request: Request, identity: str) -> Sequence[str]:
        now = datetime.now(UTC)
        leaf = plane.ca.workload(
            request.csr,
            identity,
            not_before=now - timedelta(seconds=1),
            not_after=now + timedelta(seconds=3),
        )
        return [leaf, plane.ca.root_pem]

    plane.sign = sign
    async with running(plane) as manager:
        manager.attach(keeper, [])
        manager.wanted(WEB, connection=False)
        await eventually(lambda: WEB in keeper.installed)
        serial = keeper.installed[WEB].serial
        await eventually(lambda: keeper.installed[WEB].serial != serial)
        assert not keeper.failures


async def test_failed_renewal_keeps_the_certificate(plane: FakeControlPlane) -> None:
    keeper = RecordingKeeper()
    now = int(datetime.now(UTC).timestamp())
    held = control_pb2.CertificateStatus(
        identity=WEB, not_before=now - 1000, not_after=now + 500, serial="77"
    )

    async def sign(request: Request, identity: str) -> Sequence[str]:
        raise Refused(grpc.StatusCode.INTERNAL, "no key")

    plane.sign = sign
    async with running(plane) as manager:
        manager.attach(keeper, [held])
        await eventually(lambda: keeper.failures)
        shown = status_of(manager, WEB)
        assert shown.state is IdentityState.AVAILABLE
        assert shown.serial == "77"
        assert "no key" in shown.last_error


async def test_connection_may_ask_during_back_off_but_once_a_second(
    plane: FakeControlPlane,
) -> None:
    keeper = RecordingKeeper()

    async def sign(request: Request, identity: str) -> Sequence[str]:
        raise Refused(grpc.StatusCode.INTERNAL, "no key")

    plane.sign = sign
    loop = asyncio.get_running_loop()
    async with running(plane, retry=SLOW) as manager:
        manager.attach(keeper, [])
        started = loop.time()
        manager.wanted(WEB, connection=True)
        await eventually(lambda: len(keeper.failures) == 1)
        manager.wanted(WEB, connection=False)
        for _ in range(50):
            manager.wanted(WEB, connection=True)
        await eventually(lambda: len(keeper.failures) == 2)
        assert loop.time() - started >= 0.99
        assert len(plane.asked) == 2


async def test_adopted_certificates_are_not_asked_for_again(plane: FakeControlPlane) -> None:
    keeper = RecordingKeeper()
    now = int(datetime.now(UTC).timestamp())
    fresh = control_pb2.CertificateStatus(
        identity=WEB, not_before=now - 10, not_after=now + 86400, serial="1"
    )
    never = control_pb2.CertificateStatus(identity=spiffe("db"))
    gone = control_pb2.CertificateStatus(
        identity=spiffe("old"), not_before=now - 100, not_after=now - 10, serial="2"
    )
    async with running(plane) as manager:
        manager.attach(keeper, [fresh, never, gone])
        await eventually(lambda: len(keeper.installed) == 2)
        assert sorted(plane.asked) == [spiffe("db"), spiffe("old")]
        assert status_of(manager, WEB).state is IdentityState.AVAILABLE


async def test_new_data_plane_gets_certificates_of_its_own(plane: FakeControlPlane) -> None:
    first, second = RecordingKeeper(), RecordingKeeper()
    async with running(plane) as manager:
        manager.attach(first, [])
        manager.wanted(WEB, connection=False)
        await eventually(lambda: WEB in first.installed)
        first.gate.clear()
        manager.wanted(spiffe("db"), connection=True)
        await eventually(lambda: spiffe("db") in first.csrs)
        manager.attach(second, [])
        await eventually(lambda: len(second.installed) == 2)
        first.gate.set()
        assert second.installed[WEB].serial != first.installed[WEB].serial
        assert spiffe("db") not in first.installed
        assert not first.failures


async def test_nothing_is_fetched_without_a_data_plane(plane: FakeControlPlane) -> None:
    keeper = RecordingKeeper()
    async with running(plane) as manager:
        manager.wanted(WEB, connection=True)
        manager.attach(keeper, [])
        manager.detach()
        manager.wanted(spiffe("db"), connection=True)
        manager.attach(keeper, [])
        await eventually(lambda: len(keeper.installed) == 2)
        assert len(plane.asked) == 2


async def test_forgotten_identity_is_left_alone(plane: FakeControlPlane) -> None:
    keeper = RecordingKeeper()
    keeper.gate.clear()
    async with running(plane) as manager:
        manager.attach(keeper, [])
        manager.wanted(WEB, connection=True)
        await eventually(lambda: keeper.csrs == [WEB])
        manager.forgotten(WEB)
        keeper.gate.set()
        manager.wanted(spiffe("db"), connection=True)
        await eventually(lambda: spiffe("db") in keeper.installed)
        assert [entry.identity for entry in manager.status()] == [spiffe("db")]
        assert WEB not in keeper.installed
