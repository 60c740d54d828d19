"""A control plane and a CA that misbehave while pods talk: half-wrong pushes, slow, failing and
mistaken signatures, certificates of another time."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio

from agent.cli.demo.clients import Conversation, Load
from agent.cli.demo.manifests import Pod
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT, NAMESPACE, serve_echo, serve_http
from agent.cli.demo.story import greets, progress
from agent.cli.demo.wiretap import Wiretap
from agent.cli.demo.world import World
from agent.xds import ADDRESS, AUTHORIZATION
from proto.gen import authorization_pb2
from tests.support.control_plane import FakeControlPlane, Refused
from tests.support.operator import ask
from tests.support.scripted import ScriptedMesh, workload
from tests.support.small_ca import SmallCa
from tests.support.vitals import Vitals, counted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from proto.gen import citadel_pb2

    Sign = Callable[[citadel_pb2.IstioCertificateRequest, str], Awaitable[Sequence[str]]]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scripted(
    new_prefix: Callable[[], str], capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ScriptedMesh]:
    """web, db (echo) and api (nginx) on one node, all captured."""
    world = World(new_prefix(), nodes=1)
    world.up()
    folder = tmp_path_factory.mktemp("scripted")
    (node,) = world.nodes
    async with FakeControlPlane(SmallCa(), namespace=node.namespace) as plane:
        options = (f"--capture={capture}",)
        mesh = ScriptedMesh(world, folder, folder / "run", options, plane=plane)
        serving = asyncio.create_task(mesh.serve())
        mesh.prepare()
        mesh.add(*(pod(mesh, name) for name in ("web", "db", "api")))
        await serve_echo(mesh, named(mesh, "db"))
        await serve_http(mesh, named(mesh, "api"))
        await mesh.start()
        await mesh.until("db answers", lambda: greets(named(mesh, "web"), named(mesh, "db")))
        yield mesh
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        world.down()
        for process in mesh.processes.values():
            await process.wait()


def pod(mesh: ScriptedMesh, name: str) -> Pod:
    return Pod(mesh.world.add_pod(mesh.world.nodes[0], name), NAMESPACE, name)


def named(mesh: ScriptedMesh, name: str) -> Pod:
    return next(pod for pod in mesh.pods if pod.name == name)


def unreadable_policy(namespace: str) -> authorization_pb2.Authorization:
    """An address of five bytes is of no family."""
    found = authorization_pb2.Authorization(
        name="torn", namespace=namespace, scope=authorization_pb2.NAMESPACE
    )
    match = found.rules.add().clauses.add().matches.add()
    match.source_ips.add(address=b"12345", length=32)
    return found


def spiffe(account: str) -> str:
    return f"spiffe://cluster.local/ns/{NAMESPACE}/sa/{account}"


async def test_half_wrong_push_costs_only_what_is_wrong(scripted: ScriptedMesh) -> None:
    (node,) = scripted.world.nodes
    web, db, api = (named(scripted, name) for name in ("web", "db", "api"))
    vitals = await Vitals.of(scripted, node)
    renamed = workload(api)[1]
    renamed.workload.canonical_name = "api-v2"  # type: ignore[attr-defined]
    async with (
        Conversation(web, db.sandbox.ipv4, ECHO_PORT) as talk,
        Load(web, api.sandbox.ipv4, HTTP_PORT) as load,
    ):
        await progress(load, 5)
        # Broken in the middle of a field, between two good ones.
        scripted.send(
            ADDRESS,
            workload(db),
            ("Kubernetes//Pod/shop/torn", b"\x0a\x7f\x08"),
            (f"Kubernetes//Pod/{NAMESPACE}/api", renamed),
        )
        # Without a good version it denies, but only where it was meant for.
        scripted.send(AUTHORIZATION, ("elsewhere/torn", unreadable_policy("elsewhere")))

        async def told() -> bool:
            said = await ask(scripted.run_dir, node.name, "status")
            return said.code == 1 and said.tells(
                "Kubernetes//Pod/shop/torn", "Authorization elsewhere/torn was rejected"
            )

        await scripted.until("status names both", told, node.name)
        assert await counted(node, "underpass_agent_rejected_resources", type="Address") == 1
        assert await counted(node, "underpass_agent_rejected_resources", type="Authorization") == 1
        # What was good beside them counts.
        known = await scripted.admin(node, "workloads")
        assert "api-v2" in {row.get("canonicalName") for row in known}
        nack = [request for request in scripted.plane.streams[-1].answers() if request.error_detail]
        assert any("torn" in request.error_detail.message for request in nack)
        await progress(load, 5)
        assert await talk.echo("not cut")
    assert load.failures == []
    scripted.withdraw_resource(ADDRESS, "Kubernetes//Pod/shop/torn")
    scripted.withdraw_resource(AUTHORIZATION, "elsewhere/torn")

    async def well() -> bool:
        return (await ask(scripted.run_dir, node.name, "status")).code == 0

    await scripted.until("nothing is wrong any more", well, node.name)
    await vitals.recovered(scripted)


async def test_slow_ca_delays_its_own_identity_and_nobody_else(scripted: ScriptedMesh) -> None:
    web, db = named(scripted, "web"), named(scripted, "db")
    late = pod(scripted, "slow")
    go = asyncio.Event()

    async def slow(request: citadel_pb2.IstioCertificateRequest, identity: str) -> Sequence[str]:
        if identity == spiffe("slow"):
            await go.wait()
        return await scripted.plane._sign(request, identity)

    scripted.plane.sign = slow
    scripted.add(late)
    await scripted.until("the CA is asked", lambda: spiffe("slow") in scripted.plane.asked)
    await scripted.settled()
    waiting = asyncio.create_task(greets(late, db))
    assert await greets(web, db)
    assert not waiting.done()
    go.set()
    # Within the five seconds that a connection waits for its certificate.
    assert await waiting
    scripted.remove(late)
    await scripted.settled()


async def unavailable(ca: SmallCa, csr: str, identity: str) -> Sequence[str]:
    raise Refused(grpc.StatusCode.UNAVAILABLE, "the signer is on fire")


async def mistaken(ca: SmallCa, csr: str, identity: str) -> Sequence[str]:
    return [ca.workload(csr, spiffe("somebody-else")), ca.root_pem]


async def foreign(ca: SmallCa, csr: str, identity: str) -> Sequence[str]:
    return [SmallCa("foreign").workload(csr, identity), ca.root_pem]


async def expired(ca: SmallCa, csr: str, identity: str) -> Sequence[str]:
    """The CA's clock is a day slow, or ours a day fast."""
    end = datetime.now(UTC) - timedelta(hours=1)
    return [
        ca.workload(csr, identity, not_before=end - timedelta(hours=23), not_after=end),
        ca.root_pem,
    ]


async def not_yet_valid(ca: SmallCa, csr: str, identity: str) -> Sequence[str]:
    begin = datetime.now(UTC) + timedelta(hours=1)
    return [ca.workload(csr, identity, not_before=begin), ca.root_pem]


async def torn(ca: SmallCa, csr: str, identity: str) -> Sequence[str]:
    return [ca.workload(csr, identity)[:300], ca.root_pem]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (unavailable, ("the signer is on fire",)),
        (mistaken, ("somebody-else",)),
        (foreign, ("certificate",)),
        (expired, ("the CA's certificate", "compare the clocks")),
        (not_yet_valid, ("the CA's certificate is valid from", "compare the clocks")),
        (torn, ("certificate",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_bad_certificates_refuse_their_own_identity_until_good_ones_come(
    scripted: ScriptedMesh,
    fault: Callable[[SmallCa, str, str], Awaitable[Sequence[str]]],
    told: tuple[str, ...],
) -> None:
    (node,) = scripted.world.nodes
    web, db, api = (named(scripted, name) for name in ("web", "db", "api"))
    vitals = await Vitals.of(scripted, node)
    victim = pod(scripted, f"late-{fault.__name__.replace('_', '-')}")
    healed = False

    async def sign(request: citadel_pb2.IstioCertificateRequest, identity: str) -> Sequence[str]:
        if identity == spiffe(victim.name) and not healed:
            return await fault(scripted.plane.ca, request.csr, identity)
        return await scripted.plane._sign(request, identity)

    scripted.plane.sign = sign
    marker = f"marker-{fault.__name__}"
    with Wiretap(node.namespace, victim.sandbox.link, marker.encode()) as tap:
        async with (
            Conversation(web, db.sandbox.ipv4, ECHO_PORT) as talk,
            Load(web, api.sandbox.ipv4, HTTP_PORT) as load,
        ):
            scripted.add(victim)
            await scripted.settled()

            async def status_tells() -> bool:
                said = await ask(scripted.run_dir, node.name, "status")
                return said.code == 1 and said.tells(
                    f"no certificate for {spiffe(victim.name)}: its connections are refused", *told
                )

            await scripted.until(f"status tells {told}", status_tells, node.name)
            assert not await greets(victim, db)
            failed = "istio_tcp_connections_failed_total"
            assert await counted(node, failed, source_principal=spiffe(victim.name)) >= 1
            await progress(load, 5)
            assert await talk.echo("not cut")
            healed = True
            await scripted.until("it is served", lambda: greets(victim, db), seconds=30)
            await progress(load, 5)
        assert load.failures == []
    assert tap.sightings == 0
    scripted.remove(victim)
    await scripted.settled()
    scripted.world.remove_pod(victim.sandbox)
    await vitals.recovered(scripted)
