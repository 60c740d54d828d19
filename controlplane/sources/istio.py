"""Istio's and the Gateway API's kinds, policies of who may talk to whom aside."""

from ipaddress import ip_network
from typing import TYPE_CHECKING

from controlplane.sources.fields import Cidr, Field, Ip, is_digits
from controlplane.sources.meta import match_labels, meta
from controlplane.sources.objects import (
    Gateway,
    Listener,
    Meta,
    Mode,
    PeerAuthentication,
    ServiceEntry,
    ServicePort,
    WorkloadEntry,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

RESOLUTIONS = ("NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS")
_BY_NAME = ("DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS")


def workload_entry(document: Field) -> WorkloadEntry:
    about = meta(document, "WorkloadEntry")
    return _entry(document.require("spec", "give the workload's address"), about)


def _entry(spec: Field, about: Meta) -> WorkloadEntry:
    """`labels` of the spec and of the object count together, the spec's first."""
    address = spec.require("address", "give an IP address, or a host name to be resolved")
    labels_field = spec.get("labels")
    labels = {**about.labels, **(labels_field.labels() if labels_field else {})}
    ports = spec.get("ports")
    network = spec.get("network")
    locality = spec.get("locality")
    weight = spec.get("weight")
    account = spec.get("serviceAccount")
    return WorkloadEntry(
        meta=about,
        address=_host_or_ip(address),
        ports={name: port.port() for name, port in ports.entries()} if ports else {},
        labels=labels,
        label_set=frozenset(labels.items()),
        network=network.text() if network else "",
        locality=locality.text() if locality else "",
        weight=weight.integer(0, 2**31 - 1) if weight else None,
        service_account=account.text() if account else "",
    )


def service_entry(document: Field) -> ServiceEntry:
    about = meta(document, "ServiceEntry")
    spec = document.require("spec", "give hosts and ports")
    hosts = spec.require("hosts", "name at least one host")
    if not hosts.items():
        raise hosts.fail("is empty: name at least one host")
    for host in hosts.items():
        if host.filled() == "*":
            raise host.fail("a bare * would catch every name: write the domain, as *.example.com")
    kind = spec.get("resolution")
    resolution = kind.choice(*RESOLUTIONS) if kind else "NONE"
    endpoints = spec.get("endpoints")
    selector = match_labels(spec, "workloadSelector", "labels")
    if endpoints is not None and selector:
        raise endpoints.fail("excludes workloadSelector: keep one of the two")
    names = spec.get("subjectAltNames")
    found = endpoints.items() if endpoints else []
    if resolution == "NONE" and found and not selector:
        raise found[0].fail("resolution NONE takes no endpoints: use STATIC or DNS")
    entries = tuple(_entry(item, about) for item in found)
    if resolution == "STATIC":
        for item, entry in zip(found, entries, strict=True):
            if isinstance(entry.address, str):
                raise item.fail(f"{entry.address} is a host name: use resolution DNS, or an IP")
    return ServiceEntry(
        meta=about,
        hosts=hosts.texts(),
        addresses=_entry_addresses(spec, resolution),
        ports=_entry_ports(spec),
        resolution=resolution,
        endpoints=entries,
        selector=selector,
        subject_alt_names=names.texts() if names else (),
        private=_private(spec),
    )


def _entry_addresses(spec: Field, resolution: str) -> tuple[Cidr, ...]:
    field = spec.get("addresses")
    found: list[Cidr] = []
    for item in field.items() if field else ():
        cidr = item.cidr()
        if cidr.num_addresses > 1 and resolution in _BY_NAME:
            raise item.fail("ranges go with resolution NONE or STATIC only: give an address")
        found.append(cidr)
    return tuple(found)


def _entry_ports(spec: Field) -> tuple[ServicePort, ...]:
    field = spec.get("ports")
    found: list[ServicePort] = []
    for port in field.items() if field else ():
        number = port.require("number", "give the port's number").port()
        target = port.get("targetPort")
        protocol = port.get("protocol")
        app = protocol.text() if protocol else ""
        name = port.require("name", "name the port").filled()
        if app.upper() == "UDP":
            continue
        if any(other.port == number for other in found):
            raise port.fail(f"port {number} is given twice: keep one")
        found.append(ServicePort(name, number, target.port() if target else None, app))
    return tuple(found)


def _private(spec: Field) -> bool:
    """exportTo: the workload API knows everybody and the own namespace, nothing between."""
    field = spec.get("exportTo")
    if field is None or not field.items():
        return False
    if field.texts() == (".",):
        return True
    if "*" in field.texts():
        return False
    raise field.fail('can only be ["*"] or ["."]: nodes can\'t tell other namespaces apart')


def peer_authentication(document: Field) -> PeerAuthentication:
    document.only("apiVersion", "kind", "metadata", "spec", "status")
    about = meta(document, "PeerAuthentication")
    spec = document.get("spec")
    if spec is None:
        return PeerAuthentication(about, {}, Mode.UNSET, {})
    spec.only("selector", "mtls", "portLevelMtls")
    selector = match_labels(spec, "selector")
    levels = spec.get("portLevelMtls")
    ports: dict[int, Mode] = {}
    if levels is not None:
        if not selector:
            raise levels.fail("needs a selector: ports belong to workloads")
        for port, level in levels.entries():
            if not is_digits(port) or not 1 <= int(port) <= 65535:
                raise level.fail(f"{port} is not a port (1 to 65535)")
            ports[int(port)] = _mode(level)
    return PeerAuthentication(about, selector, _mode(spec.get("mtls")), ports)


def _mode(field: Field | None) -> Mode:
    if field is None:
        return Mode.UNSET
    field.only("mode")
    mode = field.get("mode")
    return Mode(mode.choice(*(m.value for m in Mode))) if mode else Mode.UNSET


def gateway(document: Field) -> Gateway:
    """Addresses from the status; from the spec where nobody wrote a status."""
    about = meta(document, "Gateway")
    spec = document.require("spec", "give gatewayClassName and listeners")
    listeners = spec.get("listeners")
    addresses = document.at("status", "addresses") or spec.get("addresses")
    return Gateway(
        meta=about,
        class_name=spec.require("gatewayClassName", "for example istio-waypoint").filled(),
        addresses=tuple(
            _host_or_ip(item.require("value", "give the address or host name"))
            for item in addresses.items()
        )
        if addresses
        else (),
        listeners=tuple(_listener(item) for item in listeners.items()) if listeners else (),
    )


def _listener(field: Field) -> Listener:
    routes = field.at("allowedRoutes", "namespaces")
    source = routes.get("from") if routes else None
    labels: Mapping[str, str] = match_labels(routes, "selector") if routes else {}
    return Listener(
        port=field.require("port", "give the listener's port").port(),
        protocol=field.require("protocol", "for example HBONE").filled(),
        routes_from=source.choice("Same", "All", "Selector", "None") if source else "Same",
        selector=labels,
    )


def _host_or_ip(field: Field) -> Ip | str:
    text = field.filled()
    try:
        network = ip_network(text)
    except ValueError:
        if any(char in text for char in ":/ "):
            raise field.fail(f"{text!r} is neither an IP address nor a host name") from None
        return text
    if network.num_addresses > 1:
        raise field.fail(f"{text} is a range: give one address")
    return network.network_address
