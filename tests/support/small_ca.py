"""A certificate authority of two dozen lines, for servers and workloads in tests."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def make_csr(identity: str) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = builder.add_extension(names, critical=True).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.PEM).decode()


class SmallCa:
    def __init__(self, name: str = "test root") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.root = self._build(
            self._name,
            self._key.public_key(),
            [],
            datetime.now(UTC) - DAY,
            datetime.now(UTC) + 10 * DAY,
            ca=True,
        )

    @property
    def root_pem(self) -> str:
        return pem(self.root)

    def server(self, *names: str, expired: bool = False) -> tuple[bytes, bytes]:
        """Key and chain of a TLS server, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        sans: list[x509.GeneralName] = []
        for name in names:
            try:
                sans.append(x509.IPAddress(ip_address(name)))
            except ValueError:
                sans.append(x509.DNSName(name))
        now = datetime.now(UTC)
        end = now - timedelta(hours=1) if expired else now + DAY
        leaf = self._build(x509.Name([]), key.public_key(), sans, now - DAY, end)
        return key_pem(key), pem(leaf).encode()

    def workload(
        self,
        csr: str,
        identity: str,
        *,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> str:
        request = x509.load_pem_x509_csr(csr.encode())
        now = datetime.now(UTC)
        leaf = self._build(
            x509.Name([]),
            request.public_key(),
            [x509.UniformResourceIdentifier(identity)],
            not_before or now - timedelta(minutes=2),
            not_after or now + DAY,
        )
        return pem(leaf)

    def _build(
        self,
        subject: x509.Name,
        key: object,
        sans: list[x509.GeneralName],
        start: datetime,
        end: datetime,
        *,
        ca: bool = False,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)  # type: ignore[arg-type]
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if sans:
            names = x509.SubjectAlternativeName(sans)
            builder = builder.add_extension(names, critical=not ca)
        return builder.sign(self._key, hashes.SHA256())
