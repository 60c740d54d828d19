"""A SPIRE agent as far as its Delegated Identity API tells: answers by selectors, pushes changes.

As a process (SOCKET FOLDER) it has an entry for every namespace and account and renews at half of
a life, with SIGUSR2 at once. SIGUSR1 takes the next step of a rotation of roots, written to `stage`
in the folder. Roots and stage are kept there, as a SPIRE server keeps them while its agent is away.
"""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from proto.gen import spire_pb2
from tests.support.small_ca import SmallCa, key_pem, pem

SERVICE = "spire.api.agent.delegatedidentity.v1.DelegatedIdentity"
LIFE = timedelta(seconds=16)

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


class FakeSpire:
    def __init__(self, socket: Path, *, trust_domain: str = "cluster.local") -> None:
        self.socket = socket
        self.trust_domain = trust_domain
        self.signer = SmallCa()
        self.roots = [self.signer]
        self.life = timedelta(hours=1)
        # By the identity that the selectors say; others are answered by that identity itself.
        self.entries: dict[str, list[str]] = {}
        # Refuse new streams with this status.
        self.refuse: tuple[grpc.StatusCode, str] | None = None
        # Never answer.
        self.silent = False
        self.asked: list[str] = []
        # Every key that was ever handed out.
        self.keys: list[bytes] = []
        self._held: dict[str, spire_pb2.X509SvidWithKey] = {}
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        server = grpc.aio.server()
        methods = {
            "SubscribeToX509SVIDs": grpc.unary_stream_rpc_method_handler(
                self._svids,
                spire_pb2.SubscribeToX509SvidsRequest.FromString,
                spire_pb2.SubscribeToX509SvidsResponse.SerializeToString,
            ),
            "SubscribeToX509Bundles": grpc.unary_stream_rpc_method_handler(
                self._bundles,
                spire_pb2.SubscribeToX509BundlesRequest.FromString,
                spire_pb2.SubscribeToX509BundlesResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        server.add_insecure_port(f"unix:{self.socket}")
        await server.start()
        self._server = server

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def push(self) -> None:
        """Every stream is sent what holds now."""
        self._changed.set()
        self._changed = asyncio.Event()

    def renew(self) -> None:
        self._held.clear()
        self.push()

    async def _svids(
        self, request: spire_pb2.SubscribeToX509SvidsRequest, context: "Context"
    ) -> AsyncIterator[spire_pb2.SubscribeToX509SvidsResponse]:
        await self._admit(context)
        values = dict(one.value.split(":", 1) for one in request.selectors if one.type == "k8s")
        identity = f"spiffe://{self.trust_domain}/ns/{values['ns']}/sa/{values['sa']}"
        self.asked.append(identity)
        while True:
            changed = self._changed
            answered = self.entries.get(identity, [identity])
            if not self.silent:
                yield spire_pb2.SubscribeToX509SvidsResponse(
                    x509_svids=[self._svid(one) for one in answered]
                )
            await changed.wait()

    async def _bundles(
        self, request: spire_pb2.SubscribeToX509BundlesRequest, context: "Context"
    ) -> AsyncIterator[spire_pb2.SubscribeToX509BundlesResponse]:
        await self._admit(context)
        while True:
            changed = self._changed
            bundle = b"".join(_der(ca.root) for ca in self.roots)
            yield spire_pb2.SubscribeToX509BundlesResponse(
                ca_certificates={f"spiffe://{self.trust_domain}": bundle}
            )
            await changed.wait()

    async def _admit(self, context: "Context") -> None:
        if self.refuse is not None:
            await context.abort(*self.refuse)

    def _svid(self, identity: str) -> spire_pb2.X509SvidWithKey:
        if identity not in self._held:
            self._held[identity] = self._issue(identity)
        return self._held[identity]

    def _issue(self, identity: str) -> spire_pb2.X509SvidWithKey:
        key = ec.generate_private_key(ec.SECP256R1())
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        csr = request.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
        now = datetime.now(UTC)
        leaf = self.signer.workload(csr, identity, not_before=now, not_after=now + self.life)
        domain, _, path = identity.removeprefix("spiffe://").partition("/")
        self.keys.append(key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))
        return spire_pb2.X509SvidWithKey(
            x509_svid=spire_pb2.X509Svid(
                cert_chain=[_der(x509.load_pem_x509_certificate(leaf.encode()))],
                id=spire_pb2.SpiffeId(trust_domain=domain, path=f"/{path}"),
                expires_at=int((now + self.life).timestamp()),
            ),
            x509_svid_key=self.keys[-1],
        )


def roots_pem(cas: Sequence[SmallCa]) -> tuple[str, ...]:
    return tuple(sorted(pem(ca.root) for ca in cas))


def kept(path: Path) -> SmallCa:
    ca = SmallCa("mesh root")
    if path.exists():
        content = path.read_bytes()
        key = load_pem_private_key(content, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        ca._key, ca.root = key, x509.load_pem_x509_certificate(content)
    else:
        path.write_bytes(key_pem(ca._key) + ca.root_pem.encode())
    return ca


async def serve(socket: Path, folder: Path) -> None:
    old, new = kept(folder / "old.pem"), kept(folder / "new.pem")
    # (who signs, whose roots are handed out)
    stages = [(old, [old]), (old, [old, new]), (new, [old, new]), (new, [new])]
    told = folder / "stage"
    stage = int(told.read_text()) if told.exists() else 0
    spire = FakeSpire(socket)
    spire.life = LIFE

    def enter() -> None:
        spire.signer, spire.roots = stages[stage]
        spire.push()
        told.write_text(str(stage))

    def step() -> None:
        nonlocal stage
        stage = min(stage + 1, len(stages) - 1)
        enter()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, step)
    loop.add_signal_handler(signal.SIGUSR2, spire.renew)
    async with spire:
        enter()
        while True:
            await asyncio.sleep(LIFE.total_seconds() / 2)
            spire.renew()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), Path(sys.argv[2])))
