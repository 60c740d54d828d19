"""Policies as nodes enforce them (facts istio-ambient 6.7, 6.8)."""

import pytest

from controlplane.sources.fields import FieldError
from proto.gen import authorization_pb2 as wire
from tests.unit.controlplane.world import objects, pod, policy, translate, workload

CART = "Kubernetes//Pod/shop/cart"
STATIC = "istio-system/istio_converted_static_strict"


def authorization(
    rules: str, action: str = "ALLOW", *, namespace: str = "shop", extra: str = ""
) -> str:
    return f"""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: p, namespace: {namespace}}}
spec: {{action: {action}, {extra + ", " if extra else ""}rules: {rules}}}
---
"""


def matches(rules: str, action: str = "ALLOW") -> list[list[list[wire.Match]]]:
    made = policy(translate(authorization(rules, action)), "shop/p")
    return [[list(clause.matches) for clause in rule.clauses] for rule in made.rules]


@pytest.mark.parametrize(
    ("namespace", "extra", "scope"),
    [
        ("shop", "", wire.Scope.NAMESPACE),
        ("istio-system", "", wire.Scope.GLOBAL),
        ("shop", "selector: {matchLabels: {app: cart}}", wire.Scope.WORKLOAD_SELECTOR),
        ("shop", "selector: {matchLabels: {}}", wire.Scope.NAMESPACE),
    ],
)
def test_scope_follows_selector_and_namespace(namespace: str, extra: str, scope: int) -> None:
    made = translate(authorization("[{}]", namespace=namespace, extra=extra))
    assert policy(made, f"{namespace}/p").scope == scope


@pytest.mark.parametrize(
    ("namespace", "listed"), [("shop", True), ("istio-system", True), ("other", False)]
)
def test_selected_workloads_list_the_policy(namespace: str, listed: bool) -> None:
    text = authorization(
        "[{}]", namespace=namespace, extra="selector: {matchLabels: {app: cart}}"
    ) + pod("cart", labels="app: cart")
    names = workload(translate(text), CART).authorization_policies
    assert list(names) == ([f"{namespace}/p"] if listed else [])


def test_waypoint_and_audit_policies_are_not_published() -> None:
    to_waypoint = "targetRefs: [{kind: Gateway, name: wp}]"
    assert not translate(authorization("[{}]", extra=to_waypoint)).authorizations
    assert not translate(authorization("[{}]", "AUDIT")).authorizations


def test_empty_target_refs_leave_the_policy_to_the_nodes() -> None:
    assert translate(authorization("[{}]", extra="targetRefs: []")).authorizations


def test_an_allow_without_rules_keeps_no_rule() -> None:
    made = policy(translate(authorization("[]")), "shop/p")
    assert made.action == wire.Action.ALLOW
    assert not made.rules


def test_a_rule_becomes_clauses_of_alternatives() -> None:
    [[sources, operations, when]] = matches("""[{
      from: [
        {source: {principals: [cluster.local/ns/shop/sa/web, 'cluster.local/*', '*/sa/x', '*']}},
        {source: {namespaces: [a], notIpBlocks: [10.0.0.0/8]}}],
      to: [{operation: {ports: ['8080', '9090']}}],
      when: [{key: source.ip, values: [192.0.2.1], notValues: [192.0.2.2]}]}]""")
    kinds = [string.WhichOneof("match_type") for string in sources[0].principals]
    assert kinds == ["exact", "prefix", "suffix", "presence"]
    assert sources[0].principals[1].prefix == "cluster.local/"
    assert sources[0].principals[2].suffix == "/sa/x"
    assert sources[1].namespaces[0].exact == "a"
    assert sources[1].not_source_ips[0].length == 8
    assert list(operations[0].destination_ports) == [8080, 9090]
    assert (when[0].source_ips[0].length, when[0].not_source_ips[0].length) == (32, 32)


def test_accounts_without_a_namespace_are_of_the_policys_own() -> None:
    [[[match]]] = matches("[{from: [{source: {serviceAccounts: [web, other/admin]}}]}]")
    found = [(a.namespace, a.serviceAccount) for a in match.service_accounts]
    assert found == [("shop", "web"), ("other", "admin")]


@pytest.mark.parametrize(("value", "prefix"), [("td.example", "td.example/"), ("td*", "td")])
def test_trust_domains_are_tested_as_the_start_of_the_principal(value: str, prefix: str) -> None:
    [[[match]]] = matches(
        f"[{{from: [{{source: {{namespaces: [a], trustDomains: ['{value}']}}}}]}}]"
    )
    assert match.principals[0].prefix == prefix
    assert match.namespaces[0].exact == "a"


def test_an_allow_rule_that_tests_http_is_removed_and_the_policy_stays() -> None:
    rules = "[{to: [{operation: {methods: [GET], ports: ['80']}}]}]"
    made = policy(translate(authorization(rules)), "shop/p")
    assert not made.rules


def test_a_deny_that_tests_http_too_denies_by_the_rest() -> None:
    [[ports]] = matches("[{to: [{operation: {methods: [GET], ports: ['80']}}]}]", "DENY")
    assert list(ports[0].destination_ports) == [80]


def test_a_deny_clause_with_an_http_only_alternative_is_not_narrowed_to_the_other() -> None:
    rules = """[{from: [{source: {namespaces: [a]}}],
                to: [{operation: {ports: ['80']}}, {operation: {methods: [GET]}}]}]"""
    [clauses] = matches(rules, "DENY")
    assert len(clauses) == 1
    assert clauses[0][0].namespaces[0].exact == "a"


@pytest.mark.parametrize(
    ("rules", "action", "field"),
    [
        ("[{to: [{operation: {methods: [GET]}}]}]", "DENY", "spec.rules[0]"),
        ("[]", "DENY", "spec.rules"),
        ("[{}]", "CUSTOM", "spec.action"),
        ("[{}]", "FORBID", "spec.action"),
        ("[{from: [{source: {}}]}]", "ALLOW", "spec.rules[0].from[0].source"),
        ("[{from: [{source: {principal: [a]}}]}]", "ALLOW",
         "spec.rules[0].from[0].source.principal"),
        ("[{form: []}]", "ALLOW", "spec.rules[0].form"),
        ("[{from: [{source: {ipBlocks: [10.0.0.0/99]}}]}]", "ALLOW",
         "spec.rules[0].from[0].source.ipBlocks[0]"),
        ("[{from: [{source: {principals: ['a*b']}}]}]", "ALLOW",
         "spec.rules[0].from[0].source.principals[0]"),
        ("[{from: [{source: {principals: []}}]}]", "ALLOW",
         "spec.rules[0].from[0].source.principals"),
        ("[{from: [{source: {namespaces: ['']}}]}]", "ALLOW",
         "spec.rules[0].from[0].source.namespaces[0]"),
        ("[{from: [{source: {trustDomains: ['*.x']}}]}]", "ALLOW",
         "spec.rules[0].from[0].source.trustDomains[0]"),
        ("[{from: [{source: {principals: [a], trustDomains: [x]}}]}]", "ALLOW",
         "spec.rules[0].from[0].source.trustDomains"),
        ("[{from: [{source: {principals: [a], serviceAccounts: [x]}}]}]", "ALLOW",
         "spec.rules[0].from[0].source"),
        ("[{to: [{operation: {ports: [80]}}]}]", "ALLOW",
         "spec.rules[0].to[0].operation.ports[0]"),
        ("[{to: [{operation: {ports: ['²']}}]}]", "ALLOW",
         "spec.rules[0].to[0].operation.ports[0]"),
        ("[{to: [{operation: {ports: ['70000']}}]}]", "ALLOW",
         "spec.rules[0].to[0].operation.ports[0]"),
        ("[{when: [{key: source.colour, values: [red]}]}]", "ALLOW", "spec.rules[0].when[0].key"),
        ("[{when: [{key: source.ip}]}]", "ALLOW", "spec.rules[0].when[0]"),
    ],
)  # fmt: skip
def test_what_would_widen_or_do_nothing_is_refused(rules: str, action: str, field: str) -> None:
    with pytest.raises(FieldError) as caught:
        objects(authorization(rules, action))
    assert caught.value.path == field


def test_dry_run_is_passed_on() -> None:
    text = authorization("[{}]").replace(
        "namespace: shop}", "namespace: shop, annotations: {istio.io/dry-run: 'true'}}"
    )
    assert policy(translate(text), "shop/p").dry_run


def peer(name: str, spec: str, namespace: str = "shop", created: str = "") -> str:
    stamp = f", creationTimestamp: '{created}'" if created else ""
    return f"""
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: {name}, namespace: {namespace}{stamp}}}
spec: {{{spec}}}
---
"""


POD = pod("cart", labels="app: cart")
SELECT = "selector: {matchLabels: {app: cart}}"


@pytest.mark.parametrize(
    ("peers", "listed"),
    [
        ("", []),
        (peer("m", "mtls: {mode: PERMISSIVE}"), []),
        (peer("m", "mtls: {mode: STRICT}"), [STATIC]),
        (peer("m", "mtls: {mode: STRICT}", "istio-system"), [STATIC]),
        (peer("m", "mtls: {mode: STRICT}", "other"), []),
        (
            peer("m", "mtls: {mode: STRICT}", "istio-system") + peer("n", "mtls: {mode: DISABLE}"),
            [],
        ),
        (
            peer("n", "mtls: {mode: STRICT}")
            + peer("w", f"{SELECT}, mtls: {{mode: PERMISSIVE}}"),
            [],
        ),
        (
            peer("n", "mtls: {mode: STRICT}") + peer("w", f"{SELECT}, mtls: {{mode: UNSET}}"),
            [STATIC],
        ),
        (
            peer("young", "mtls: {mode: STRICT}", created="2026-02-01T00:00:00Z")
            + peer("zold", "mtls: {mode: PERMISSIVE}", created="2026-01-01T00:00:00Z"),
            [],
        ),
    ],
)  # fmt: skip
def test_effective_mode_decides_whether_the_strict_policy_is_listed(
    peers: str, listed: list[str]
) -> None:
    made = translate(peers + POD)
    assert list(workload(made, CART).authorization_policies) == listed
    assert (STATIC in made.authorizations) is bool(peers)


def test_the_strict_policy_denies_peers_without_identity() -> None:
    made = policy(translate(peer("m", "mtls: {mode: STRICT}")), STATIC)
    assert (made.action, made.scope) == (wire.Action.DENY, wire.Scope.WORKLOAD_SELECTOR)
    [match] = made.rules[0].clauses[0].matches
    assert match.not_principals[0].WhichOneof("match_type") == "presence"


@pytest.mark.parametrize(
    ("parent", "own", "ports", "expected"),
    [
        ("PERMISSIVE", "UNSET", "8080: {mode: STRICT}", ("destination_ports", [8080])),
        ("STRICT", "UNSET", "8080: {mode: DISABLE}", ("not_destination_ports", [8080])),
        ("STRICT", "UNSET", "8080: {mode: PERMISSIVE}", ("not_destination_ports", [8080])),
        ("PERMISSIVE", "STRICT", "8080: {mode: DISABLE}", ("not_destination_ports", [8080])),
    ],
)
def test_port_levels_become_a_policy_of_their_own_that_is_listed(
    parent: str, own: str, ports: str, expected: tuple[str, list[int]]
) -> None:
    made = translate(
        peer("n", f"mtls: {{mode: {parent}}}")
        + peer("w", f"{SELECT}, mtls: {{mode: {own}}}, portLevelMtls: {{{ports}}}")
        + POD
    )
    name = "shop/converted_peer_authentication_w"
    assert list(workload(made, CART).authorization_policies) == [name]
    [match] = policy(made, name).rules[0].clauses[0].matches
    assert list(getattr(match, expected[0])) == expected[1]
    assert match.not_principals[0].HasField("presence")


def test_port_levels_need_a_selector() -> None:
    with pytest.raises(FieldError, match="needs a selector"):
        objects(peer("w", "portLevelMtls: {8080: {mode: STRICT}}"))
