"""Kubernetes' own kinds: Namespace, Node, Pod, Service, EndpointSlice."""

from collections.abc import Mapping

from controlplane.sources.fields import Field, Ip
from controlplane.sources.meta import meta
from controlplane.sources.objects import (
    EndpointSlice,
    GatewayClass,
    Namespace,
    Node,
    Pod,
    Service,
    ServicePort,
    SliceEndpoint,
)

_PHASES = ("Pending", "Running", "Succeeded", "Failed", "Unknown")
_DISTRIBUTIONS = ("PreferClose", "PreferSameZone", "PreferSameNode")


def namespace(document: Field) -> Namespace:
    return Namespace(meta(document, "Namespace"))


def node(document: Field) -> Node:
    return Node(meta(document, "Node"))


def gateway_class(document: Field) -> GatewayClass:
    return GatewayClass(meta(document, "GatewayClass"))


def pod(document: Field) -> Pod:
    """Without a cluster nobody fills in the status, so uid, node and addresses are asked for."""
    about = meta(document, "Pod")
    spec = document.require("spec", "give spec.nodeName")
    status = document.get("status")
    phase = status.get("phase") if status else None
    terminal = phase is not None and phase.choice(*_PHASES) in ("Succeeded", "Failed")
    if not about.uid:
        metadata = document.require("metadata", "")
        metadata.require("uid", "give the uid under which the node's agent knows the pod")
    on = spec.require("nodeName", "name the node that runs the pod")
    account = spec.get("serviceAccountName")
    host = spec.get("hostNetwork")
    return Pod(
        meta=about,
        node=on.filled(),
        service_account=account.filled() if account else "default",
        ips=() if terminal else _pod_ips(document, status),
        host_network=host is not None and host.boolean(),
        terminal=terminal,
        ready=not about.deleting and _ready(status),
        ports=_container_ports(spec),
    )


def _pod_ips(document: Field, status: Field | None) -> tuple[Ip, ...]:
    remedy = "give the pod's addresses, for example podIPs: [{ip: 10.0.1.5}]"
    if status is None:
        raise document.fail_at("status.podIPs", f"is missing: {remedy}")
    single = status.get("podIP")
    field = status.get("podIPs")
    if field is None and single is not None:
        return (single.address(),)
    field = field or status.require("podIPs", remedy)
    found = tuple(item.require("ip", "give the address").address() for item in field.items())
    if not found:
        raise field.fail(f"is empty: {remedy}")
    if len(set(found)) != len(found):
        raise field.fail("names an address twice: keep one")
    return found


def _ready(status: Field | None) -> bool:
    """Ready unless a condition says otherwise: a hand-written pod carries none."""
    conditions = status.get("conditions") if status else None
    for condition in conditions.items() if conditions else ():
        if condition.require("type", "name the condition").text() == "Ready":
            return condition.require("status", "True or False").text() == "True"
    return True


def _container_ports(spec: Field) -> Mapping[str, int]:
    named: dict[str, int] = {}
    for group in ("containers", "initContainers"):
        containers = spec.get(group)
        for container in containers.items() if containers else ():
            ports = container.get("ports")
            for port in ports.items() if ports else ():
                name = port.get("name")
                if name is not None and _is_tcp(port):
                    number = port.require("containerPort", "give the port's number").port()
                    named.setdefault(name.filled(), number)
    return named


def service(document: Field) -> Service:
    about = meta(document, "Service")
    spec = document.require("spec", "give at least the ports")
    kind = spec.get("type")
    policy = spec.get("internalTrafficPolicy")
    families = spec.get("ipFamilies")
    unready = spec.get("publishNotReadyAddresses")
    selector = spec.get("selector")
    return Service(
        meta=about,
        ips=_cluster_ips(spec),
        families=tuple(item.choice("IPv4", "IPv6") for item in families.items())
        if families
        else (),
        selector=selector.labels() if selector else {},
        ports=_service_ports(spec),
        external=kind is not None and kind.text() == "ExternalName",
        local_only=policy is not None and policy.choice("Cluster", "Local") == "Local",
        distribution=_distribution(spec),
        publish_not_ready=unready is not None and unready.boolean(),
    )


def _cluster_ips(spec: Field) -> tuple[Ip, ...] | None:
    several = spec.get("clusterIPs")
    single = spec.get("clusterIP")
    given = several.items() if several else [single] if single else []
    # kubectl prints "" for a Service that hasn't got its address yet.
    given = [field for field in given if field.text() != ""]
    if not given:
        return None
    if any(field.text() == "None" for field in given):
        return ()
    return tuple(field.address() for field in given)


def _service_ports(spec: Field) -> tuple[ServicePort, ...]:
    ports = spec.get("ports")
    found: list[ServicePort] = []
    for port in ports.items() if ports else ():
        number = port.require("port", "give the service's port").port()
        name = port.get("name")
        protocol = port.get("appProtocol")
        target = port.get("targetPort")
        entry = ServicePort(
            name=name.text() if name else "",
            port=number,
            target=_target(target) if target else None,
            protocol=protocol.text() if protocol else "",
        )
        if not _is_tcp(port):
            continue
        if any(other.port == number for other in found):
            raise port.fail(f"port {number} is given twice: keep one")
        found.append(entry)
    return tuple(found)


def _target(field: Field) -> int | str:
    return field.port() if field.is_integer() else field.filled()


def _distribution(spec: Field) -> str:
    field = spec.get("trafficDistribution")
    return field.choice(*_DISTRIBUTIONS) if field else ""


def endpoint_slice(document: Field) -> EndpointSlice:
    about = meta(document, "EndpointSlice")
    field = document.get("endpoints")
    ports = document.get("ports")
    named: dict[str, int] = {}
    for port in ports.items() if ports else ():
        number = port.get("port")
        name = port.get("name")
        if number is not None and _is_tcp(port):
            named[name.text() if name else ""] = number.port()
    return EndpointSlice(
        meta=about,
        service=about.labels.get("kubernetes.io/service-name", ""),
        endpoints=tuple(_endpoint(item, about.namespace) for item in field.items())
        if field
        else (),
        ports=named,
    )


def _endpoint(field: Field, namespace: str) -> SliceEndpoint:
    addresses = field.require("addresses", "give the endpoint's addresses")
    ready = field.at("conditions", "ready")
    target = field.get("targetRef")
    pod = ""
    if target is not None:
        kind = target.get("kind")
        if kind is not None and kind.text() == "Pod":
            where = target.get("namespace")
            name = target.require("name", "name the pod").filled()
            pod = f"{where.text() if where else namespace}/{name}"
    on = field.get("nodeName")
    return SliceEndpoint(
        ips=tuple(item.address() for item in addresses.items()),
        ready=ready is None or ready.boolean(),
        pod=pod,
        node=on.text() if on else "",
    )


def _is_tcp(port: Field) -> bool:
    protocol = port.get("protocol")
    return protocol is None or protocol.choice("TCP", "UDP", "SCTP") == "TCP"
