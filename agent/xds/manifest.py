"""A YAML document of workloads, services and policies as xDS resources.

The keys are those of a configuration dump (facts ztunnel 7.8, 13.1), so a dump's sections can be
pasted. Only the shape is checked here; the data plane judges the content as for any other source.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, TypeVar

from google.protobuf.message import Message

from agent import yaml_text
from agent.xds import fields
from agent.xds.fields import Fields, LocalFileError
from agent.xds.policy_manifest import policy
from agent.xds.types import ADDRESS, AUTHORIZATION
from proto.gen import workload_pb2 as pb

_T = TypeVar("_T")
PORTS: Final = 65535
_TUNNELS = {"TCP": pb.NONE, "HBONE": pb.HBONE}
_NETWORK_MODES = {"Standard": pb.STANDARD, "HostNetwork": pb.HOST_NETWORK}
_KINDS = {
    "deployment": pb.DEPLOYMENT,
    "cronjob": pb.CRONJOB,
    "pod": pb.POD,
    "job": pb.JOB,
}
_STATUS = {"Healthy": pb.HEALTHY, "Unhealthy": pb.UNHEALTHY}
_APP_TUNNELS = {"NONE": pb.ApplicationTunnel.NONE, "PROXY": pb.ApplicationTunnel.PROXY}
_FAMILIES = {
    "Automatic": pb.AUTOMATIC,
    "IPv4": pb.IPV4_ONLY,
    "IPv6": pb.IPV6_ONLY,
    "Dual": pb.DUAL,
}
_VISIBILITY = {"Public": pb.Service.PUBLIC, "Namespace": pb.Service.NAMESPACE}
_SCOPES = {
    "Region": pb.LoadBalancing.REGION,
    "Zone": pb.LoadBalancing.ZONE,
    "Subzone": pb.LoadBalancing.SUBZONE,
    "Node": pb.LoadBalancing.NODE,
    "Cluster": pb.LoadBalancing.CLUSTER,
    "Network": pb.LoadBalancing.NETWORK,
}
_MODES = {
    "Standard": pb.LoadBalancing.UNSPECIFIED_MODE,
    "Strict": pb.LoadBalancing.STRICT,
    "Failover": pb.LoadBalancing.FAILOVER,
    "Passthrough": pb.LoadBalancing.PASSTHROUGH,
}
_HEALTH = {
    "OnlyHealthy": pb.LoadBalancing.ONLY_HEALTHY,
    "AllowAll": pb.LoadBalancing.ALLOW_ALL,
}


@dataclass(frozen=True)
class LocalResource:
    """One resource with a version made of its content."""

    version: str
    message: Message


Resources = Mapping[str, Mapping[str, LocalResource]]


def parse(text: str, where: str) -> Resources:
    """Resources by type URL and name. Raises LocalFileError naming `where` and the field."""
    try:
        document = yaml_text.load(text)
    except yaml_text.NotYaml as error:
        raise LocalFileError(f"{where}: {error}") from error
    try:
        return _document(Fields({} if document is None else document, ""))
    except LocalFileError as error:
        raise LocalFileError(
            f"{where}: {str(error).removeprefix('.').removeprefix(': ')}"
        ) from error


def _document(top: Fields) -> Resources:
    workloads: dict[str, pb.Workload] = {}
    for raw, path in top.items("workloads"):
        workload = _workload(Fields(raw, path))
        _add(workloads, workload.uid, workload, path)
    services: dict[str, pb.Service] = {}
    for raw, path in top.items("services"):
        service = _service(Fields(raw, path), workloads)
        _add(services, f"{service.namespace}/{service.hostname}", service, path)
    policies: dict[str, LocalResource] = {}
    for raw, path in top.items("policies"):
        found = policy(Fields(raw, path))
        _add(policies, f"{found.namespace}/{found.name}", _versioned(found), path)
    top.end()
    addresses = {uid: _versioned(pb.Address(workload=item)) for uid, item in workloads.items()}
    addresses |= {name: _versioned(pb.Address(service=item)) for name, item in services.items()}
    return {ADDRESS: addresses, AUTHORIZATION: policies}


def _add(items: dict[str, _T], name: str, item: _T, path: str) -> None:
    if name in items:
        raise LocalFileError(f"{path}: {name} is in this file twice")
    items[name] = item


def _workload(given: Fields) -> pb.Workload:
    name, namespace = given.text("name", None), given.text("namespace", None)
    cluster = given.text("clusterId", "Kubernetes")
    workload = pb.Workload(
        name=name,
        namespace=namespace,
        cluster_id=cluster,
        # The name istiod gives a pod (facts istio-ambient 6.2).
        uid=given.text("uid", f"{cluster}//Pod/{namespace}/{name}"),
        addresses=[fields.address(ip, path).packed for ip, path in given.items("workloadIps")],
        network=given.text("network"),
        tunnel_protocol=given.choice("protocol", _TUNNELS, pb.NONE),
        trust_domain=given.text("trustDomain"),
        service_account=given.text("serviceAccount"),
        node=given.text("node"),
        canonical_name=given.text("canonicalName"),
        canonical_revision=given.text("canonicalRevision"),
        workload_type=given.choice("workloadType", _KINDS, pb.DEPLOYMENT),
        workload_name=given.text("workloadName"),
        native_tunnel=given.flag("nativeTunnel"),
        authorization_policies=given.texts("authorizationPolicies"),
        status=given.choice("status", _STATUS, pb.HEALTHY),
        hostname=given.text("hostname"),
        network_mode=given.choice("networkMode", _NETWORK_MODES, pb.STANDARD),
    )
    if given.has("waypoint"):
        workload.waypoint.CopyFrom(_gateway(given.inner("waypoint")))
    if given.has("networkGateway"):
        workload.network_gateway.CopyFrom(_gateway(given.inner("networkGateway")))
    if given.has("applicationTunnel"):
        tunnel = given.inner("applicationTunnel")
        workload.application_tunnel.protocol = tunnel.choice(
            "protocol", _APP_TUNNELS, pb.ApplicationTunnel.NONE
        )
        workload.application_tunnel.port = tunnel.number("port", 0, PORTS)
        tunnel.end()
    if given.has("locality"):
        locality = given.inner("locality")
        for key in ("region", "zone", "subzone"):
            setattr(workload.locality, key, locality.text(key))
        locality.end()
    if given.has("capacity"):
        workload.capacity.value = given.number("capacity", 1, 2**32 - 1)
    for service, ports, path in given.entries("services"):
        workload.services[service].ports.extend(_ports(ports, path))
    given.end()
    return workload


def _service(given: Fields, workloads: Mapping[str, pb.Workload]) -> pb.Service:
    service = pb.Service(
        name=given.text("name", None),
        namespace=given.text("namespace", None),
        hostname=given.text("hostname", None),
        addresses=[_vip(raw, path) for raw, path in given.items("vips")],
        subject_alt_names=given.texts("subjectAltNames"),
        ip_families=given.choice("ipFamilies", _FAMILIES, pb.AUTOMATIC),
        canonical=given.flag("canonical"),
        visibility=given.choice("visibility", _VISIBILITY, pb.Service.PUBLIC),
    )
    for raw, path in given.items("cidrVips"):
        cidr = Fields(raw, path)
        network = cidr.text("network")
        packed, length = fields.network(cidr.text("cidr", None), f"{path}.cidr")
        cidr.end()
        service.addresses.add(network=network, address=packed, length=length)
    for port, target, path in given.entries("ports"):
        service.ports.append(_port(port, target, path))
    if given.has("waypoint"):
        service.waypoint.CopyFrom(_gateway(given.inner("waypoint")))
    for raw, path in given.items("weightedWaypoints"):
        weighted = Fields(raw, path)
        service.weighted_waypoints.add(
            destination=_gateway(weighted.inner("destination")),
            weight=weighted.number("weight", 0, 2**32 - 1),
        )
        weighted.end()
    if given.has("loadBalancer"):
        service.load_balancing.CopyFrom(_balancing(given.inner("loadBalancer")))
    name = f"{service.namespace}/{service.hostname}"
    for uid, raw, path in given.entries("endpoints"):
        _endpoint(Fields(raw, path), uid, name, workloads)
    given.end()
    return service


def _endpoint(given: Fields, uid: str, service: str, workloads: Mapping[str, pb.Workload]) -> None:
    """On the wire an endpoint is an entry of its workload."""
    uid = given.text("workloadUid", uid)
    if uid not in workloads:
        raise LocalFileError(f"{given.path}: no workload {uid} in this file")
    ports = workloads[uid].services[service].ports
    for port, target, path in given.entries("port"):
        ports.append(_port(port, target, path))
    given.choice("status", _STATUS, pb.HEALTHY)
    given.end()


def _balancing(given: Fields) -> pb.LoadBalancing:
    balancing = pb.LoadBalancing(
        routing_preference=[
            fields.one_of(raw, _SCOPES, path) for raw, path in given.items("routingPreferences")
        ],
        mode=given.choice("mode", _MODES, pb.LoadBalancing.UNSPECIFIED_MODE),
        health_policy=given.choice("healthPolicy", _HEALTH, pb.LoadBalancing.ONLY_HEALTHY),
    )
    given.end()
    return balancing


def _gateway(given: Fields) -> pb.GatewayAddress:
    destination = given.text("destination", None)
    gateway = pb.GatewayAddress(hbone_mtls_port=given.number("hboneMtlsPort", 15008, PORTS))
    before, slash, after = destination.partition("/")
    if not slash or not after:
        raise LocalFileError(
            f"{given.path}.destination: network/ip or namespace/hostname is expected"
        )
    try:
        packed = ip_address(after).packed
    except ValueError:
        gateway.hostname.namespace, gateway.hostname.hostname = before, after
    else:
        gateway.address.network, gateway.address.address = before, packed
    given.end()
    return gateway


def _vip(raw: object, path: str) -> pb.NetworkAddress:
    network, _, text = str(raw).rpartition("/")
    return pb.NetworkAddress(network=network, address=fields.address(text, path).packed)


def _ports(raw: object, path: str) -> list[pb.Port]:
    inner = Fields({"ports": raw}, path)
    return [_port(port, target, at) for port, target, at in inner.entries("ports")]


def _port(port: str, target: object, path: str) -> pb.Port:
    return pb.Port(
        service_port=fields.whole(port, path, PORTS), target_port=fields.whole(target, path, PORTS)
    )


def _versioned(message: Message) -> LocalResource:
    raw = message.SerializeToString(deterministic=True)
    return LocalResource(hashlib.sha256(raw).hexdigest()[:16], message)
