"""AuthorizationPolicy, read so that nothing a node can't evaluate widens what is allowed.

Facts istio-ambient 6.8. Unknown fields are errors: a misspelt restriction would restrict nothing.
"""

from collections.abc import Mapping

from controlplane.sources.fields import Cidr, Field, is_digits
from controlplane.sources.meta import match_labels, meta
from controlplane.sources.objects import AuthorizationPolicy, Rule, Test

_STRINGS = {
    "principals": "principals",
    "notPrincipals": "not_principals",
    "namespaces": "namespaces",
    "notNamespaces": "not_namespaces",
}
_ACCOUNTS = {"serviceAccounts": "service_accounts", "notServiceAccounts": "not_service_accounts"}
_BLOCKS = {"ipBlocks": "source_ips", "notIpBlocks": "not_source_ips"}
_DOMAINS = {"trustDomains": "principals", "notTrustDomains": "not_principals"}
_SOURCE_L7 = (
    "requestPrincipals",
    "notRequestPrincipals",
    "remoteIpBlocks",
    "notRemoteIpBlocks",
)
_PORTS = {"ports": "destination_ports", "notPorts": "not_destination_ports"}
_OPERATION_L7 = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")
_WHEN = {
    "source.ip": "ipBlocks",
    "source.namespace": "namespaces",
    "source.principal": "principals",
    "source.serviceAccount": "serviceAccounts",
    "source.trustDomain": "trustDomains",
    "destination.port": "ports",
    "destination.ip": "destination",
}
_WHEN_L7 = ("request.", "connection.sni", "remote.ip", "experimental.")
_SPIFFE = "spiffe://"


def authorization_policy(document: Field) -> AuthorizationPolicy:
    document.only("apiVersion", "kind", "metadata", "spec", "status")
    about = meta(document, "AuthorizationPolicy")
    spec = document.get("spec")
    if spec is None:
        # An empty spec is ALLOW without rules in the whole namespace: nothing is allowed.
        return AuthorizationPolicy(about, {}, False, False, False, (), _dry_run(document))
    spec.only("selector", "targetRef", "targetRefs", "action", "rules", "provider")
    targets = _targets(spec)
    if len(targets) > 1:
        raise spec.fail(f"{' and '.join(targets)} exclude each other: keep one")
    for_waypoint = bool(targets) and targets[0] != "selector"
    action_field = spec.get("action")
    action = action_field.choice("ALLOW", "DENY", "AUDIT", "CUSTOM") if action_field else "ALLOW"
    if action == "CUSTOM" and action_field and not for_waypoint:
        raise action_field.fail(
            "CUSTOM asks an external authorizer, which nodes can't: attach it to a waypoint with "
            "targetRefs"
        )
    rules_field = spec.get("rules")
    deny = action == "DENY"
    if deny and not (rules_field and rules_field.items()):
        raise spec.fail_at(
            "rules", "is missing: a DENY without rules would do nothing; [{}] denies all"
        )
    rules: list[Rule] = []
    if not for_waypoint:
        for field in rules_field.items() if rules_field else ():
            rule = _rule(field, about.namespace, deny=deny)
            if rule is not None:
                rules.append(rule)
    return AuthorizationPolicy(
        meta=about,
        selector=match_labels(spec, "selector"),
        for_waypoint=for_waypoint,
        deny=deny,
        audit=action == "AUDIT",
        rules=tuple(rules),
        dry_run=_dry_run(document),
    )


def _targets(spec: Field) -> list[str]:
    """Which ways of attaching are used; an empty list attaches to nothing else than none would."""
    found = [name for name in ("selector", "targetRef") if spec.get(name)]
    references = spec.get("targetRefs")
    return [*found, "targetRefs"] if references and references.items() else found


def _dry_run(document: Field) -> bool:
    annotations = document.at("metadata", "annotations")
    field = annotations.get("istio.io/dry-run") if annotations else None
    return field is not None and field.choice("true", "false") == "true"


def _rule(field: Field, namespace: str, *, deny: bool) -> Rule | None:
    """None for an ALLOW rule that needs a proxy for HTTP: not allowing is the strict reading."""
    field.only("from", "to", "when")
    clauses: list[tuple[Test, ...]] = []
    sources = field.get("from")
    if sources is not None:
        clauses.append(_alternatives(sources, "source", namespace))
    operations = field.get("to")
    if operations is not None:
        clauses.append(_alternatives(operations, "operation", namespace))
    conditions = field.get("when")
    for condition in conditions.items() if conditions else ():
        clauses.append((_condition(condition, namespace),))
    clauses = [clause for clause in clauses if clause]
    l7 = any(test.l7 for clause in clauses for test in clause)
    if l7 and not deny:
        return None
    # An alternative that only HTTP could test may hold, so its whole clause may: testing the
    # others alone would deny less than written.
    kept = [clause for clause in clauses if not any(test.empty for test in clause)]
    if clauses and not kept:
        raise field.fail(
            "this DENY rule tests HTTP only, which nodes can't see: attach the policy to a "
            "waypoint with targetRefs, or add a source or port that it may deny as a whole"
        )
    return Rule(tuple(kept))


def _alternatives(field: Field, name: str, namespace: str) -> tuple[Test, ...]:
    found: list[Test] = []
    for item in field.items():
        item.only(name)
        inner = item.require(name, "say what it must match")
        test = _source(inner, namespace) if name == "source" else _operation(inner)
        if test.empty and not test.l7:
            raise inner.fail("is empty: say what it must match, or leave the entry out")
        found.append(test)
    return tuple(found)


def _source(field: Field, namespace: str) -> Test:
    field.only(*_STRINGS, *_ACCOUNTS, *_BLOCKS, *_DOMAINS, *_SOURCE_L7)
    if any(field.get(n) for n in _ACCOUNTS) and any(field.get(n) for n in _STRINGS):
        raise field.fail("serviceAccounts exclude principals and namespaces: keep one kind")
    strings: dict[str, tuple[str, ...]] = {}
    for name, wire in _STRINGS.items():
        values = field.get(name)
        if values is not None:
            strings[wire] = _strings(values, principal="rincipals" in name)
    for name, wire in _DOMAINS.items():
        values = field.get(name)
        if values is not None:
            if wire == "principals" and wire in strings:
                raise values.fail(
                    "can't be combined with principals: write them into the principals"
                )
            strings[wire] = strings.get(wire, ()) + _domains(values)
    return Test(
        strings=strings,
        accounts={
            wire: _accounts(values, namespace)
            for name, wire in _ACCOUNTS.items()
            if (values := field.get(name))
        },
        blocks={
            wire: _cidrs(values) for name, wire in _BLOCKS.items() if (values := field.get(name))
        },
        ports={},
        l7=any(field.get(name) for name in _SOURCE_L7),
    )


def _operation(field: Field) -> Test:
    field.only(*_PORTS, *_OPERATION_L7)
    ports = {wire: _ports(values) for name, wire in _PORTS.items() if (values := field.get(name))}
    return Test({}, {}, {}, ports, any(field.get(name) for name in _OPERATION_L7))


def _condition(field: Field, namespace: str) -> Test:
    field.only("key", "values", "notValues")
    key_field = field.require("key", "name the attribute")
    key = key_field.filled()
    sides = [(side, values) for side in ("values", "notValues") if (values := field.get(side))]
    if not any(values.items() for _, values in sides):
        raise field.fail("needs values or notValues")
    if key not in _WHEN:
        if not key.startswith(_WHEN_L7):
            raise key_field.fail(f"{key!r} is unknown: known are {', '.join(_WHEN)} and request.*")
        return Test({}, {}, {}, {}, l7=True)
    strings: dict[str, tuple[str, ...]] = {}
    accounts: dict[str, tuple[tuple[str, str], ...]] = {}
    blocks: dict[str, tuple[Cidr, ...]] = {}
    ports: dict[str, tuple[int, ...]] = {}
    kind = _WHEN[key]
    for side, values in sides:
        prefix = "not_" if side == "notValues" else ""
        if kind == "ports":
            ports[f"{prefix}destination_ports"] = _ports(values)
        elif kind == "destination":
            blocks[f"{prefix}destination_ips"] = _cidrs(values)
        elif kind == "ipBlocks":
            blocks[f"{prefix}source_ips"] = _cidrs(values)
        elif kind == "serviceAccounts":
            accounts[f"{prefix}service_accounts"] = _accounts(values, namespace)
        elif kind == "trustDomains":
            strings[f"{prefix}principals"] = _domains(values)
        else:
            strings[f"{prefix}{kind}"] = _strings(values, principal=kind == "principals")
    return Test(strings, accounts, blocks, ports, l7=False)


def _strings(field: Field, *, principal: bool) -> tuple[str, ...]:
    values = _filled(field)
    # The wire's principals carry no scheme (facts ztunnel 5.3): with one they'd match nobody.
    return tuple(v.removeprefix(_SPIFFE) for v in values) if principal else values


def _domains(field: Field) -> tuple[str, ...]:
    """A trust domain is the principal's first segment, so it is a prefix of the principal."""
    found: list[str] = []
    for item in field.items():
        value = item.filled()
        if value == "*" or (value.endswith("*") and not value.startswith("*")):
            found.append(value)
        elif "*" in value:
            raise item.fail("a node can test the start of a trust domain only: write it out")
        else:
            found.append(f"{value}/*")
    if not found:
        raise field.fail("is empty: give a value or leave the field out")
    return tuple(found)


def _accounts(field: Field, namespace: str) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    for item in field.items():
        value = item.filled()
        where, slash, name = value.rpartition("/")
        if "*" in value or not name or (slash and not where) or "/" in where:
            raise item.fail(f"{value!r}: write namespace/account, or account for the own namespace")
        found.append((where or namespace, name))
    if not found:
        raise field.fail("is empty: give a value or leave the field out")
    return tuple(found)


def _cidrs(field: Field) -> tuple[Cidr, ...]:
    found = tuple(item.cidr() for item in field.items())
    if not found:
        raise field.fail("is empty: give a value or leave the field out")
    return found


def _ports(field: Field) -> tuple[int, ...]:
    found: list[int] = []
    for item in field.items():
        text = item.text()
        if not is_digits(text) or not 1 <= int(text) <= 65535:
            raise item.fail(f"{text!r} is not a port (1 to 65535)")
        found.append(int(text))
    if not found:
        raise field.fail("is empty: give a value or leave the field out")
    return tuple(found)


def _filled(field: Field) -> tuple[str, ...]:
    values = field.texts()
    if not values:
        raise field.fail("is empty: give a value or leave the field out")
    for item in field.items():
        if "*" in item.text().strip("*") or (item.text() != "*" and item.text().count("*") > 1):
            raise item.fail("one * is allowed, at the start or at the end")
    return values


def scope_of(document: Field) -> Mapping[str, str] | None:
    """The selector of a policy that is refused; None when it is a waypoint's business."""
    spec = document.get("spec")
    if spec is None:
        return {}
    if _targets(spec)[:1] in (["targetRef"], ["targetRefs"]):
        return None
    return match_labels(spec, "selector")
