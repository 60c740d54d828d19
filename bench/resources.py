"""Made-up workloads and services of a large mesh, as the xDS responses a control plane sends."""

from collections.abc import Iterable, Iterator

from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message

from agent.cli.demo.manifests import Pod
from agent.xds import ADDRESS
from proto.gen import discovery_pb2, workload_pb2

NAMESPACES = 200
NODES = 1000


def own(pods: Iterable[Pod]) -> Iterator[tuple[str, Message]]:
    """The rig's captured pods as istiod would publish them."""
    for pod in pods:
        uid = f"Kubernetes//Pod/{pod.namespace}/{pod.name}"
        workload = _workload(uid, pod.namespace, pod.name, pod.service_account)
        workload.addresses.append(bytes(int(part) for part in pod.sandbox.ipv4.split(".")))
        workload.node = pod.sandbox.node.name
        yield uid, workload_pb2.Address(workload=workload)


def made_up(workloads: int, services: int) -> Iterator[tuple[str, Message]]:
    """Each service selects its share of the workloads; every workload speaks HBONE."""
    for number in range(services):
        namespace = f"team-{number % NAMESPACES}"
        name = f"service-{number}"
        service = workload_pb2.Service(
            name=name, namespace=namespace, hostname=_host(name, namespace)
        )
        service.addresses.add(address=_address(10, 64, number))
        service.ports.add(service_port=80, target_port=8080)
        service.ports.add(service_port=443, target_port=8443)
        yield f"{namespace}/{service.hostname}", workload_pb2.Address(service=service)
    for number in range(workloads):
        of = number % max(services, 1)
        namespace = f"team-{of % NAMESPACES}"
        application = f"service-{of}"
        # The length of a ReplicaSet's pod name.
        name = f"{application}-{number:09x}-{number * 7919 % 0xFFFFF:05x}"
        uid = f"Kubernetes//Pod/{namespace}/{name}"
        workload = _workload(uid, namespace, name, application)
        workload.addresses.append(_address(10, 128, number))
        workload.node = f"worker-{number % NODES}"
        workload.workload_name = application
        workload.canonical_name = application
        workload.locality.region, workload.locality.zone = "region-1", f"zone-{number % 3}"
        if services:
            ports = workload.services[f"{namespace}/{_host(application, namespace)}"].ports
            ports.add(service_port=80, target_port=8080)
            ports.add(service_port=443, target_port=8443)
        yield uid, workload_pb2.Address(workload=workload)


def response(named: Iterable[tuple[str, Message]], nonce: str, type_url: str = ADDRESS) -> bytes:
    """Serialised once, before anything is measured."""
    message = discovery_pb2.DeltaDiscoveryResponse(type_url=type_url, nonce=nonce)
    for number, (name, resource) in enumerate(named):
        packed = Any(type_url=type_url, value=resource.SerializeToString())
        # As long as istiod's hash.
        message.resources.add(name=name, version=f"{number:016x}", resource=packed)
    return message.SerializeToString()


def _workload(uid: str, namespace: str, name: str, account: str) -> workload_pb2.Workload:
    return workload_pb2.Workload(
        uid=uid,
        name=name,
        namespace=namespace,
        service_account=account,
        trust_domain="cluster.local",
        cluster_id="Kubernetes",
        tunnel_protocol=workload_pb2.HBONE,
        canonical_revision="latest",
        workload_type=workload_pb2.POD,
    )


def _host(name: str, namespace: str) -> str:
    return f"{name}.{namespace}.svc.cluster.local"


def _address(first: int, second: int, number: int) -> bytes:
    """From first.second.0.0 upwards, beyond 65 536 into the next second byte."""
    return bytes((first, second + (number >> 16), (number >> 8) & 255, number & 255))
