"""The objects manifests describe: immutable, compared by identity (unchanged text, same object)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from controlplane.sources.fields import Cidr, Ip


@dataclass(frozen=True, eq=False)
class Meta:
    """`created` is the text of creationTimestamp; texts of one format order as times do."""

    kind: str
    namespace: str
    name: str
    uid: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    created: str
    deleting: bool
    owner: tuple[str, str] | None
    line: int
    label_set: frozenset[tuple[str, str]] = field(repr=False)

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def age(self) -> tuple[str, str]:
        """Orders the oldest first; a missing timestamp is older than all, the name decides."""
        return self.created, self.name


@dataclass(frozen=True, eq=False)
class Namespace:
    meta: Meta


@dataclass(frozen=True, eq=False)
class Node:
    meta: Meta


@dataclass(frozen=True, eq=False)
class GatewayClass:
    meta: Meta


@dataclass(frozen=True, eq=False)
class Pod:
    meta: Meta
    node: str
    service_account: str
    ips: tuple[Ip, ...]
    host_network: bool
    terminal: bool
    ready: bool
    ports: Mapping[str, int]  # named TCP container ports


@dataclass(frozen=True)
class ServicePort:
    """`target`: a number, a container port's name, or None for the same number."""

    name: str
    port: int
    target: int | str | None
    protocol: str


@dataclass(frozen=True, eq=False)
class Service:
    """`ips`: None asks for a VIP, () is headless. Only TCP ports; `protocol` is the app's."""

    meta: Meta
    ips: tuple[Ip, ...] | None
    families: tuple[str, ...]
    selector: Mapping[str, str]
    ports: tuple[ServicePort, ...]
    external: bool
    local_only: bool
    distribution: str
    publish_not_ready: bool


@dataclass(frozen=True)
class SliceEndpoint:
    ips: tuple[Ip, ...]
    ready: bool
    pod: str  # namespace/name, "" for an endpoint without a pod
    node: str


@dataclass(frozen=True, eq=False)
class EndpointSlice:
    meta: Meta
    service: str
    endpoints: tuple[SliceEndpoint, ...]
    ports: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class WorkloadEntry:
    """Also an inline endpoint of a ServiceEntry. `address`: an IP, or a host name as text."""

    meta: Meta
    address: Ip | str
    ports: Mapping[str, int]
    labels: Mapping[str, str]
    label_set: frozenset[tuple[str, str]]
    network: str
    locality: str
    weight: int | None
    service_account: str


@dataclass(frozen=True, eq=False)
class ServiceEntry:
    meta: Meta
    hosts: tuple[str, ...]
    addresses: tuple[Cidr, ...]
    ports: tuple[ServicePort, ...]
    resolution: str
    endpoints: tuple[WorkloadEntry, ...]
    selector: Mapping[str, str]
    subject_alt_names: tuple[str, ...]
    private: bool


class Mode(Enum):
    UNSET = "UNSET"
    DISABLE = "DISABLE"
    PERMISSIVE = "PERMISSIVE"
    STRICT = "STRICT"


@dataclass(frozen=True, eq=False)
class PeerAuthentication:
    meta: Meta
    selector: Mapping[str, str]
    mode: Mode
    ports: Mapping[int, Mode]


@dataclass(frozen=True)
class Test:
    """What one source, operation or condition asks for; values of a field are alternatives.

    Field names are those of the wire's Match. `l7` tells that something was left out that only a
    proxy for HTTP can see.
    """

    strings: Mapping[str, tuple[str, ...]]
    accounts: Mapping[str, tuple[tuple[str, str], ...]]
    blocks: Mapping[str, tuple[Cidr, ...]]
    ports: Mapping[str, tuple[int, ...]]
    l7: bool

    @property
    def empty(self) -> bool:
        return not (self.strings or self.accounts or self.blocks or self.ports)


@dataclass(frozen=True)
class Rule:
    """Clauses that must all hold; each holds when one of its tests does."""

    clauses: tuple[tuple[Test, ...], ...]


@dataclass(frozen=True, eq=False)
class AuthorizationPolicy:
    """`for_waypoint`: it has targetRefs, so nodes don't enforce it."""

    meta: Meta
    selector: Mapping[str, str]
    for_waypoint: bool
    deny: bool
    audit: bool
    rules: tuple[Rule, ...]
    dry_run: bool


@dataclass(frozen=True, eq=False)
class RefusedPolicy:
    """A policy that can't be read and has no last good version: it denies within its scope."""

    meta: Meta
    selector: Mapping[str, str]


@dataclass(frozen=True)
class Listener:
    """`routes_from`: Same, All or Selector (then by the namespace's labels)."""

    port: int
    protocol: str
    routes_from: str
    selector: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Gateway:
    meta: Meta
    class_name: str
    addresses: tuple[Ip | str, ...]
    listeners: tuple[Listener, ...]


Object: TypeAlias = (
    Namespace
    | Node
    | GatewayClass
    | Pod
    | Service
    | EndpointSlice
    | WorkloadEntry
    | ServiceEntry
    | PeerAuthentication
    | AuthorizationPolicy
    | RefusedPolicy
    | Gateway
)


def selects(selector: Mapping[str, str], labels: frozenset[tuple[str, str]]) -> bool:
    """An empty selector selects everything; who means nothing by it asks before."""
    return labels.issuperset(selector.items())
