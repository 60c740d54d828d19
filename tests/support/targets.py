"""Stand-ins for the data plane that remember what they were given."""

import asyncio
from collections.abc import Sequence
from datetime import UTC

from cryptography import x509

from agent.dataplane import InvalidRequest
from agent.secret import Secret
from proto.gen import control_pb2, discovery_pb2
from tests.support.small_ca import make_csr


class RecordingDataplane:
    """Holds versions as the real one does: the last good one of each name."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, str]] = {}
        self.responses: list[bytes] = []
        # Resource name -> why it is rejected.
        self.reject: dict[str, str] = {}
        # Raised by the next apply.
        self.fail: Exception | None = None

    def types_now(self) -> list[control_pb2.TypeState]:
        return [
            control_pb2.TypeState(type_url=url, processed=True, versions=versions)
            for url, versions in self.held.items()
        ]

    async def types(self) -> Sequence[control_pb2.TypeState]:
        return self.types_now()

    async def apply(self, response: bytes) -> control_pb2.ApplyReply:
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure
        try:
            parsed = discovery_pb2.DeltaDiscoveryResponse.FromString(response)
        except Exception as error:
            raise InvalidRequest(f"can't be decoded: {error}") from error
        self.responses.append(response)
        held = self.held.setdefault(parsed.type_url, {})
        for name in parsed.removed_resources:
            held.pop(name, None)
        reply = control_pb2.ApplyReply(type_url=parsed.type_url, nonce=parsed.nonce)
        for resource in parsed.resources:
            if reason := self.reject.get(resource.name):
                reply.rejected.add(name=resource.name, reason=reason)
            else:
                held[resource.name] = resource.version
        return reply


class RecordingKeeper:
    """Makes CSRs, accepts what it is given, remembers order and failures."""

    def __init__(self) -> None:
        self.csrs: list[str] = []
        self.installed: dict[str, control_pb2.CertificateStatus] = {}
        self.roots: dict[str, Sequence[str]] = {}
        self.chains: dict[str, Sequence[str]] = {}
        self.failures: list[tuple[str, str]] = []
        # What came with a key: what it held then, and the buffer it came in.
        self.keys: dict[str, list[tuple[bytes, Secret]]] = {}
        # Why nothing is installed.
        self.refuse = ""
        # new_csr waits for it.
        self.gate = asyncio.Event()
        self.gate.set()

    async def new_csr(self, identity: str) -> str:
        self.csrs.append(identity)
        await self.gate.wait()
        return make_csr(identity)

    async def install_certificate(
        self, identity: str, chain: Sequence[str], roots: Sequence[str], key: Secret | None = None
    ) -> control_pb2.CertificateStatus:
        if key is not None:
            content = bytearray()
            key.append_to(content)
            self.keys.setdefault(identity, []).append((bytes(content), key))
        if self.refuse:
            raise InvalidRequest(self.refuse)
        leaf = x509.load_pem_x509_certificate(chain[0].encode())
        self.chains[identity], self.roots[identity] = chain, roots
        self.installed[identity] = control_pb2.CertificateStatus(
            identity=identity,
            not_before=int(leaf.not_valid_before_utc.astimezone(UTC).timestamp()),
            not_after=int(leaf.not_valid_after_utc.astimezone(UTC).timestamp()),
            serial=str(leaf.serial_number),
        )
        return self.installed[identity]

    async def fail_certificate(self, identity: str, text: str) -> None:
        self.failures.append((identity, text))
