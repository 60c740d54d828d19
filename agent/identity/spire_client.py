"""Client of a SPIRE agent's Delegated Identity API on its admin socket (proto/spire.proto)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError

from agent.identity.ca import CaError
from proto.gen import spire_pb2

_SERVICE = "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity"
# How gRPC says that nobody is at the other end of a socket that exists.
_DEAD = ("onnection refused", "onnection reset", "ocket closed", "roken pipe")


class SpireAway(CaError):
    """The SPIRE agent answers for nobody; the text names its socket."""

    def __init__(self, text: str, remedy: str = "") -> None:
        super().__init__(f"{text}; {remedy}" if remedy else text)
        self.cause = text
        self.remedy = remedy


class SpireClient:
    """Keeps one channel, which is replaced when it failed."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._channel: _Channel | None = None

    @asynccontextmanager
    async def svids(self, selectors: Sequence[spire_pb2.Selector]) -> AsyncIterator["Stream"]:
        """What `take_svids` reads: the answers hold keys."""
        request = spire_pb2.SubscribeToX509SvidsRequest(selectors=selectors)
        async with self._subscribed("SubscribeToX509SVIDs", request) as stream:
            yield stream

    @asynccontextmanager
    async def bundles(self) -> AsyncIterator["Stream"]:
        """What `read_bundles` reads."""
        request = spire_pb2.SubscribeToX509BundlesRequest()
        async with self._subscribed("SubscribeToX509Bundles", request) as stream:
            yield stream

    async def close(self) -> None:
        if self._channel is not None:
            await self._retire(self._channel)

    @asynccontextmanager
    async def _subscribed(
        self,
        method: str,
        request: spire_pb2.SubscribeToX509SvidsRequest | spire_pb2.SubscribeToX509BundlesRequest,
    ) -> AsyncIterator["Stream"]:
        if self._channel is None:
            self._channel = _Channel(_open(self.socket))
        channel = self._channel
        channel.users += 1
        # No deserialiser: the answer's bytes are ours alone.
        call = channel.grpc.unary_stream(
            f"{_SERVICE}/{method}", type(request).SerializeToString, None
        )
        stream = Stream(call(request), self.socket)
        try:
            yield stream
        except SpireAway:
            # gRPC would wait up to minutes before it dials again; our own back-off decides.
            await self._retire(channel)
            raise
        finally:
            stream.end()
            channel.users -= 1
            if channel.retired and not channel.users:
                await channel.grpc.close(None)

    async def _retire(self, channel: "_Channel") -> None:
        """New streams take another channel; this one closes with its last stream."""
        if self._channel is channel:
            self._channel = None
        channel.retired = True
        if not channel.users:
            await channel.grpc.close(None)


class Stream:
    """Answers of one subscription, as they came."""

    def __init__(self, call: "grpc.aio.UnaryStreamCall[object, bytes]", socket: Path) -> None:
        self._call = call
        self._socket = socket

    async def next(self, within: float | None) -> bytes | None:
        """None: nothing came in time, and nothing can come any more. Raises CaError, SpireAway."""
        try:
            async with asyncio.timeout(within):
                answer = await self._call.read()
        except TimeoutError:
            return None
        except grpc.aio.AioRpcError as error:
            raise _describe(error, self._socket) from error
        if isinstance(answer, bytes):
            return answer
        # gRPC's mark of an end without an error.
        code, details = await self._call.code(), await self._call.details()
        if code is grpc.StatusCode.OK:
            raise SpireAway(f"SPIRE agent at {self._socket}: it ended the subscription")
        raise _described(code, details or "", self._socket)

    def end(self) -> None:
        self._call.cancel()


def read_bundles(answer: bytes) -> Mapping[str, bytes]:
    """Raises CaError."""
    try:
        return spire_pb2.SubscribeToX509BundlesResponse.FromString(answer).ca_certificates
    except DecodeError as exc:
        raise CaError(f"the SPIRE agent's bundles can't be read: {exc}") from exc


@dataclass
class _Channel:
    grpc: grpc.aio.Channel
    users: int = 0
    retired: bool = False


def _open(socket: Path) -> grpc.aio.Channel:
    options = [
        # A path as the authority isn't taken by every server.
        ("grpc.default_authority", "localhost"),
        # Otherwise a shared connection would outlive its channel.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
    ]
    return grpc.aio.insecure_channel(f"unix:{socket}", options=options)


def _describe(error: grpc.aio.AioRpcError, socket: Path) -> CaError:
    return _described(error.code(), error.details() or "", socket)


def _described(code: grpc.StatusCode, details: str, socket: Path) -> CaError:
    where = f"SPIRE agent at {socket}"
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return SpireAway(f"{where}: {_why_unavailable(socket, details)}", _start_it(socket))
        case grpc.StatusCode.PERMISSION_DENIED:
            return SpireAway(
                f"{where}: PERMISSION_DENIED: {details}",
                "this process may not ask for others: make a registration entry that its own "
                "selectors match, and name that entry's SPIFFE id under authorized_delegates in "
                "the SPIRE agent's configuration",
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return SpireAway(
                f"{where}: it doesn't offer the Delegated Identity API",
                "set ca.spire-socket to its admin_socket_path, not to the Workload API's socket",
            )
        case grpc.StatusCode.UNAUTHENTICATED:
            return SpireAway(f"{where}: UNAUTHENTICATED: {details}")
    return CaError(f"{where}: {code.name}: {details}")


def _start_it(socket: Path) -> str:
    return f"start the SPIRE agent with admin_socket_path = {socket}, or correct ca.spire-socket"


def _why_unavailable(socket: Path, details: str) -> str:
    # A folder that may not be searched: gRPC's own words tell.
    with contextlib.suppress(OSError):
        if not socket.exists():
            return "no such socket"
        if not socket.is_socket():
            return "that file is no socket"
    return "nobody answers" if any(words in details for words in _DEAD) else details
