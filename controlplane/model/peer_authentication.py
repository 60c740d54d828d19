"""PeerAuthentication to policies that deny plaintext peers (facts istio-ambient 6.7)."""

from collections.abc import Iterable
from dataclasses import dataclass

from controlplane.model.authorization import string_match
from controlplane.sources.objects import Mode, PeerAuthentication, selects
from proto.gen import authorization_pb2 as wire

STATIC_STRICT = "istio_converted_static_strict"
_CONVERTED = "converted_peer_authentication_"


@dataclass(frozen=True)
class _Converted:
    strict: bool
    policy: wire.Authorization | None


class PeerAuthentications:
    """All of one world: the policies they make, and which of them a workload lists."""

    def __init__(self, found: Iterable[PeerAuthentication], root_namespace: str) -> None:
        self._root = root_namespace
        self._namespace_wide: dict[str, PeerAuthentication] = {}
        self._selecting: dict[str, list[PeerAuthentication]] = {}
        # Of several on one level the oldest counts.
        self._all = sorted(found, key=lambda pa: pa.meta.age)
        for pa in self._all:
            if pa.selector:
                self._selecting.setdefault(pa.meta.namespace, []).append(pa)
            else:
                self._namespace_wide.setdefault(pa.meta.namespace, pa)
        self._converted = {
            pa.meta.key: self._convert(pa) for group in self._selecting.values() for pa in group
        }

    def policies(self) -> dict[str, wire.Authorization]:
        if not self._all:
            return {}
        made = {f"{self._root}/{STATIC_STRICT}": _static_strict(self._root)}
        for converted in self._converted.values():
            if converted.policy is not None:
                policy = converted.policy
                made[f"{policy.namespace}/{policy.name}"] = policy
        return made

    def listed(self, namespace: str, labels: frozenset[tuple[str, str]]) -> tuple[str, ...]:
        """Names of the policies that a workload with these labels lists."""
        for pa in self._selecting.get(namespace, ()):
            if selects(pa.selector, labels):
                converted = self._converted[pa.meta.key]
                if converted.policy is not None:
                    return (f"{converted.policy.namespace}/{converted.policy.name}",)
                return self._strict_name() if converted.strict else ()
        return self._strict_name() if self._inherited(namespace) is Mode.STRICT else ()

    def _strict_name(self) -> tuple[str, ...]:
        return (f"{self._root}/{STATIC_STRICT}",)

    def _inherited(self, namespace: str) -> Mode:
        for where in (namespace, self._root):
            pa = self._namespace_wide.get(where)
            if pa is not None and pa.mode is not Mode.UNSET:
                return pa.mode
        return Mode.PERMISSIVE

    def _convert(self, pa: PeerAuthentication) -> _Converted:
        """Ports differ from the workload's own mode only where they say something else."""
        base = pa.mode if pa.mode is not Mode.UNSET else self._inherited(pa.meta.namespace)
        strict = base is Mode.STRICT
        open_modes = (Mode.PERMISSIVE, Mode.DISABLE)
        opened = sorted(port for port, mode in pa.ports.items() if mode in open_modes)
        closed = sorted(port for port, mode in pa.ports.items() if mode is Mode.STRICT)
        match = _no_peer()
        if strict and opened:
            match.not_destination_ports.extend(opened)
        elif not strict and closed:
            match.destination_ports.extend(closed)
        else:
            return _Converted(strict, None)
        return _Converted(strict, _deny(_CONVERTED + pa.meta.name, pa.meta.namespace, match))


def _static_strict(root_namespace: str) -> wire.Authorization:
    return _deny(STATIC_STRICT, root_namespace, _no_peer())


def _no_peer() -> wire.Match:
    """True when the peer has shown no identity."""
    return wire.Match(not_principals=[string_match("*")])


def _deny(name: str, namespace: str, match: wire.Match) -> wire.Authorization:
    return wire.Authorization(
        name=name,
        namespace=namespace,
        scope=wire.Scope.WORKLOAD_SELECTOR,
        action=wire.Action.DENY,
        rules=[wire.Rule(clauses=[wire.Clause(matches=[match])])],
    )
