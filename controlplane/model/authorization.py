"""AuthorizationPolicy to the wire's Authorization (facts istio-ambient 6.8)."""

from collections.abc import Iterable

from google.protobuf import empty_pb2

from controlplane.sources.fields import Cidr
from controlplane.sources.objects import AuthorizationPolicy, RefusedPolicy, Rule, Test
from proto.gen import authorization_pb2 as wire


def published(policy: AuthorizationPolicy | RefusedPolicy) -> bool:
    """Waypoints' policies aren't the nodes' business; AUDIT decides nothing."""
    return isinstance(policy, RefusedPolicy) or not (policy.for_waypoint or policy.audit)


def authorization(
    policy: AuthorizationPolicy | RefusedPolicy, root_namespace: str
) -> wire.Authorization:
    """A refused policy becomes a DENY of everything within its scope."""
    meta = policy.meta
    made = wire.Authorization(
        name=meta.name,
        namespace=meta.namespace,
        scope=_scope(policy, root_namespace),
    )
    if isinstance(policy, RefusedPolicy):
        made.action = wire.Action.DENY
        made.rules.append(wire.Rule())
        return made
    made.action = wire.Action.DENY if policy.deny else wire.Action.ALLOW
    made.dry_run = policy.dry_run
    made.rules.extend(_rule(rule) for rule in policy.rules)
    return made


def _scope(policy: AuthorizationPolicy | RefusedPolicy, root_namespace: str) -> wire.Scope:
    if policy.selector:
        return wire.Scope.WORKLOAD_SELECTOR
    if policy.meta.namespace == root_namespace:
        return wire.Scope.GLOBAL
    return wire.Scope.NAMESPACE


def _rule(rule: Rule) -> wire.Rule:
    return wire.Rule(
        clauses=[
            wire.Clause(matches=[_match(test) for test in tests if not test.empty])
            for tests in rule.clauses
        ]
    )


def _match(test: Test) -> wire.Match:
    made = wire.Match()
    for name, values in test.strings.items():
        getattr(made, name).extend(string_match(value) for value in values)
    for name, accounts in test.accounts.items():
        getattr(made, name).extend(
            wire.ServiceAccountMatch(namespace=namespace, serviceAccount=account)
            for namespace, account in accounts
        )
    for name, blocks in test.blocks.items():
        getattr(made, name).extend(_addresses(blocks))
    for name, ports in test.ports.items():
        getattr(made, name).extend(ports)
    return made


def string_match(value: str) -> wire.StringMatch:
    if value == "*":
        return wire.StringMatch(presence=empty_pb2.Empty())
    if value.startswith("*"):
        return wire.StringMatch(suffix=value[1:])
    if value.endswith("*"):
        return wire.StringMatch(prefix=value[:-1])
    return wire.StringMatch(exact=value)


def _addresses(blocks: Iterable[Cidr]) -> list[wire.Address]:
    return [
        wire.Address(address=block.network_address.packed, length=block.prefixlen)
        for block in blocks
    ]
