"""Certificates for pods' accounts, node tokens, and what a restart keeps."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from controlplane import tokens
from controlplane.ca.authority import Authority, AuthorityError
from controlplane.tokens import TokenError, TokenKey
from proto.gen import citadel_pb2
from tests.unit.controlplane.plane import NodeStream, Plane, plane
from tests.unit.controlplane.world import pod

METHOD = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
CART = "spiffe://cluster.local/ns/shop/sa/cart"
PODS = {"a.yaml": pod("cart") + pod("web", node="n2", ip="10.0.2.5")}


def csr(key: Any = None, *uris: str) -> str:
    key = key or ec.generate_private_key(ec.SECP256R1())
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


async def ask(
    running: Plane,
    identity: str = CART,
    *,
    token: str | None = None,
    request_csr: str | None = None,
    seconds: int = 0,
) -> list[str]:
    """The chain; raises AioRpcError as the agent would see it."""
    request = citadel_pb2.IstioCertificateRequest(
        csr=csr() if request_csr is None else request_csr, validity_duration=seconds
    )
    if identity:
        request.metadata["ImpersonatedIdentity"] = identity
    bearer = running.token() if token is None else token
    async with running.channel() as channel:
        call = channel.unary_unary(
            METHOD,
            request_serializer=citadel_pb2.IstioCertificateRequest.SerializeToString,
            response_deserializer=citadel_pb2.IstioCertificateResponse.FromString,
        )
        reply = await call(request, metadata=(("authorization", f"Bearer {bearer}"),))
    return list(reply.cert_chain)


async def refusal(running: Plane, identity: str = CART, **more: Any) -> tuple[Any, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(running, identity, **more)
    return caught.value.code(), caught.value.details() or ""


async def test_a_dedicated_proxy_names_its_workload_in_the_csr_alone(tmp_path: Path) -> None:
    async with plane(tmp_path, PODS) as running:
        leaf_pem, _ = await ask(running, "", request_csr=csr(None, CART))
        leaf = x509.load_pem_x509_certificate(leaf_pem.encode())
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [CART]
        other = "spiffe://cluster.local/ns/shop/sa/web"
        code, text = await refusal(running, "", request_csr=csr(None, other))
        assert code == grpc.StatusCode.PERMISSION_DENIED
        assert "has no pod of service account shop/web" in text
        code, text = await refusal(running, "", request_csr=csr(None, CART, other))
        assert code == grpc.StatusCode.PERMISSION_DENIED
        assert "the CSR names no identity" in text


async def test_a_certificate_is_of_the_account_and_of_the_requests_key(tmp_path: Path) -> None:
    async with plane(tmp_path, PODS) as running:
        key = ec.generate_private_key(ec.SECP256R1())
        leaf_pem, root_pem = await ask(running, request_csr=csr(key))
        leaf = x509.load_pem_x509_certificate(leaf_pem.encode())
        root = x509.load_pem_x509_certificate(root_pem.encode())
        assert root_pem == (running.state / "root-cert.pem").read_text()
    leaf.verify_directly_issued_by(root)
    assert leaf.public_key() == key.public_key()
    assert leaf.subject == x509.Name([])
    sans = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert sans.critical
    assert sans.value.get_values_for_type(x509.UniformResourceIdentifier) == [CART]
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    now = datetime.now(UTC)
    assert timedelta(minutes=1) < now - leaf.not_valid_before_utc < timedelta(minutes=3)
    assert timedelta(hours=23) < leaf.not_valid_after_utc - now <= timedelta(hours=24)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


async def test_the_asked_life_is_given_up_to_the_limit(tmp_path: Path) -> None:
    async with plane(tmp_path, PODS) as running:
        leaf = x509.load_pem_x509_certificate((await ask(running, seconds=600))[0].encode())
        assert leaf.not_valid_after_utc - datetime.now(UTC) <= timedelta(seconds=600)
        code, text = await refusal(running, seconds=2160 * 3600 + 1)
        assert (code, "greater than the maximum" in text) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            True,
        )


@pytest.mark.parametrize(
    ("identity", "says"),
    [
        ("spiffe://evil.td/ns/shop/sa/cart", "trust domain 'evil.td'"),
        ("spiffe://cluster.local/ns/shop/sa/web", "node n1 has no pod of service account shop/web"),
        ("spiffe://cluster.local/ns/shop/sa/ghost", "node n1 has no pod"),
        ("spiffe://cluster.local/ns/shop", "is not of the form"),
        ("spiffe://cluster.local/ns//sa/cart", "is not of the form"),
        ("spiffe://cluster.local/ns/shop/sa/cart/x", "is not of the form"),
        ("cluster.local/ns/shop/sa/cart", "is not of the form"),
        ("", "ImpersonatedIdentity is missing"),
    ],
)
async def test_identities_beyond_the_nodes_pods_are_refused(
    tmp_path: Path, identity: str, says: str
) -> None:
    async with plane(tmp_path, PODS) as running:
        code, text = await refusal(running, identity)
        assert code == grpc.StatusCode.PERMISSION_DENIED
        assert says in text


async def test_each_node_gets_its_own_pods_accounts(tmp_path: Path) -> None:
    async with plane(tmp_path, PODS) as running:
        web = "spiffe://cluster.local/ns/shop/sa/web"
        assert len(await ask(running, web, token=running.token("n2"))) == 2
        assert (await refusal(running, token=running.token("n2")))[0] == (
            grpc.StatusCode.PERMISSION_DENIED
        )


async def test_a_pod_that_was_just_written_is_waited_for(tmp_path: Path) -> None:
    async with plane(tmp_path) as running:
        running.write("a.yaml", pod("cart"))
        assert len(await ask(running)) == 2


async def test_tokens_of_nobody_expired_or_foreign_are_refused(tmp_path: Path) -> None:
    async with plane(tmp_path, PODS) as running:
        expired = TokenKey.load(running.state).issue("n1", timedelta(seconds=1), now=0)
        foreign = tokens.issue(tmp_path / "other", "n1")
        for token, says in (
            (expired, "has expired"),
            (foreign, "not signed by this control plane"),
            ("", "not signed"),
            ("x", "not signed"),
        ):
            code, text = await refusal(running, token=token)
            assert (code, says in text) == (grpc.StatusCode.UNAUTHENTICATED, True), text


async def test_requests_that_their_key_did_not_sign_are_refused(tmp_path: Path) -> None:
    good = x509.load_pem_x509_csr(csr().encode())
    der = bytearray(good.public_bytes(serialization.Encoding.DER))
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    old = good.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
    new = other.public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
    swapped = x509.load_der_x509_csr(bytes(der).replace(old, new))
    foreign = swapped.public_bytes(serialization.Encoding.PEM).decode()
    weak = csr(rsa.generate_private_key(65537, 1024))
    async with plane(tmp_path, PODS) as running:
        for text, says in (
            (foreign, "isn't signed by the key it carries"),
            (weak, "kind or size"),
            ("nonsense", "not a certificate signing request"),
        ):
            code, details = await refusal(running, request_csr=text)
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert says in details


async def test_a_restart_keeps_root_tokens_and_addresses(tmp_path: Path) -> None:
    service = (
        "apiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\n"
        "spec: {ports: [{port: 80}]}\n"
    )
    async with plane(tmp_path, {**PODS, "s.yaml": service}) as running:
        token = running.token()
        root = (running.state / "root-cert.pem").read_text()
        before = await NodeStream(running.channel(), token).subscribe()
    async with plane(tmp_path) as running:
        after = await NodeStream(running.channel(), token).subscribe()
        chain = await ask(running, token=token)
    assert chain[-1] == root
    assert {r.name: r.resource.value for r in before.resources} == {
        r.name: r.resource.value for r in after.resources
    }


async def test_secrets_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    async with plane(tmp_path) as running:
        for name in ("ca-key.pem", "token-key"):
            assert stat.S_IMODE((running.state / name).stat().st_mode) == 0o600
        assert stat.S_IMODE(running.state.stat().st_mode) == 0o700


def test_a_root_of_another_key_is_refused(tmp_path: Path) -> None:
    Authority.load(tmp_path / "a", "cluster.local")
    Authority.load(tmp_path / "b", "cluster.local")
    (tmp_path / "a" / "root-cert.pem").write_bytes((tmp_path / "b" / "root-cert.pem").read_bytes())
    with pytest.raises(AuthorityError, match="restore the pair"):
        Authority.load(tmp_path / "a", "cluster.local")
    (tmp_path / "b" / "ca-key.pem").unlink()
    with pytest.raises(AuthorityError, match="is missing"):
        Authority.load(tmp_path / "b", "cluster.local")


def test_a_token_names_its_node_and_may_end_in_a_newline(tmp_path: Path) -> None:
    token = tokens.issue(tmp_path / "s", "n1", timedelta(hours=1))
    assert TokenKey.load(tmp_path / "s").verify(token + "\n").node == "n1"


@pytest.mark.parametrize(("node", "ttl"), [("", 60), ("a b", 60), ("n1", 0)])
def test_senseless_tokens_are_not_made(tmp_path: Path, node: str, ttl: int) -> None:
    with pytest.raises(TokenError):
        tokens.issue(tmp_path, node, timedelta(seconds=ttl))
