"""One world of objects to everything that nodes are told, re-made only where inputs changed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import Message

from controlplane.model import authorization, services, workloads
from controlplane.model.members import Labels, Members, Membership, slice_member
from controlplane.model.mesh import NETWORK_LABEL, Mesh
from controlplane.model.peer_authentication import PeerAuthentications
from controlplane.model.vips import Assigned
from controlplane.model.waypoints import USE, Waypoint, Waypoints, leads_to
from controlplane.model.workloads import Context
from controlplane.sources.fields import Ip
from controlplane.sources.objects import (
    AuthorizationPolicy,
    EndpointSlice,
    Meta,
    Namespace,
    Node,
    PeerAuthentication,
    Pod,
    RefusedPolicy,
    Service,
    ServiceEntry,
    SliceEndpoint,
    WorkloadEntry,
    selects,
)
from controlplane.sources.world import World
from proto.gen import workload_pb2

M = TypeVar("M", bound=Message)
_BY_NAME = ("DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS")


@dataclass(frozen=True)
class Translation:
    """Resources by name; `accounts` are the (namespace, account) pairs with a pod, by node."""

    addresses: Mapping[str, Message]
    authorizations: Mapping[str, Message]
    accounts: Mapping[str, frozenset[tuple[str, str]]]
    notices: tuple[str, ...]


@dataclass
class _Cache:
    """Messages of the last world with what they were made from."""

    kept: dict[str, tuple[object, Message]] = field(default_factory=dict)
    fresh: dict[str, tuple[object, Message]] = field(default_factory=dict)

    def get(self, name: str, inputs: object, make: Callable[[], M]) -> M | Message:
        found = self.kept.get(name)
        message = found[1] if found is not None and found[0] == inputs else make()
        self.fresh[name] = (inputs, message)
        return message

    def turn(self) -> None:
        self.kept, self.fresh = self.fresh, {}


class Translator:
    """`translate` is a pure function of its arguments; what it remembers only saves work."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._cache = _Cache()
        self._waypoints: Mapping[str, Waypoint] = {}

    def translate(self, world: World, vips: Mapping[str, Assigned]) -> Translation:
        work = _Work(world, vips, self._mesh, self._cache, self._waypoints)
        result = work.run()
        self._cache.turn()
        self._waypoints = work.waypoints.ready
        return result


def vip_demand(world: World) -> tuple[list[str], frozenset[Ip]]:
    """Keys of the services that want an address, and the addresses that are given away by hand."""
    wanted = [services.service_key(s) for s in world.of(Service) if services.wants_vip(s)]
    wanted += [
        services.entry_key(entry, host)
        for entry in world.of(ServiceEntry)
        for host in entry.hosts
        if services.entry_wants_vip(entry, host)
    ]
    taken: set[Ip] = {ip for s in world.of(Service) for ip in s.ips or ()}
    taken |= {
        cidr.network_address
        for entry in world.of(ServiceEntry)
        for cidr in entry.addresses
        if cidr.num_addresses == 1
    }
    taken |= {ip for pod in world.of(Pod) for ip in pod.ips}
    return wanted, frozenset(taken)


class _Work:
    """One translation: indexes of the world first, then each kind of resource."""

    def __init__(
        self,
        world: World,
        vips: Mapping[str, Assigned],
        mesh: Mesh,
        cache: _Cache,
        waypoints: Mapping[str, Waypoint],
    ) -> None:
        self.world = world
        self.vips = vips
        self.mesh = mesh
        self.cache = cache
        self.namespaces = {n.meta.name: n for n in world.of(Namespace)}
        self.nodes = {n.meta.name: n for n in world.of(Node)}
        root = self.namespaces.get(mesh.root_namespace)
        self.network = (root.meta.labels.get(NETWORK_LABEL) if root else None) or mesh.network
        self.waypoints = Waypoints(world, self.namespaces, self.network, waypoints)
        self.peers = PeerAuthentications(world.of(PeerAuthentication), mesh.root_namespace)
        self.members = Members(world)
        self.addresses: dict[str, Message] = {}
        self.notices: set[str] = set()
        self._selecting: dict[str, list[AuthorizationPolicy | RefusedPolicy]] = {}
        self._policies_memo: dict[tuple[str, Labels], tuple[str, ...]] = {}

    def run(self) -> Translation:
        authorizations = self._authorizations()
        self._services()
        self._pods()
        self._entries()
        self._slices()
        return Translation(
            self.addresses, authorizations, self._accounts(), tuple(sorted(self.notices))
        )

    def _authorizations(self) -> dict[str, Message]:
        made: dict[str, Message] = {}
        policies: list[AuthorizationPolicy | RefusedPolicy] = [
            *self.world.of(AuthorizationPolicy),
            *self.world.of(RefusedPolicy),
        ]
        root = self.mesh.root_namespace
        for policy in policies:
            if not authorization.published(policy):
                continue
            made[policy.meta.key] = self.cache.get(
                f"policy {policy.meta.key}",
                policy,
                lambda policy=policy: authorization.authorization(policy, root),  # type: ignore[misc]
            )
            if policy.selector:
                self._selecting.setdefault(policy.meta.namespace, []).append(policy)
        made.update(self.peers.policies())
        return made

    def _services(self) -> None:
        hosts: dict[str, list[tuple[bool, tuple[str, str], str]]] = {}
        for service in self.world.of(Service):
            if not service.external:
                key = services.service_key(service)
                rank = (False, service.meta.age, key)
                hosts.setdefault(services.hostname(service), []).append(rank)
        for entry in self.world.of(ServiceEntry):
            for host in entry.hosts:
                hosts.setdefault(host, []).append(
                    (True, entry.meta.age, services.entry_key(entry, host))
                )
        canonical = {min(ranks)[2] for ranks in hosts.values()}
        taken: set[str] = set()
        for service in self.world.of(Service):
            if service.external:
                continue
            key = services.service_key(service)
            taken.add(key)
            host = services.hostname(service)
            bound = self._binding(service.meta, key, canonical, host, service.ips or ())
            self._put(
                key,
                (service, bound, self.network),
                lambda service=service, bound=bound: services.service(  # type: ignore[misc]
                    service, bound, self.network
                ),
            )
        # One service a namespace and host: a Kubernetes Service wins, then the oldest entry.
        for entry in sorted(self.world.of(ServiceEntry), key=lambda e: e.meta.age):
            for host in entry.hosts:
                key = services.entry_key(entry, host)
                if key in taken:
                    self.notices.add(f"ServiceEntry {entry.meta.key}: {host} is described already")
                    continue
                taken.add(key)
                bound = self._binding(entry.meta, key, canonical, host, ())
                self._put(
                    key,
                    (entry, bound, self.network),
                    lambda entry=entry, host=host, bound=bound: services.entry_service(  # type: ignore[misc]
                        entry, host, bound, self.network
                    ),
                )

    def _binding(
        self, meta: Meta, key: str, canonical: set[str], host: str, ips: tuple[Ip, ...]
    ) -> services.Binding:
        waypoint = self._waypoint(meta, "service")
        if waypoint and leads_to(waypoint, meta.namespace, host, ips):
            waypoint = None
        return services.Binding(
            vips=self.vips.get(key, (None, None)),
            waypoint=waypoint,
            weighted=self.waypoints.weighted(meta, waypoint) if waypoint else (),
            canonical=key in canonical,
            namespace=self.namespaces.get(meta.namespace),
        )

    def _pods(self) -> None:
        owners: dict[Ip, str] = {}
        for pod in self.world.of(Pod):
            if pod.terminal:
                continue
            for ip in () if pod.host_network else pod.ips:
                owner = owners.setdefault(ip, pod.meta.key)
                if owner != pod.meta.key:
                    self.notices.add(f"Pod {pod.meta.key}: {ip} is Pod {owner}'s address too")
            context = self._context(pod.meta, pod.meta.label_set, pod.node, pod.meta.key)
            self._put(
                workloads.pod_uid(pod, self.mesh),
                (pod, context),
                lambda pod=pod, context=context: workloads.pod_workload(  # type: ignore[misc]
                    pod, context, self.mesh
                ),
            )

    def _entries(self) -> None:
        for entry in self.world.of(WorkloadEntry):
            uid = f"{self.mesh.cluster_id}/networking.istio.io/WorkloadEntry/{entry.meta.key}"
            self._entry(entry, uid, self.members.of(entry.meta.namespace, entry.label_set))
        for owner in self.world.of(ServiceEntry):
            base = f"{self.mesh.cluster_id}/networking.istio.io/ServiceEntry/{owner.meta.key}"
            members = tuple(
                Membership(services.entry_key(owner, host), owner.ports) for host in owner.hosts
            )
            for entry in owner.endpoints:
                self._entry(entry, f"{base}/{entry.address}", members)
            if owner.resolution in _BY_NAME and not owner.endpoints and not owner.selector:
                for host, member in zip(owner.hosts, members, strict=True):
                    if not host.startswith("*"):
                        self._host(owner, host, f"{base}/{host}", member)

    def _host(self, owner: ServiceEntry, host: str, uid: str, member: Membership) -> None:
        """Without endpoints the host itself is the endpoint, resolved by the nodes."""
        entry = WorkloadEntry(
            owner.meta, host, {}, owner.meta.labels, owner.meta.label_set, "", "", None, ""
        )
        context = Context((member,), (), None, None, None, None, self.network)
        self._put(
            uid,
            (owner, context),
            lambda: workloads.entry_workload(entry, uid, context, self.mesh),
        )

    def _entry(self, entry: WorkloadEntry, uid: str, members: tuple[Membership, ...]) -> None:
        context = self._context(entry.meta, entry.label_set, "", "", members)
        self._put(
            uid,
            (entry, context),
            lambda: workloads.entry_workload(entry, uid, context, self.mesh),
        )

    def _slices(self) -> None:
        for piece in self.world.of(EndpointSlice):
            owner = self.members.owner(piece)
            for endpoint in piece.endpoints if owner else ():
                if owner and not endpoint.pod and endpoint.ips:
                    self._slice(piece, endpoint, slice_member(owner, piece))

    def _slice(self, piece: EndpointSlice, endpoint: SliceEndpoint, member: Membership) -> None:
        base = f"{self.mesh.cluster_id}/discovery.k8s.io/EndpointSlice/{piece.meta.key}"
        uid = f"{base}/{endpoint.ips[0]}"
        context = Context((member,), (), None, None, None, None, self.network)
        self._put(
            uid,
            (piece, endpoint, context),
            lambda: workloads.slice_workload(piece, endpoint, uid, context, self.mesh),
        )

    def _context(
        self,
        meta: Meta,
        labels: Labels,
        node: str,
        pod: str,
        members: tuple[Membership, ...] | None = None,
    ) -> Context:
        if members is None:
            members = self.members.of(meta.namespace, labels, pod)
        instance = self.waypoints.of_instance(meta)
        return Context(
            members=members,
            policies=self._policies(meta.namespace, labels),
            waypoint=None if instance else self._waypoint(meta, "workload"),
            instance_of=instance,
            namespace=self.namespaces.get(meta.namespace),
            node=self.nodes.get(node),
            network=self.network,
        )

    def _waypoint(self, meta: Meta, kind: str) -> Waypoint | None:
        found = self.waypoints.bound(meta, kind)
        if found.problem:
            own = USE in meta.labels
            subject = f"{meta.kind} {meta.key}" if own else f"Namespace {meta.namespace}"
            self.notices.add(f"{subject}: {found.problem}")
        return found.waypoint

    def _policies(self, namespace: str, labels: Labels) -> tuple[str, ...]:
        """Selecting policies of the root namespace count in every namespace."""
        memo = self._policies_memo.get((namespace, labels))
        if memo is None:
            found = {
                policy.meta.key
                for where in {namespace, self.mesh.root_namespace}
                for policy in self._selecting.get(where, ())
                if selects(policy.selector, labels)
            }
            memo = (*sorted(found), *self.peers.listed(namespace, labels))
            self._policies_memo[(namespace, labels)] = memo
        return memo

    def _accounts(self) -> dict[str, frozenset[tuple[str, str]]]:
        found: dict[str, set[tuple[str, str]]] = {}
        for pod in self.world.of(Pod):
            if not pod.terminal:
                pair = (pod.meta.namespace, pod.service_account)
                found.setdefault(pod.node, set()).add(pair)
        return {node: frozenset(pairs) for node, pairs in found.items()}

    def _put(self, name: str, inputs: object, make: Callable[[], Message]) -> None:
        self.addresses[name] = self.cache.get(name, inputs, lambda: _address(make()))


def _address(message: Message) -> workload_pb2.Address:
    if isinstance(message, workload_pb2.Workload):
        return workload_pb2.Address(workload=message)
    assert isinstance(message, workload_pb2.Service)  # the only other resource of this type
    return workload_pb2.Address(service=message)
