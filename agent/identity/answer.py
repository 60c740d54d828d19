"""Checks a CA's answer before it goes to the data plane; parses it once."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from agent.identity.ca import CaError


@dataclass(frozen=True)
class Issued:
    """A certificate that is for the identity asked for, with what proves it."""

    # PEM, leaf first, without the roots.
    chain: tuple[str, ...]
    # PEM, one certificate each.
    roots: tuple[str, ...]
    not_before: datetime
    not_after: datetime


def trust_domain_of(identity: str) -> str:
    """Raises CaError for what isn't spiffe://<trust domain>/ns/<namespace>/sa/<account>."""
    match identity.split("/"):
        case ["spiffe:", "", str(domain), "ns", str(namespace), "sa", str(account)] if (
            domain and namespace and account
        ):
            return domain
    raise CaError(f"{identity}: not an identity of the form spiffe://domain/ns/…/sa/…")


def check_identity(identity: str, trust_domain: str, aliases: Sequence[str] = ()) -> None:
    """Raises CaError for an identity outside the mesh.

    A CA may sign any trust domain (facts istio-ambient 7.1), so it is checked here.
    """
    found = trust_domain_of(identity)
    if found != trust_domain and found not in aliases:
        raise CaError(
            f"{identity}: its trust domain is {found}, this mesh's is {trust_domain}; "
            "correct the agent's trust domain or the workload's"
        )


def check_answer(answer: Sequence[str], identity: str, now: datetime) -> Issued:
    """Raises CaError unless the leaf is for this identity, valid now, and roots came along."""
    if len(answer) < 2:
        raise CaError(
            f"{identity}: the CA delivered {len(answer)} certificates, a leaf and a root are "
            "needed; its root certificate isn't part of the answer"
        )
    parsed = [_parse(text, identity) for text in answer]
    chain = [certificate for element in parsed[:-1] for certificate in element]
    if not chain or not parsed[-1]:
        raise CaError(f"{identity}: the CA's answer holds no certificate where one is expected")
    leaf = chain[0]
    check_leaf(leaf, identity, now)
    return Issued(
        chain=tuple(pem(certificate) for certificate in chain),
        roots=tuple(pem(certificate) for certificate in parsed[-1]),
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
    )


def check_leaf(leaf: x509.Certificate, identity: str, now: datetime, who: str = "the CA") -> None:
    """Raises CaError unless it is for this identity alone and valid now."""
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        found = []
    if found != [identity]:
        raise CaError(
            f"{identity}: {who} answered with a certificate for {', '.join(found) or 'nobody'}"
        )
    if leaf.not_valid_after_utc <= now:
        raise CaError(
            f"{identity}: {who}'s certificate expired at {_time(leaf.not_valid_after_utc)}, "
            f"it is {_time(now)} here; compare the clocks"
        )
    if leaf.not_valid_before_utc > now:
        raise CaError(
            f"{identity}: {who}'s certificate is valid from {_time(leaf.not_valid_before_utc)}, "
            f"it is {_time(now)} here; compare the clocks"
        )


def _parse(text: str, identity: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(text.encode())
    except ValueError as error:
        raise CaError(f"{identity}: the CA's answer isn't PEM: {error}") from error


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
