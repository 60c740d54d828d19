"""What the agent's other parts need of whoever supplies certificates: a CA's or SPIRE's client."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agent.identity.status import IdentityStatus
from agent.secret import Secret
from proto.gen import control_pb2

# facts ztunnel 8.3
IN_FLIGHT = 8
# Seconds over which all identities are renewed once roots rotate: a node's share of a burst that
# all nodes of the mesh begin with.
ROTATION_SPREAD = 30.0


class KeyTarget(Protocol):
    """The data plane, as the keeper of keys and certificates."""

    async def new_csr(self, identity: str) -> str: ...

    async def install_certificate(
        self, identity: str, chain: Sequence[str], roots: Sequence[str], key: Secret | None = None
    ) -> control_pb2.CertificateStatus: ...

    async def fail_certificate(self, identity: str, text: str) -> None: ...


class RootKeeper(Protocol):
    """TrustKeeper, as far as it is told of roots."""

    async def answered(self, roots: Sequence[str]) -> bool: ...


@dataclass(frozen=True)
class SupplyTrouble:
    """Why no identity at all can be supplied just now."""

    who: str
    cause: str
    remedy: str


class Supply(Protocol):
    """IdentityManager or SpireIdentities. Called from the loop that `run` runs in."""

    # Since the start, for metrics.
    fetched: int
    failed: int
    # What to do when one identity gets no certificate.
    remedy: str

    def attach(
        self, target: KeyTarget, certificates: Sequence[control_pb2.CertificateStatus]
    ) -> None: ...

    def detach(self) -> None: ...

    def wanted(self, identity: str, *, connection: bool) -> None: ...

    def forgotten(self, identity: str) -> None: ...

    def status(self) -> list[IdentityStatus]: ...

    def trouble(self) -> SupplyTrouble | None: ...

    async def run(self) -> None: ...
