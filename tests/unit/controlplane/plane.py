"""A control plane over real TLS and a node that talks to it as an agent does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc

from controlplane import tokens
from controlplane.options import Options
from controlplane.server import ControlPlane
from controlplane.wds.encoding import ADDRESS
from proto.gen import discovery_pb2

Response = discovery_pb2.DeltaDiscoveryResponse
Request = discovery_pb2.DeltaDiscoveryRequest

METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]


class Plane:
    """A running control plane and its folders."""

    def __init__(self, base: Path, running: ControlPlane) -> None:
        self.base = base
        self.running = running

    @property
    def address(self) -> str:
        return self.running.addresses[0]

    @property
    def state(self) -> Path:
        return self.base / "state"

    def write(self, name: str, text: str) -> None:
        (self.base / "manifests" / name).write_text(text)

    def token(self, node: str = "n1", ttl: timedelta = timedelta(hours=1)) -> str:
        return tokens.issue(self.state, node, ttl)

    def channel(self) -> grpc.aio.Channel:
        roots = (self.state / "root-cert.pem").read_bytes()
        return grpc.aio.secure_channel(
            self.address, grpc.ssl_channel_credentials(roots), options=_UNLIMITED
        )


@contextlib.asynccontextmanager
async def plane(
    base: Path, manifests: Mapping[str, str] | None = None, **options: Any
) -> AsyncIterator[Plane]:
    """Runs a control plane on a free port; `base` keeps its state for the next one."""
    folder = base / "manifests"
    folder.mkdir(exist_ok=True)
    for name, text in (manifests or {}).items():
        (folder / name).write_text(text)
    running = await ControlPlane.bind(
        Options(folder, base / "state", listen=("127.0.0.1:0",), **options)
    )
    started, ended = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(running.serve(ended, started.set))
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if serving.done():
            serving.result()
        yield Plane(base, running)
    finally:
        waiting.cancel()
        ended.set()
        await serving
        await running.close()


class NodeStream:
    """One delta stream."""

    def __init__(self, channel: grpc.aio.Channel, token: str, node: str = "n1") -> None:
        self.node = node
        self.call = channel.stream_stream(
            METHOD,
            request_serializer=Request.SerializeToString,
            response_deserializer=Response.FromString,
        )(None, metadata=(("authorization", f"Bearer {token}"),) if token else ())
        self._named = False

    async def subscribe(
        self, type_url: str = ADDRESS, versions: Mapping[str, str] | None = None
    ) -> Response:
        await self.send(type_url, versions)
        return await self.next()

    async def send(self, type_url: str, versions: Mapping[str, str] | None = None) -> None:
        request = Request(type_url=type_url, initial_resource_versions=versions or {})
        if not self._named:
            request.node.id = f"ztunnel~10.0.0.1~{self.node}.x~x.svc.cluster.local"
            request.node.metadata["NODE_NAME"] = self.node
            self._named = True
        await self.call.write(request)

    async def next(self, within: float = 10) -> Response:
        """The next response, acknowledged."""
        async with asyncio.timeout(within):
            response = await self.call.read()
        assert isinstance(response, Response), "the stream has ended"
        await self.call.write(Request(type_url=response.type_url, response_nonce=response.nonce))
        return response

    async def error(self) -> tuple[grpc.StatusCode, str]:
        async with asyncio.timeout(10):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while isinstance(await self.call.read(), Response):
                    pass
            return await self.call.code(), await self.call.details()


def names(response: Response) -> list[str]:
    return sorted(item.name for item in response.resources)


def versions(*responses: Response) -> dict[str, str]:
    return {item.name: item.version for r in responses for item in r.resources}
