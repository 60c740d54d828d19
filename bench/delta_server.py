"""A delta ADS server that sends prepared bytes: costs next to nothing while a push is measured."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from agent.cli.demo.netns import inside
from agent.xds import ADDRESS, AUTHORIZATION
from bench import resources
from proto.gen import discovery_pb2


class DeltaServer:
    """Answers each subscription with what was prepared, then sends what `push` is given."""

    def __init__(self, initial: Mapping[str, bytes]) -> None:
        # Response by type URL.
        self._initial = initial
        self._queues: dict[str, asyncio.Queue[bytes]] = {}
        # Nonce -> when it was acknowledged (monotonic clock) and what was rejected.
        self.answers: dict[tuple[str, str], tuple[float, str]] = {}
        self._answered = asyncio.Condition()

    async def start(self, namespace: str, address: str, port: int, root: Path) -> grpc.aio.Server:
        """Listens inside a network namespace; writes the root that clients need."""
        key, certificate = _self_signed(address)
        root.write_bytes(certificate)
        server = grpc.aio.server(
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
                ("grpc.so_reuseport", 0),
                # Agents ping every 30 s, also when nothing is said.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.http2.max_ping_strikes", 0),
            ]
        )
        handler = grpc.stream_stream_rpc_method_handler(
            self._delta, discovery_pb2.DeltaDiscoveryRequest.FromString, None
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "envoy.service.discovery.v3.AggregatedDiscoveryService",
                    {"DeltaAggregatedResources": handler},
                ),
            )
        )
        tls = grpc.ssl_server_credentials([(key, certificate)])
        # The socket belongs to the namespace of the thread that binds it.
        inside(namespace, lambda: server.add_secure_port(f"{address}:{port}", tls))
        await server.start()
        return server

    def push(self, node: str, response: bytes) -> None:
        """To the stream of this node, which must be connected."""
        self._queues[node].put_nowait(response)

    async def answer(self, node: str, nonce: str) -> tuple[float, str]:
        """When the node answered this push, and with which complaint ("" for an ACK)."""
        async with self._answered:
            await self._answered.wait_for(lambda: (node, nonce) in self.answers)
        return self.answers[node, nonce]

    async def _delta(
        self, requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest], _context: Any
    ) -> AsyncIterator[bytes]:
        outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        reading = asyncio.create_task(self._read(requests, outgoing))
        try:
            while True:
                yield await outgoing.get()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(
        self,
        requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest],
        outgoing: "asyncio.Queue[bytes]",
    ) -> None:
        node = ""
        async for request in requests:
            if request.response_nonce:
                async with self._answered:
                    self.answers[node, request.response_nonce] = (
                        time.monotonic(),
                        request.error_detail.message,
                    )
                    self._answered.notify_all()
                continue
            node = str(request.node.metadata["NODE_NAME"])
            self._queues[node] = outgoing
            outgoing.put_nowait(self._initial[request.type_url])


def initial(pods: bytes) -> Mapping[str, bytes]:
    """The captured pods and no policy."""
    nothing = resources.response([], "none", AUTHORIZATION)
    return {ADDRESS: pods, AUTHORIZATION: nothing}


def _self_signed(address: str) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "bench")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private, certificate.public_bytes(Encoding.PEM)
