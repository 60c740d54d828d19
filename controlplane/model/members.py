"""Which services a workload belongs to: by selector, or by an EndpointSlice that names the pod."""

from collections.abc import Mapping
from dataclasses import dataclass

from controlplane.model import services
from controlplane.sources.objects import (
    EndpointSlice,
    Service,
    ServiceEntry,
    ServicePort,
    selects,
)
from controlplane.sources.world import World

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Membership:
    """A service that a workload belongs to.

    `by_name`: an EndpointSlice decides, and `named` has the number of each port it knows by name.
    """

    key: str
    ports: tuple[ServicePort, ...]
    by_name: bool = False
    named: tuple[tuple[str, int], ...] = ()


_Selecting = tuple[Mapping[str, str], Membership]


class Members:
    """The memberships of one world."""

    def __init__(self, world: World) -> None:
        # By namespace and one label that the selector asks for, so that a pod is compared with the
        # few services that may select it, not with all of its namespace.
        self._by_label: dict[tuple[str, tuple[str, str]], list[_Selecting]] = {}
        self._by_pod: dict[str, list[Membership]] = {}
        # Services without a selector, whose endpoints are what slices say.
        self._plain: dict[str, Service] = {}
        self._memo: dict[tuple[str, Labels], tuple[Membership, ...]] = {}
        for service in world.of(Service):
            if service.external:
                continue
            if service.selector:
                member = Membership(services.service_key(service), service.ports)
                self._select(service.meta.namespace, service.selector, member)
            else:
                self._plain[service.meta.key] = service
        for entry in world.of(ServiceEntry):
            for host in entry.hosts if entry.selector else ():
                member = Membership(services.entry_key(entry, host), entry.ports)
                self._select(entry.meta.namespace, entry.selector, member)
        for piece in world.of(EndpointSlice):
            owner = self.owner(piece)
            for endpoint in piece.endpoints if owner else ():
                if endpoint.pod and owner:
                    member = slice_member(owner, piece)
                    self._by_pod.setdefault(endpoint.pod, []).append(member)

    def of(self, namespace: str, labels: Labels, pod: str = "") -> tuple[Membership, ...]:
        """`pod` is its namespace/name, empty for what isn't a pod."""
        found = self._memo.get((namespace, labels))
        if found is None:
            members = [
                member
                for label in labels
                for selector, member in self._by_label.get((namespace, label), ())
                if selects(selector, labels)
            ]
            found = tuple(sorted(members, key=lambda member: member.key))
            self._memo[(namespace, labels)] = found
        return (*found, *self._by_pod[pod]) if pod in self._by_pod else found

    def owner(self, piece: EndpointSlice) -> Service | None:
        """The service that takes its endpoints from this slice."""
        return self._plain.get(f"{piece.meta.namespace}/{piece.service}")

    def _select(self, namespace: str, selector: Mapping[str, str], member: Membership) -> None:
        label = next(iter(selector.items()))
        self._by_label.setdefault((namespace, label), []).append((selector, member))


def slice_member(owner: Service, piece: EndpointSlice) -> Membership:
    return Membership(
        services.service_key(owner), owner.ports, by_name=True, named=tuple(piece.ports.items())
    )
