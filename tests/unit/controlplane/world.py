"""Builders: YAML texts to worlds and translations."""

import textwrap

from controlplane.model.mesh import Mesh
from controlplane.model.translate import Translation, Translator, vip_demand
from controlplane.model.vips import Ranges, assign
from controlplane.options import parse_ranges
from controlplane.sources import documents, kinds
from controlplane.sources.objects import Object
from controlplane.sources.world import World
from proto.gen import authorization_pb2, workload_pb2

MESH = Mesh("cluster.local", "Kubernetes", "", "istio-system")
RANGES = Ranges(*parse_ranges(("240.240.0.0/16", "2001:2::/48")))


def objects(text: str) -> list[Object]:
    """Every document must be of a known kind and valid."""
    return [
        kinds.READERS[kinds.kind_of(document)](document)
        for chunk in documents.split(textwrap.dedent(text))
        for document in documents.compose(chunk.text)
    ]


def translate(text: str, mesh: Mesh = MESH) -> Translation:
    world = World(objects(text))
    wanted, taken = vip_demand(world)
    return Translator(mesh).translate(world, assign(wanted, taken, {}, RANGES).vips)


def workload(made: Translation, name: str) -> workload_pb2.Workload:
    address = made.addresses[name]
    assert isinstance(address, workload_pb2.Address)
    return address.workload


def service(made: Translation, name: str) -> workload_pb2.Service:
    address = made.addresses[name]
    assert isinstance(address, workload_pb2.Address)
    return address.service


def policy(made: Translation, name: str) -> authorization_pb2.Authorization:
    found = made.authorizations[name]
    assert isinstance(found, authorization_pb2.Authorization)
    return found


def pod(
    name: str,
    *,
    namespace: str = "shop",
    node: str = "n1",
    ip: str = "10.0.1.5",
    labels: str = "",
    account: str = "",
    spec: str = "",
) -> str:
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, uid: uid-{name}, labels: {{{labels}}}}}
spec: {{nodeName: {node}, serviceAccountName: {account or name}{", " + spec if spec else ""}}}
status: {{podIPs: [{{ip: "{ip}"}}]}}
---
"""
