"""The mesh's root: a P-256 key and a self-signed certificate, made once and kept."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controlplane import state_files

KEY_FILE = "ca-key.pem"
ROOT_FILE = "root-cert.pem"

_ROOT_LIFE = timedelta(days=3650)
_SERVER_LIFE = timedelta(days=90)
# For clocks that are slow, as istiod has it (facts istio-ambient 7.1).
_BACKDATE = timedelta(minutes=2)
_CSR_LIMIT = 64 * 1024


class AuthorityError(Exception):
    """The key or root in the state folder can't be used; the text says what to do."""


class CsrError(ValueError):
    """The request for a certificate can't be signed as it is."""


@dataclass(frozen=True)
class ServerCertificate:
    """PEM, for the control plane's own endpoint."""

    key: bytes
    chain: bytes
    renew_at: datetime


class Authority:
    """Signs with the root's key, which never leaves this object and its file."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, root: x509.Certificate) -> None:
        self._key = key
        self._root = root
        self.root_pem = root.public_bytes(serialization.Encoding.PEM).decode()

    @classmethod
    def load(cls, state: Path, trust_domain: str) -> "Authority":
        """Reads key and root, or makes what isn't there. Raises AuthorityError."""
        key_path, root_path = state / KEY_FILE, state / ROOT_FILE
        try:
            state_files.ensure_folder(state)
            if root_path.exists() and not key_path.exists():
                raise AuthorityError(
                    f"{key_path}: is missing though {ROOT_FILE} exists: restore the key, or remove "
                    "both and give agents the new root"
                )
            if not key_path.exists():
                state_files.create(key_path, _new_key_pem(), state_files.SECRET)
            key_path.chmod(state_files.SECRET)
            key = _load_key(key_path)
            if not root_path.exists():
                root = _new_root(key, trust_domain)
                pem = root.public_bytes(serialization.Encoding.PEM)
                state_files.create(root_path, pem, state_files.PUBLIC)
            root = x509.load_pem_x509_certificate(root_path.read_bytes())
        except OSError as error:
            raise AuthorityError(f"{error.filename}: {error.strerror}") from error
        except ValueError as error:
            raise AuthorityError(
                f"{root_path}: not a certificate: remove it to have it made anew"
            ) from error
        if root.public_key() != key.public_key():
            raise AuthorityError(f"{root_path}: isn't of the key in {KEY_FILE}: restore the pair")
        if root.not_valid_after_utc <= datetime.now(UTC):
            raise AuthorityError(
                f"{root_path}: has expired: remove it and {KEY_FILE}, then give agents the new root"
            )
        return cls(key, root)

    def sign_workload(self, csr_pem: str, identity: str, ttl: timedelta) -> list[str]:
        """Leaf and root for a SPIFFE id; of the request only key and signature count.

        Raises CsrError.
        """
        leaf = self._leaf(
            _csr_key(csr_pem),
            x509.Name([]),
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]),
            ttl,
            client=True,
        )
        return [leaf.public_bytes(serialization.Encoding.PEM).decode(), self.root_pem]

    def issue_server(self, names: Iterable[str]) -> ServerCertificate:
        """A fresh key and certificate for the control plane's own endpoint."""
        key = ec.generate_private_key(ec.SECP256R1())
        sans = [_general_name(name) for name in dict.fromkeys(names)]
        leaf = self._leaf(
            key.public_key(),
            x509.Name([]),
            x509.SubjectAlternativeName(sans),
            _SERVER_LIFE,
            client=False,
        )
        return ServerCertificate(
            key=_key_pem(key),
            chain=leaf.public_bytes(serialization.Encoding.PEM) + self.root_pem.encode(),
            renew_at=leaf.not_valid_before_utc
            + (leaf.not_valid_after_utc - leaf.not_valid_before_utc) / 2,
        )

    def _leaf(
        self,
        key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey,
        subject: x509.Name,
        sans: x509.SubjectAlternativeName,
        ttl: timedelta,
        *,
        client: bool,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH]
        if client:
            usages.append(ExtendedKeyUsageOID.CLIENT_AUTH)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._root.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - _BACKDATE, self._root.not_valid_before_utc))
            .not_valid_after(min(now + ttl, self._root.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True, key_encipherment=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            # Critical because the subject is empty (RFC 5280 4.2.1.6).
            .add_extension(sans, critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )


def named_by(csr_pem: str) -> str:
    """The one URI that a CSR asks for, else ""; signing judges the rest of it."""
    try:
        csr = x509.load_pem_x509_csr(csr_pem.encode())
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return ""
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return uris[0] if len(uris) == 1 else ""


def _csr_key(
    pem: str,
) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey:
    if len(pem) > _CSR_LIMIT:
        raise CsrError(f"the request is larger than {_CSR_LIMIT} bytes")
    try:
        csr = x509.load_pem_x509_csr(pem.encode())
        key = csr.public_key()
        valid = csr.is_signature_valid
    except Exception as error:  # the library raises several unrelated types for hostile input
        raise CsrError("not a certificate signing request in PEM") from error
    if not valid:
        raise CsrError("the request isn't signed by the key it carries")
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and key.key_size >= 256:
        return key
    if isinstance(key, rsa.RSAPublicKey) and 2048 <= key.key_size <= 8192:
        return key
    raise CsrError("the key is of a kind or size that isn't signed: use ECDSA P-256")


def _new_root(key: ec.EllipticCurvePrivateKey, trust_domain: str) -> x509.Certificate:
    now = datetime.now(UTC)
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain[:64]),
            x509.NameAttribute(NameOID.COMMON_NAME, "Underpass root"),
        ]
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + _ROOT_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _usage(
    *,
    digital_signature: bool = False,
    key_encipherment: bool = False,
    key_cert_sign: bool = False,
    crl_sign: bool = False,
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=key_encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _new_key_pem() -> bytes:
    return _key_pem(ec.generate_private_key(ec.SECP256R1()))


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except ValueError as error:
        raise AuthorityError(f"{path}: not a private key in PEM: restore it") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthorityError(f"{path}: not an ECDSA key: restore the one that was made here")
    return key
