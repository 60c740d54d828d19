"""Service and ServiceEntry to the wire's Service (facts istio-ambient 6.5)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controlplane.model.mesh import DOMAIN, app_protocol, family_of
from controlplane.model.vips import Assigned
from controlplane.model.waypoints import Waypoint
from controlplane.sources.fields import Cidr, Ip
from controlplane.sources.objects import Meta, Namespace, Service, ServiceEntry, ServicePort
from proto.gen import workload_pb2 as wire

_DISTRIBUTION = "networking.istio.io/traffic-distribution"
_AUTOALLOCATE = "networking.istio.io/enable-autoallocate-ip"
_INGRESS = "istio.io/ingress-use-waypoint"

_Scope = wire.LoadBalancing.Scope
_Mode = wire.LoadBalancing.Mode
_SAME_ZONE = (_Scope.NETWORK, _Scope.REGION, _Scope.ZONE)
_ROUTING = {
    "PreferClose": _SAME_ZONE,
    "PreferSameZone": _SAME_ZONE,
    "PreferSameNode": (*_SAME_ZONE, _Scope.SUBZONE, _Scope.NODE),
}


@dataclass(frozen=True)
class Binding:
    """What a service gets from elsewhere: VIPs, waypoint, rank among services of one hostname."""

    vips: Assigned
    waypoint: Waypoint | None
    weighted: tuple[tuple[Waypoint, int], ...]
    canonical: bool
    namespace: Namespace | None


def hostname(service: Service) -> str:
    return f"{service.meta.name}.{service.meta.namespace}.svc.{DOMAIN}"


def service_key(service: Service) -> str:
    return f"{service.meta.namespace}/{hostname(service)}"


def entry_key(entry: ServiceEntry, host: str) -> str:
    return f"{entry.meta.namespace}/{host}"


def wants_vip(service: Service) -> bool:
    return service.ips is None and not service.external


def entry_wants_vip(entry: ServiceEntry, host: str) -> bool:
    """Never for NONE, which sends to the address that was dialled."""
    if entry.addresses or entry.resolution == "NONE":
        return False
    if entry.meta.labels.get(_AUTOALLOCATE) == "false":
        return False
    return not host.startswith("*") or entry.resolution == "DYNAMIC_DNS"


def service(source: Service, bound: Binding, network: str) -> wire.Service:
    ips = source.ips
    if ips is None:
        assigned: Iterable[Ip | None] = bound.vips
        ips = tuple(
            ip
            for ip in assigned
            if ip and (not source.families or family_of(ip) in source.families)
        )
    made = _common(source.meta, hostname(source), source.ports, bound, network)
    made.addresses.extend(wire.NetworkAddress(network=network, address=ip.packed) for ip in ips)
    made.ip_families = _families(source.families)
    distribution = _distribution(source.distribution, source.meta, bound.namespace)
    if source.local_only:
        made.load_balancing.mode = _Mode.STRICT
        made.load_balancing.routing_preference.append(_Scope.NODE)
    elif distribution:
        _prefer(made, distribution)
    if source.publish_not_ready:
        made.load_balancing.health_policy = wire.LoadBalancing.HealthPolicy.ALLOW_ALL
    return made


def entry_service(source: ServiceEntry, host: str, bound: Binding, network: str) -> wire.Service:
    """The Service of one of the entry's hosts."""
    made = _common(source.meta, host, source.ports, bound, network)
    if source.addresses:
        made.addresses.extend(_network_address(cidr, network) for cidr in source.addresses)
    else:
        made.addresses.extend(
            wire.NetworkAddress(network=network, address=ip.packed) for ip in bound.vips if ip
        )
    made.subject_alt_names.extend(source.subject_alt_names)
    if source.private:
        made.visibility = wire.Service.Visibility.NAMESPACE
    distribution = _distribution("", source.meta, bound.namespace)
    if source.resolution == "NONE":
        made.load_balancing.mode = _Mode.PASSTHROUGH
        made.load_balancing.health_policy = wire.LoadBalancing.HealthPolicy.ALLOW_ALL
    elif distribution:
        _prefer(made, distribution)
    return made


def _common(
    meta: Meta, host: str, ports: Iterable[ServicePort], bound: Binding, network: str
) -> wire.Service:
    made = wire.Service(
        name=meta.name,
        namespace=meta.namespace,
        hostname=host,
        ports=[service_port(port) for port in ports],
        canonical=bound.canonical,
        ingress_use_waypoint=_ingress(meta, bound.namespace),
    )
    if bound.waypoint is not None:
        made.waypoint.CopyFrom(bound.waypoint.destination)
    for waypoint, weight in bound.weighted:
        made.weighted_waypoints.add(destination=waypoint.destination, weight=weight)
    return made


def service_port(port: ServicePort) -> wire.Port:
    """Target 0 means: a name, which every endpoint resolves for itself."""
    target = port.port if port.target is None else port.target
    return wire.Port(
        service_port=port.port,
        target_port=target if isinstance(target, int) else 0,
        app_protocol=app_protocol(port.name, port.protocol),
    )


def endpoint_port(port: ServicePort, named: Mapping[str, int]) -> wire.Port | None:
    """The port as one pod has it; None where the pod doesn't know the name."""
    target = port.port if port.target is None else port.target
    number = target if isinstance(target, int) else named.get(target)
    if number is None:
        return None
    return wire.Port(
        service_port=port.port,
        target_port=number,
        app_protocol=app_protocol(port.name, port.protocol),
    )


def _network_address(cidr: Cidr, network: str) -> wire.NetworkAddress:
    made = wire.NetworkAddress(network=network, address=cidr.network_address.packed)
    if cidr.num_addresses > 1:
        made.length = cidr.prefixlen
    return made


def _families(families: tuple[str, ...]) -> wire.IPFamilies:
    if not families:
        return wire.IPFamilies.AUTOMATIC
    if set(families) == {"IPv4"}:
        return wire.IPFamilies.IPV4_ONLY
    return wire.IPFamilies.IPV6_ONLY if set(families) == {"IPv6"} else wire.IPFamilies.DUAL


def _distribution(own: str, meta: Meta, namespace: Namespace | None) -> str:
    inherited = namespace.meta.annotations.get(_DISTRIBUTION, "") if namespace else ""
    found = own or meta.annotations.get(_DISTRIBUTION, "") or inherited
    return found if found in _ROUTING else ""


def _prefer(made: wire.Service, distribution: str) -> None:
    made.load_balancing.mode = _Mode.FAILOVER
    made.load_balancing.routing_preference.extend(_ROUTING[distribution])


def _ingress(meta: Meta, namespace: Namespace | None) -> bool:
    inherited = namespace.meta.labels.get(_INGRESS) if namespace else None
    return meta.labels.get(_INGRESS, inherited) == "true"
