"""Client of a mesh CA's certificate service (facts ztunnel 8.1, istio-ambient 7.1)."""

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

import grpc

from agent.errors import AgentError
from agent.xds import faults
from agent.xds.channel import open_channel
from agent.xds.endpoint import ControlPlaneError, Endpoint
from proto.gen import citadel_pb2

METHOD = "/istio.v1.auth.IstioCertificateService/CreateCertificate"


class CaError(AgentError):
    """No certificate was obtained; the text names the CA, the cause and what to do."""

    retryable = True


@dataclass(frozen=True, kw_only=True)
class CaConfig(Endpoint):
    """The CA's address, and what to ask of it."""

    # Names this node in messages.
    node_name: str
    # facts ztunnel 8.1
    ttl: timedelta = timedelta(hours=24)
    # The node asks for its pods' identities; a dedicated proxy only for the one of its token.
    impersonate: bool = True
    # One answer; a CA under load signs in well under a second.
    timeout: timedelta = timedelta(seconds=10)


class CaClient:
    """Keeps one channel, which is replaced when the roots changed or it failed."""

    def __init__(self, config: CaConfig) -> None:
        self._config = config
        self._channel: _Channel | None = None
        self._alt_name = False

    async def create(self, csr: str, identity: str) -> Sequence[str]:
        """The CA's answer as it came: leaf first, roots last. Raises CaError."""
        request = citadel_pb2.IstioCertificateRequest(
            csr=csr, validity_duration=round(self._config.ttl.total_seconds())
        )
        if self._config.impersonate:
            request.metadata.update({"ImpersonatedIdentity": identity})
        try:
            metadata = self._config.metadata()
            async with self._lease() as channel:
                method = channel.grpc.unary_unary(
                    METHOD,
                    citadel_pb2.IstioCertificateRequest.SerializeToString,
                    citadel_pb2.IstioCertificateResponse.FromString,
                )
                answer = await method(
                    request, metadata=metadata, timeout=self._config.timeout.total_seconds()
                )
        except ControlPlaneError as error:
            raise CaError(str(error)) from error
        except grpc.aio.AioRpcError as error:
            node = self._config.node_name
            raise CaError(faults.describe(error, self._config, node=node, what="CA")) from error
        certificates: Sequence[str] = answer.cert_chain
        return certificates

    async def close(self) -> None:
        if self._channel is not None:
            await self._retire(self._channel)

    @asynccontextmanager
    async def _lease(self) -> "AsyncIterator[_Channel]":
        """The channel for one call. Raises ControlPlaneError when the roots can't be read."""
        channel = await self._current()
        channel.users += 1
        try:
            yield channel
        except grpc.aio.AioRpcError as error:
            if faults.is_name_mismatch(error) and self._config.alt_hostname:
                self._alt_name = not self._alt_name
            # gRPC would wait up to minutes before it dials again; our own back-off decides.
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                await self._retire(channel)
            raise
        finally:
            channel.users -= 1
            if channel.retired and not channel.users:
                await channel.grpc.close(None)

    async def _current(self) -> "_Channel":
        trust = hashlib.sha256(self._config.roots()).digest()
        if self._channel is not None and self._channel.trust != trust:
            await self._retire(self._channel)
        if self._channel is None:
            opened = open_channel(self._config, alt_name=self._alt_name)
            self._channel = _Channel(opened, trust)
        return self._channel

    async def _retire(self, channel: "_Channel") -> None:
        """New calls take another channel; this one closes with its last call."""
        if self._channel is channel:
            self._channel = None
        channel.retired = True
        if not channel.users:
            await channel.grpc.close(None)


@dataclass
class _Channel:
    grpc: grpc.aio.Channel
    # Digest of the roots it was opened with.
    trust: bytes
    users: int = 0
    retired: bool = False
