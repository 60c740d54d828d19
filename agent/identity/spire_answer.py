"""Judges the SPIRE agent's answers before they go to the data plane: no I/O."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from cryptography import x509

from agent.identity.answer import Issued, check_leaf, pem
from agent.identity.ca import CaError
from agent.identity.roots import MOST
from agent.identity.spire_wire import Svid
from proto.gen import spire_pb2

WHO = "the SPIRE agent"


def selectors_of(identity: str) -> list[spire_pb2.Selector]:
    """By which registration entries are found; the identity was checked before."""
    _, _, _, _, namespace, _, account = identity.split("/")
    return [
        spire_pb2.Selector(type="k8s", value=f"ns:{namespace}"),
        spire_pb2.Selector(type="k8s", value=f"sa:{account}"),
    ]


def choose(svids: Sequence[Svid], identity: str) -> Svid:
    """The one for this identity; others that the selectors match too are passed over."""
    for svid in svids:
        if svid.identity == identity:
            return svid
    wanted = " ".join(f"{one.type}:{one.value}" for one in selectors_of(identity))
    if svids:
        others = ", ".join(sorted({svid.identity for svid in svids}))
        raise CaError(
            f"{identity}: {WHO} answered with an SVID for {others}; "
            f"correct the SPIFFE id of the registration entry with the selectors {wanted}"
        )
    raise CaError(
        f"{identity}: {WHO} has no SVID for the selectors {wanted}; "
        "make a registration entry with these selectors, or some of them, and this SPIFFE id"
    )


def check_svid(svid: Svid, identity: str, roots: tuple[str, ...], now: datetime) -> Issued:
    """Raises CaError unless the leaf is for this identity and valid now."""
    if not svid.chain or not len(svid.key):
        lacks = "certificate" if not svid.chain else "key"
        raise CaError(f"{identity}: {WHO} delivered an SVID without a {lacks}")
    try:
        chain = [x509.load_der_x509_certificate(der) for der in svid.chain]
    except ValueError as exc:
        raise CaError(f"{identity}: {WHO} delivered what is no certificate: {exc}") from exc
    leaf = chain[0]
    check_leaf(leaf, identity, now, who=WHO)
    return Issued(
        chain=tuple(pem(certificate) for certificate in chain),
        roots=roots,
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
    )


def roots_of(bundles: Mapping[str, bytes], trust_domain: str) -> tuple[str, ...]:
    """The roots (PEM) of our trust domain. Raises CaError when there are none.

    Federated bundles are no roots here: one that counts proves every name, ours included.
    """
    bundle = bundles.get(f"spiffe://{trust_domain}", bundles.get(trust_domain))
    if bundle is None:
        others = ", ".join(sorted(bundles)) or "no trust domain"
        raise CaError(
            f"{WHO} has roots of {others}, this mesh's trust domain is {trust_domain}; "
            "correct the agent's trust domain or use another SPIRE agent"
        )
    try:
        found = [x509.load_der_x509_certificate(der) for der in _documents(bundle)]
    except ValueError as exc:
        raise CaError(f"{WHO}'s roots of {trust_domain} can't be read: {exc}") from exc
    if not found:
        raise CaError(f"{WHO}'s bundle of {trust_domain} is empty")
    if len(found) > MOST:
        raise CaError(f"{WHO} has {len(found)} roots of {trust_domain}, at most {MOST} are taken")
    return tuple(sorted({pem(certificate) for certificate in found}))


def _documents(bundle: bytes) -> list[bytes]:
    """DER documents that lie one behind the other. Raises ValueError."""
    found = []
    while bundle:
        head, size = 2, bundle[1] if len(bundle) > 1 else 0
        if size & 0x80:
            head += size & 0x7F
            size = int.from_bytes(bundle[2:head], "big")
        if head + size > len(bundle):
            raise ValueError("the last one is cut off")
        found.append(bundle[: head + size])
        bundle = bundle[head + size :]
    return found
