"""Trust as operators and applications notice it: who is shut out by a CRL, and who goes on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.cli.demo.clients import Conversation
from agent.cli.demo.mesh import Mesh, access_lines
from agent.cli.demo.shop import ECHO_PORT, Shop, build, serve_echo
from agent.cli.demo.story import greets, spiffe
from tests.support.meshes import mesh_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.world import Node, World

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    """Each node follows a CRL of its own, which isn't there at first."""
    async with mesh_of(Mesh, world, capture, tmp_path_factory.mktemp("trust")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(mesh: Mesh) -> Shop:
    made = build(mesh)
    for pod in (made.db, made.cart):
        await serve_echo(mesh, pod)
    await mesh.start_control_plane()
    told = mesh.agent_options
    for node in mesh.world.nodes:
        mesh.agent_options = (*told, f"--trust-crl={crl_of(mesh, node)}")
        await mesh.start_agent(node)
    await mesh.settled()
    return made


def crl_of(mesh: Mesh, node: Node) -> Path:
    return mesh.folder / f"{node.name}.crl"


def revoke(mesh: Mesh, node: Node, *serials: int) -> None:
    """Signed by the embedded CA, as its operator would have it done."""
    state = mesh.control_plane_state
    key = serialization.load_pem_private_key((state / "ca-key.pem").read_bytes(), None)
    root = x509.load_pem_x509_certificate((state / "root-cert.pem").read_bytes())
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(root.subject)
        .last_update(now - timedelta(hours=2))
        # Expired on purpose: what was revoked stays so.
        .next_update(now - timedelta(hours=1))
        .add_extension(x509.CRLNumber(1), critical=False)
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial)
        builder = builder.add_revoked_certificate(entry.revocation_date(now).build())
    content = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    new = mesh.folder / "crl.new"
    new.write_bytes(content)
    new.rename(crl_of(mesh, node))


async def serial(mesh: Mesh, pod: Pod) -> int:
    held = await mesh.admin(pod.sandbox.node, "certificates")
    return next(int(c["serial"]) for c in held if c["identity"] == spiffe(pod))


async def becomes(mesh: Mesh, client: Pod, server: Pod, *, allowed: bool) -> None:
    async def reached() -> bool:
        return await greets(client, server) is allowed

    await mesh.until(f"{client.name} {'in' if allowed else 'out'}", reached, seconds=15)


async def test_a_crl_that_is_not_there_yet_is_told_and_stops_nobody(mesh: Mesh, shop: Shop) -> None:
    node = mesh.world.nodes[0]
    assert await greets(shop.web, shop.db)
    status = await mesh.admin(node, "status")
    problems = [f"{p['what']}: {p['why']}" for p in status["problems"]]
    assert any("CRL" in text and str(crl_of(mesh, node)) in text for text in problems), problems


async def test_a_revoked_client_is_refused_and_its_live_connection_cut(
    mesh: Mesh, shop: Shop
) -> None:
    node = shop.db.sandbox.node
    host = shop.db.sandbox.ipv4
    async with (
        Conversation(shop.web, host, ECHO_PORT) as web,
        Conversation(shop.batch, host, ECHO_PORT) as batch,
    ):
        revoke(mesh, node, await serial(mesh, shop.web))
        assert await web.ended(15)
        assert await batch.echo("others go on")
        await becomes(mesh, shop.web, shop.db, allowed=False)
        assert await batch.echo("others go on")
    log = mesh.log(node.name)

    def cuts() -> int:
        told = spiffe(shop.web), "the CRL revokes serial"
        return len(access_lines(log, "connection complete", *told))

    await mesh.until("the cut in the log", lambda: cuts() > 0)
    assert cuts() == 1
    await mesh.until(
        "the refusal in the log",
        lambda: bool(access_lines(log, "connection failed", "the CRL revokes a certificate")),
    )
    revoke(mesh, node)
    await becomes(mesh, shop.web, shop.db, allowed=True)


async def test_a_client_leaves_a_revoked_server(mesh: Mesh, shop: Shop) -> None:
    node = shop.web.sandbox.node
    log = mesh.log(node.name)
    async with (
        Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as to_db,
        Conversation(shop.web, shop.cart.sandbox.ipv4, ECHO_PORT) as to_cart,
    ):
        revoke(mesh, node, await serial(mesh, shop.db))
        assert await to_db.ended(15)
        assert await to_cart.echo("others go on")
    await becomes(mesh, shop.web, shop.db, allowed=False)
    await mesh.until(
        "the cut in the log",
        lambda: bool(access_lines(log, "outbound", spiffe(shop.db), "the CRL revokes serial")),
    )
    revoke(mesh, node)
    await becomes(mesh, shop.web, shop.db, allowed=True)


async def test_an_unreadable_crl_keeps_what_was_revoked(mesh: Mesh, shop: Shop) -> None:
    node = shop.db.sandbox.node
    revoke(mesh, node, await serial(mesh, shop.web))
    await becomes(mesh, shop.web, shop.db, allowed=False)
    crl_of(mesh, node).write_text("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")

    async def told() -> bool:
        status = await mesh.admin(node, "status")
        return any("block 1" in problem["why"] for problem in status["problems"])

    await mesh.until("the reason in the status", told)
    assert not await greets(shop.web, shop.db)
    assert await greets(shop.batch, shop.db)
    revoke(mesh, node)
    await becomes(mesh, shop.web, shop.db, allowed=True)
