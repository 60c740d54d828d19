"""Which waypoint a service or workload is bound to (facts istio-ambient 6.6)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controlplane.sources.fields import Ip, is_digits
from controlplane.sources.objects import Gateway, GatewayClass, Meta, Namespace, selects
from controlplane.sources.world import World
from proto.gen import workload_pb2

USE = "istio.io/use-waypoint"
USE_NAMESPACE = "istio.io/use-waypoint-namespace"
FOR = "istio.io/waypoint-for"
CANARY = "istio.io/use-waypoint-canary"
CANARY_NAMESPACE = "istio.io/use-waypoint-canary-namespace"
CANARY_WEIGHT = "istio.io/use-waypoint-canary-weight"
BINDING = "ambient.istio.io/waypoint-inbound-binding"
GATEWAY_NAME = "gateway.networking.k8s.io/gateway-name"
MANAGED = "gateway.istio.io/managed"
MESH_CONTROLLER = "istio.io-mesh-controller"
PORT = 15008  # the only one a waypoint is reached on

_KINDS = {
    "service": frozenset({"service"}),
    "workload": frozenset({"workload"}),
    "all": frozenset({"service", "workload"}),
    "none": frozenset[str](),
}


@dataclass(frozen=True, eq=False)
class Waypoint:
    """Made of (gateway, kind, network); while those are the same, it is the same object."""

    gateway: Gateway
    kind: GatewayClass | None
    network: str
    destination: workload_pb2.GatewayAddress
    serves: frozenset[str]
    tunnel: workload_pb2.ApplicationTunnel | None


@dataclass(frozen=True)
class Bound:
    """What was found, and why nothing was where something was asked for."""

    waypoint: Waypoint | None
    problem: str = ""


NOTHING = Bound(None)


class Waypoints:
    """All waypoints of one world; look-ups by label."""

    def __init__(
        self,
        world: World,
        namespaces: Mapping[str, Namespace],
        network: str,
        before: Mapping[str, Waypoint],
    ) -> None:
        self._namespaces = namespaces
        self._gateways = {g.meta.key: g for g in world.of(Gateway)}
        classes = {c.meta.name: c for c in world.of(GatewayClass)}
        self.ready: dict[str, Waypoint] = {}
        for key, gateway in self._gateways.items():
            if gateway.addresses:
                kind = classes.get(gateway.class_name)
                old = before.get(key)
                same = old and (old.gateway, old.kind, old.network) == (gateway, kind, network)
                self.ready[key] = old if old and same else _waypoint(gateway, kind, network)

    def of_instance(self, meta: Meta) -> Waypoint | None:
        """The waypoint that this pod is an instance of."""
        name = meta.labels.get(GATEWAY_NAME)
        return self.ready.get(f"{meta.namespace}/{name}") if name else None

    def bound(self, meta: Meta, kind: str) -> Bound:
        """`kind`: service or workload. The object's own label decides before the namespace's."""
        if meta.labels.get(MANAGED) == MESH_CONTROLLER or self.of_instance(meta):
            return NOTHING  # a waypoint has no waypoint in front of it
        namespace = self._namespaces.get(meta.namespace)
        inherited = USE not in meta.labels
        labels = (namespace.meta.labels if namespace else {}) if inherited else meta.labels
        name = labels.get(USE, "none")
        if name in ("none", ""):
            return NOTHING
        return self._find(f"{labels.get(USE_NAMESPACE) or meta.namespace}/{name}", meta, kind)

    def weighted(self, meta: Meta, primary: Waypoint) -> tuple[tuple[Waypoint, int], ...]:
        """The canary's split; () without a usable canary."""
        namespace = self._namespaces.get(meta.namespace)
        holder = meta if CANARY in meta.labels else (namespace.meta if namespace else meta)
        name = holder.labels.get(CANARY)
        weight = holder.annotations.get(CANARY_WEIGHT, "")
        if not name or not is_digits(weight) or int(weight) > 100:
            return ()
        where = holder.labels.get(CANARY_NAMESPACE) or meta.namespace
        canary = self._find(f"{where}/{name}", meta, "service").waypoint
        if canary is None or canary is primary:
            return ()
        return (primary, 100 - int(weight)), (canary, int(weight))

    def _find(self, key: str, meta: Meta, kind: str) -> Bound:
        gateway = self._gateways.get(key)
        if gateway is None:
            return Bound(None, f"waypoint {key} doesn't exist: traffic goes direct")
        waypoint = self.ready.get(key)
        if waypoint is None:
            return Bound(None, f"waypoint {key} has no status.addresses: traffic goes direct")
        if not self._admits(gateway, meta.namespace):
            return Bound(None, f"waypoint {key} doesn't admit namespace {meta.namespace}")
        if kind not in waypoint.serves:
            # A namespace's waypoint need not serve every kind of what lives in it.
            return Bound(
                None, f"waypoint {key} doesn't serve a {kind}" if USE in meta.labels else ""
            )
        return Bound(waypoint)

    def _admits(self, gateway: Gateway, namespace: str) -> bool:
        if gateway.meta.namespace == namespace:
            return True
        for listener in gateway.listeners:
            if listener.port != PORT or listener.protocol != "HBONE":
                continue
            if listener.routes_from == "All":
                return True
            found = self._namespaces.get(namespace)
            if listener.routes_from == "Selector" and found:
                return selects(listener.selector, found.meta.label_set)
        return False


def leads_to(waypoint: Waypoint, namespace: str, hostname: str, ips: Iterable[Ip]) -> bool:
    """Whether the waypoint is reached by this very service."""
    to = waypoint.destination
    if to.HasField("hostname"):
        return (to.hostname.namespace, to.hostname.hostname) == (namespace, hostname)
    return to.address.address in [ip.packed for ip in ips]


def _waypoint(gateway: Gateway, kind: GatewayClass | None, network: str) -> Waypoint:
    names = [address for address in gateway.addresses if isinstance(address, str)]
    destination = workload_pb2.GatewayAddress(hbone_mtls_port=PORT)
    if names:
        destination.hostname.namespace = gateway.meta.namespace
        destination.hostname.hostname = names[0]
    else:
        first = gateway.addresses[0]
        assert not isinstance(first, str)  # `names` is empty, so all are addresses
        destination.address.network = network
        destination.address.address = first.packed
    inherited = kind.meta.labels.get(FOR) if kind else None
    serves = gateway.meta.labels.get(FOR) or inherited or "service"
    binding = gateway.meta.annotations.get(BINDING) or (
        kind.meta.annotations.get(BINDING, "") if kind else ""
    )
    return Waypoint(
        gateway,
        kind,
        network,
        destination,
        _KINDS.get(serves, _KINDS["service"]),
        _tunnel(binding),
    )


def _tunnel(binding: str) -> workload_pb2.ApplicationTunnel | None:
    protocol, _, port = binding.partition("/")
    if protocol != "PROXY":
        return None
    return workload_pb2.ApplicationTunnel(
        protocol=workload_pb2.ApplicationTunnel.Protocol.PROXY,
        port=int(port) if is_digits(port) and int(port) <= 65535 else 0,
    )
