"""A control plane over real TLS that does what a test tells it to: delta ADS and a CA."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Self

import grpc

from agent.cli.demo.netns import inside
from proto.gen import citadel_pb2, discovery_pb2
from tests.support.small_ca import SmallCa

Sign = Callable[[citadel_pb2.IstioCertificateRequest, str], Awaitable[Sequence[str]]]
_END = object()


class FakeStream:
    """One delta stream as the server sees it."""

    def __init__(self, metadata: dict[str, str]) -> None:
        self.metadata = metadata
        self.requests: list[discovery_pb2.DeltaDiscoveryRequest] = []
        self.outgoing: asyncio.Queue[Any] = asyncio.Queue()
        self.ended = False

    def push(self, response: discovery_pb2.DeltaDiscoveryResponse | bytes) -> None:
        if not isinstance(response, bytes):
            response = response.SerializeToString()
        self.outgoing.put_nowait(response)

    def end(self, code: grpc.StatusCode | None = None, details: str = "") -> None:
        self.outgoing.put_nowait((_END, code, details))

    def first(self, type_url: str) -> discovery_pb2.DeltaDiscoveryRequest:
        return next(r for r in self.requests if r.type_url == type_url and not r.response_nonce)

    def answers(self) -> list[discovery_pb2.DeltaDiscoveryRequest]:
        return [request for request in self.requests if request.response_nonce]


class FakeControlPlane:
    """Listens on a port of 127.0.0.1, of a network namespace if one is named, that stays the same
    over `stop` and `start`."""

    def __init__(
        self, ca: SmallCa, *, names: Sequence[str] = ("127.0.0.1",), namespace: str = ""
    ) -> None:
        self.ca = ca
        self.credentials = ca.server(*names)
        self.streams: list[FakeStream] = []
        # Each certificate request as it came, with its identity.
        self.asked: list[str] = []
        self.ca_metadata: list[dict[str, str]] = []
        self.sign: Sign = self._sign
        # Refuse new streams at once, with this status.
        self.refuse: tuple[grpc.StatusCode, str] | None = None
        self.receive_limit = 64 << 20
        self.port = 0
        self._namespace = namespace
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", self.receive_limit),
                ("grpc.max_send_message_length", 64 << 20),
            ]
        )
        ads = grpc.stream_stream_rpc_method_handler(
            self._delta, discovery_pb2.DeltaDiscoveryRequest.FromString, lambda raw: raw
        )
        sign = grpc.unary_unary_rpc_method_handler(
            self._create,
            citadel_pb2.IstioCertificateRequest.FromString,
            citadel_pb2.IstioCertificateResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "envoy.service.discovery.v3.AggregatedDiscoveryService",
                    {"DeltaAggregatedResources": ads},
                ),
                grpc.method_handlers_generic_handler(
                    "istio.v1.auth.IstioCertificateService", {"CreateCertificate": sign}
                ),
            )
        )
        tls = grpc.ssl_server_credentials([self.credentials])

        def bind() -> int:
            return server.add_secure_port(f"127.0.0.1:{self.port}", tls)

        self.port = inside(self._namespace, bind) if self._namespace else bind()
        await server.start()
        self._server = server

    async def stop(self) -> None:
        if self._server is not None:
            for stream in self.streams:
                stream.end(grpc.StatusCode.UNAVAILABLE, "stopping")
            await self._server.stop(0)
            self._server = None

    async def _delta(
        self, requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest], context: Any
    ) -> AsyncIterator[bytes]:
        if self.refuse is not None:
            await context.abort(*self.refuse)
        stream = FakeStream(dict(context.invocation_metadata()))
        self.streams.append(stream)
        reading = asyncio.create_task(self._read(requests, stream))
        try:
            while True:
                item = await stream.outgoing.get()
                if isinstance(item, bytes):
                    yield item
                    continue
                _, code, details = item
                if code is not None:
                    await context.abort(code, details)
                return
        finally:
            stream.ended = True
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(
        self, requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest], stream: FakeStream
    ) -> None:
        async for request in requests:
            stream.requests.append(request)
        stream.end()

    async def _create(
        self, request: citadel_pb2.IstioCertificateRequest, context: Any
    ) -> citadel_pb2.IstioCertificateResponse:
        metadata = dict(context.invocation_metadata())
        identity = request.metadata["ImpersonatedIdentity"]
        assert isinstance(identity, str)
        self.asked.append(identity)
        self.ca_metadata.append(metadata)
        try:
            chain = await self.sign(request, identity)
        except Refused as refused:
            await context.abort(refused.code, str(refused))
        return citadel_pb2.IstioCertificateResponse(cert_chain=chain)

    async def _sign(
        self, request: citadel_pb2.IstioCertificateRequest, identity: str
    ) -> Sequence[str]:
        return [self.ca.workload(request.csr, identity), self.ca.root_pem]


class Refused(Exception):
    """Raised by a `sign` of a test: the CA answers with this status."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        self.code = code
        super().__init__(text)
