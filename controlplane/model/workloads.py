"""Pod, WorkloadEntry and EndpointSlice to the wire's Workload (facts istio-ambient 6.4)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controlplane.model.members import Membership
from controlplane.model.mesh import (
    MODE_LABEL,
    NETWORK_LABEL,
    Mesh,
    app_protocol,
    canonical,
    native_tunnel,
    packed,
)
from controlplane.model.services import endpoint_port
from controlplane.model.waypoints import Waypoint
from controlplane.sources.objects import (
    EndpointSlice,
    Namespace,
    Node,
    Pod,
    ServicePort,
    SliceEndpoint,
    WorkloadEntry,
)
from proto.gen import workload_pb2 as wire

_REGION = "topology.kubernetes.io/region"
_ZONE = "topology.kubernetes.io/zone"
_SUBZONE = "topology.istio.io/subzone"


@dataclass(frozen=True)
class Context:
    """What a workload gets from elsewhere. Equal contexts make equal workloads."""

    members: tuple[Membership, ...]
    policies: tuple[str, ...]
    waypoint: Waypoint | None
    instance_of: Waypoint | None
    namespace: Namespace | None
    node: Node | None
    network: str


def enrolled(pod: Pod, namespace: Namespace | None) -> bool:
    """Facts istio-ambient 1.2: host network and sidecars never, then the own label decides."""
    if pod.host_network or "sidecar.istio.io/status" in pod.meta.annotations:
        return False
    own = pod.meta.labels.get(MODE_LABEL)
    if own is not None:
        return own == "ambient" or (own != "none" and _ambient(namespace))
    return _ambient(namespace)


def _ambient(namespace: Namespace | None) -> bool:
    return namespace is not None and namespace.meta.labels.get(MODE_LABEL) == "ambient"


def pod_uid(pod: Pod, mesh: Mesh) -> str:
    return f"{mesh.cluster_id}//Pod/{pod.meta.key}"


def pod_workload(pod: Pod, context: Context, mesh: Mesh) -> wire.Workload:
    owner = _owner_name(pod)
    name, revision = canonical(pod.meta.labels, owner)
    made = wire.Workload(
        uid=pod_uid(pod, mesh),
        name=pod.meta.name,
        namespace=pod.meta.namespace,
        addresses=packed(pod.ips),
        network=pod.meta.labels.get(NETWORK_LABEL) or context.network,
        trust_domain=mesh.wire_trust_domain,
        service_account=pod.service_account,
        node=pod.node,
        canonical_name=name,
        canonical_revision=revision,
        workload_type=wire.WorkloadType.POD,
        workload_name=owner,
        authorization_policies=context.policies,
        status=_status(pod.ready),
        cluster_id=mesh.cluster_id,
    )
    if pod.host_network:
        made.network_mode = wire.NetworkMode.HOST_NETWORK
    if native_tunnel(pod.meta.labels):
        made.tunnel_protocol = wire.TunnelProtocol.HBONE
        made.native_tunnel = True
    elif enrolled(pod, context.namespace):
        made.tunnel_protocol = wire.TunnelProtocol.HBONE
    _waypoint(made, context)
    _locality(made, context.node)
    _services(made, context.members, pod.ports)
    return made


def entry_workload(entry: WorkloadEntry, uid: str, context: Context, mesh: Mesh) -> wire.Workload:
    """A WorkloadEntry, or an inline endpoint of a ServiceEntry. Always healthy, as upstream."""
    name, revision = canonical(entry.labels, entry.meta.name)
    made = wire.Workload(
        uid=uid,
        name=entry.meta.name,
        namespace=entry.meta.namespace,
        network=entry.network or context.network,
        trust_domain=mesh.wire_trust_domain,
        service_account=entry.service_account,
        canonical_name=name,
        canonical_revision=revision,
        workload_type=wire.WorkloadType.POD,
        workload_name=entry.meta.name,
        authorization_policies=context.policies,
        cluster_id=mesh.cluster_id,
    )
    if isinstance(entry.address, str):
        made.hostname = entry.address
    else:
        made.addresses.append(entry.address.packed)
    if native_tunnel(entry.labels):
        made.tunnel_protocol = wire.TunnelProtocol.HBONE
        made.native_tunnel = True
    if entry.weight is not None:
        made.capacity.value = entry.weight
    region, _, rest = entry.locality.partition("/")
    zone, _, subzone = rest.partition("/")
    if region:
        made.locality.CopyFrom(wire.Locality(region=region, zone=zone, subzone=subzone))
    _waypoint(made, context)
    for member in context.members:
        ports = made.services[member.key].ports
        for port in member.ports:
            number = entry.ports.get(port.name) or port.target or port.port
            if isinstance(number, int):
                ports.add(
                    service_port=port.port,
                    target_port=number,
                    app_protocol=app_protocol(port.name, port.protocol),
                )
    return made


def slice_workload(
    source: EndpointSlice, endpoint: SliceEndpoint, uid: str, context: Context, mesh: Mesh
) -> wire.Workload:
    """An endpoint without a pod: no account and no policies, so never HBONE."""
    made = wire.Workload(
        uid=uid,
        name=source.meta.name,
        namespace=source.meta.namespace,
        addresses=packed(endpoint.ips),
        network=context.network,
        trust_domain=mesh.wire_trust_domain,
        node=endpoint.node,
        canonical_name=source.meta.name,
        canonical_revision="latest",
        workload_type=wire.WorkloadType.POD,
        workload_name=source.meta.name,
        status=_status(endpoint.ready),
        cluster_id=mesh.cluster_id,
        network_mode=wire.NetworkMode.HOST_NETWORK,
    )
    _services(made, context.members, {})
    return made


def _services(
    made: wire.Workload, members: Iterable[Membership], container_ports: Mapping[str, int]
) -> None:
    for member in members:
        ports = made.services[member.key].ports
        for port in member.ports:
            if member.by_name:
                number = dict(member.named).get(port.name)
                found = (
                    None
                    if number is None
                    else endpoint_port(ServicePort(port.name, port.port, number, port.protocol), {})
                )
            else:
                found = endpoint_port(port, container_ports)
            if found is not None:
                ports.append(found)


def _waypoint(made: wire.Workload, context: Context) -> None:
    if context.instance_of is not None:
        if context.instance_of.tunnel is not None:
            made.application_tunnel.CopyFrom(context.instance_of.tunnel)
    elif context.waypoint is not None:
        made.waypoint.CopyFrom(context.waypoint.destination)


def _locality(made: wire.Workload, node: Node | None) -> None:
    labels = node.meta.labels if node else {}
    region, zone, subzone = (labels.get(label, "") for label in (_REGION, _ZONE, _SUBZONE))
    if region or zone or subzone:
        made.locality.CopyFrom(wire.Locality(region=region, zone=zone, subzone=subzone))


def _status(ready: bool) -> wire.WorkloadStatus:
    return wire.WorkloadStatus.HEALTHY if ready else wire.WorkloadStatus.UNHEALTHY


def _owner_name(pod: Pod) -> str:
    """A ReplicaSet's name is its Deployment's with a hash behind."""
    if pod.meta.owner is None:
        return pod.meta.name
    kind, name = pod.meta.owner
    if kind == "ReplicaSet" and "-" in name:
        return (
            name.removesuffix(f"-{pod.meta.labels['pod-template-hash']}")
            if ("pod-template-hash" in pod.meta.labels)
            else name.rpartition("-")[0]
        )
    return name
