"""A mesh of one node whose control plane and CA do what the test says, over real TLS."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING

from google.protobuf.any_pb2 import Any

from agent.cli.demo.mesh import UNDERPASS, Mesh
from agent.xds import ADDRESS, AUTHORIZATION, TYPES
from proto.gen import discovery_pb2, workload_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.world import Node
    from tests.support.control_plane import FakeControlPlane, FakeStream


@dataclass
class ScriptedMesh(Mesh):
    """`held` is what the control plane serves to whoever connects, by type and name."""

    plane: FakeControlPlane = field(kw_only=True)
    held: dict[str, dict[str, bytes]] = field(default_factory=lambda: {t: {} for t in TYPES})
    _version: int = 0

    async def start(self) -> None:
        (self.folder / "root.pem").write_text(self.plane.ca.root_pem)
        for node in self.world.nodes:
            await self.start_agent(node)
        await self.settled()

    async def start_agent(self, node: Node) -> None:
        arguments = [
            *UNDERPASS,
            "agent",
            f"--node={node.name}",
            f"--run-dir={self.run_dir}",
            f"--pods=file:{self.pods_file(node)}",
            f"--xds-address={self.plane.address}",
            f"--xds-root={self.folder / 'root.pem'}",
            *self.agent_options,
        ]
        await self.spawn(node.name, arguments, node.namespace)

    def write_manifest(self, pod: Pod) -> None:
        """What a control plane makes of a pod."""
        self.send(ADDRESS, workload(pod))

    def remove(self, pod: Pod) -> None:
        self.pods.remove(pod)
        uid = workload(pod)[0]
        self.withdraw_resource(ADDRESS, uid)
        self.write_pods(pod.sandbox.node)

    def send(self, type_url: str, *named: tuple[str, Message | bytes]) -> None:
        """One response with these resources, to every stream and to later ones."""
        packed = {
            name: resource if isinstance(resource, bytes) else resource.SerializeToString()
            for name, resource in named
        }
        self.held[type_url] |= packed
        for stream in self.plane.streams:
            self._push(stream, type_url, packed)

    def withdraw_resource(self, type_url: str, name: str) -> None:
        self.held[type_url].pop(name, None)
        for stream in self.plane.streams:
            self._push(stream, type_url, {}, removed=name)

    async def serve(self) -> None:
        """Gives each new stream everything, for ever."""
        greeted: set[int] = set()
        while True:
            for stream in self.plane.streams:
                if id(stream) not in greeted and len(stream.requests) >= len(TYPES):
                    greeted.add(id(stream))
                    for type_url in (AUTHORIZATION, ADDRESS):
                        self._push(stream, type_url, self.held[type_url])
            await asyncio.sleep(0.01)

    def _push(
        self, stream: FakeStream, type_url: str, named: dict[str, bytes], removed: str = ""
    ) -> None:
        if stream.ended or len(stream.requests) < len(TYPES):
            return
        self._version += 1
        message = discovery_pb2.DeltaDiscoveryResponse(
            type_url=type_url,
            nonce=str(self._version),
            removed_resources=[removed] if removed else [],
        )
        for name, value in named.items():
            packed = Any(type_url=type_url, value=value)
            message.resources.add(name=name, version=str(self._version), resource=packed)
        stream.push(message)


def workload(pod: Pod) -> tuple[str, Message]:
    uid = f"Kubernetes//Pod/{pod.namespace}/{pod.name}"
    found = workload_pb2.Workload(
        uid=uid,
        name=pod.name,
        namespace=pod.namespace,
        service_account=pod.service_account,
        trust_domain="cluster.local",
        cluster_id="Kubernetes",
        tunnel_protocol=workload_pb2.HBONE,
        workload_type=workload_pb2.POD,
        node=pod.sandbox.node.name,
        addresses=[ip_address(text).packed for text in (pod.sandbox.ipv4, pod.sandbox.ipv6)],
    )
    return uid, workload_pb2.Address(workload=found)
