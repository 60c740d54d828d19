"""Services, their addresses and their waypoints (facts istio-ambient 6.5, 6.6)."""

from collections.abc import Mapping
from ipaddress import ip_address, ip_network

import pytest

from controlplane.model.vips import Assigned, Ranges, assign
from proto.gen import workload_pb2
from tests.unit.controlplane.world import RANGES, pod, service, translate, workload

CART = "shop/cart.shop.svc.cluster.local"
Scope = workload_pb2.LoadBalancing.Scope
Mode = workload_pb2.LoadBalancing.Mode


def cart(spec: str = "", annotations: str = "", labels: str = "") -> str:
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: cart, namespace: shop, annotations: {{{annotations}}}, labels: {{{labels}}}}}
spec: {{ports: [{{name: http, port: 80, targetPort: 8080}}]{", " + spec if spec else ""}}}
---
"""


def ips(made: workload_pb2.Service) -> list[str]:
    return [str(ip_address(a.address)) for a in made.addresses]


def test_a_service_without_cluster_ip_gets_addresses_from_both_ranges() -> None:
    made = service(translate(cart()), CART)
    v4, v6 = ips(made)
    assert ip_address(v4) in ip_network("240.240.0.0/16")
    assert ip_address(v6) in ip_network("2001:2::/48")
    assert (made.hostname, made.canonical) == ("cart.shop.svc.cluster.local", True)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("clusterIP: 10.96.0.7", ["10.96.0.7"]),
        ('clusterIPs: [10.96.0.7, "fd00::7"]', ["10.96.0.7", "fd00::7"]),
        ("clusterIP: None", []),
    ],
)
def test_a_given_cluster_ip_is_kept_and_none_stays_headless(spec: str, expected: list[str]) -> None:
    assert ips(service(translate(cart(spec)), CART)) == expected


def test_ip_families_limit_the_assigned_addresses() -> None:
    made = service(translate(cart("ipFamilies: [IPv6]")), CART)
    assert len(ips(made)) == 1
    assert made.ip_families == workload_pb2.IPFamilies.IPV6_ONLY


def test_an_external_name_is_skipped() -> None:
    assert not translate(cart("type: ExternalName, externalName: example.com")).addresses


@pytest.mark.parametrize(
    ("spec", "annotations", "mode", "scopes"),
    [
        ("", "", Mode.UNSPECIFIED_MODE, []),
        ("internalTrafficPolicy: Local", "", Mode.STRICT, [Scope.NODE]),
        (
            "trafficDistribution: PreferClose",
            "",
            Mode.FAILOVER,
            [Scope.NETWORK, Scope.REGION, Scope.ZONE],
        ),
        (
            "",
            "networking.istio.io/traffic-distribution: PreferSameNode",
            Mode.FAILOVER,
            [Scope.NETWORK, Scope.REGION, Scope.ZONE, Scope.SUBZONE, Scope.NODE],
        ),
    ],
)
def test_traffic_policies_become_load_balancing(
    spec: str, annotations: str, mode: int, scopes: list[int]
) -> None:
    made = service(translate(cart(spec, annotations)), CART)
    assert made.load_balancing.mode == mode
    assert list(made.load_balancing.routing_preference) == scopes


def test_publish_not_ready_addresses_allows_unhealthy_endpoints() -> None:
    made = service(translate(cart("publishNotReadyAddresses: true")), CART)
    health = workload_pb2.LoadBalancing.HealthPolicy
    assert made.load_balancing.health_policy == health.ALLOW_ALL


def entry(spec: str, name: str = "pay", labels: str = "") -> str:
    return f"""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: shop, labels: {{{labels}}}}}
spec: {{ports: [{{number: 443, name: tls}}], {spec}}}
---
"""


def test_an_entry_without_resolution_passes_through_and_gets_no_address() -> None:
    made = service(translate(entry("hosts: [pay.example.com]")), "shop/pay.example.com")
    assert made.load_balancing.mode == Mode.PASSTHROUGH
    assert not made.addresses


def test_an_entry_keeps_ranges_and_opts_out_of_allocation() -> None:
    made = translate(
        entry("hosts: [a.example.com], addresses: [10.0.0.0/8]", "a")
        + entry(
            "hosts: [b.example.com], resolution: DNS",
            "b",
            "networking.istio.io/enable-autoallocate-ip: 'false'",
        )
        + entry("hosts: [c.example.com], resolution: DNS", "c")
    )
    assert service(made, "shop/a.example.com").addresses[0].length == 8
    assert not service(made, "shop/b.example.com").addresses
    assert len(service(made, "shop/c.example.com").addresses) == 2


def test_the_kubernetes_service_is_the_canonical_one_of_its_hostname() -> None:
    made = translate(
        cart()
        + entry("hosts: [cart.shop.svc.cluster.local], resolution: DNS").replace(
            "namespace: shop", "namespace: other"
        )
    )
    assert service(made, CART).canonical
    assert not service(made, "other/cart.shop.svc.cluster.local").canonical


def test_vips_are_stable_whatever_else_exists() -> None:
    def found(names: list[str], before: Mapping[str, Assigned]) -> Mapping[str, Assigned]:
        return assign(names, frozenset(), before, RANGES).vips

    alone = found(["shop/a"], {})
    among = found([f"shop/{i}" for i in range(100)] + ["shop/a"], alone)
    assert among["shop/a"] == alone["shop/a"]
    assert found([], among)["shop/a"] == alone["shop/a"]


def test_colliding_vips_probe_on_until_the_range_is_full() -> None:
    small = Ranges(ip_network("10.0.0.0/29"), None)  # type: ignore[arg-type]
    found = assign([str(i) for i in range(6)], frozenset(), {}, small)
    assert len({v4 for v4, _ in found.vips.values()}) == 6
    assert not found.problems
    more = assign([str(i) for i in range(7)], frozenset(), found.vips, small)
    assert more.vips == {**found.vips, "6": (None, None)}
    assert more.problems == ("10.0.0.0/29 has no free address for 6: give a larger --vip-range",)


def test_a_vip_moves_when_its_address_is_given_away_by_hand() -> None:
    before = assign(["shop/a"], frozenset(), {}, RANGES).vips
    v4 = before["shop/a"][0]
    assert v4 is not None
    assert assign(["shop/a"], frozenset({v4}), before, RANGES).vips["shop/a"][0] != v4


def waypoint(
    serves: str = "", namespace: str = "shop", listeners: str = "", addresses: str = "wp.example"
) -> str:
    label = f"labels: {{istio.io/waypoint-for: {serves}}}" if serves else "labels: {}"
    return f"""
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: wp, namespace: {namespace}, {label}}}
spec: {{gatewayClassName: istio-waypoint, listeners: [{listeners}]}}
status: {{addresses: [{{value: {addresses}}}]}}
---
"""


USE = "istio.io/use-waypoint: wp"
POD = "Kubernetes//Pod/shop/cart"


@pytest.mark.parametrize(
    ("serves", "to_service", "to_workload"),
    [
        ("", True, False),
        ("service", True, False),
        ("workload", False, True),
        ("all", True, True),
        ("none", False, False),
    ],
)
def test_a_waypoint_binds_what_it_serves(serves: str, to_service: bool, to_workload: bool) -> None:
    made = translate(waypoint(serves) + cart(labels=USE) + pod("cart", labels=USE))
    assert service(made, CART).HasField("waypoint") is to_service
    assert workload(made, POD).HasField("waypoint") is to_workload


def test_a_waypoint_is_reached_by_hostname_or_address_on_15008() -> None:
    by_name = service(translate(waypoint() + cart(labels=USE)), CART).waypoint
    assert by_name.hostname.hostname == "wp.example"
    assert (by_name.hostname.namespace, by_name.hbone_mtls_port) == ("shop", 15008)
    by_ip = service(translate(waypoint(addresses="10.1.1.1") + cart(labels=USE)), CART).waypoint
    assert by_ip.address.address == ip_address("10.1.1.1").packed


def test_a_waypoint_is_not_its_own_waypoint() -> None:
    name = "cart.shop.svc.cluster.local"
    assert not service(translate(waypoint(addresses=name) + cart(labels=USE)), CART).HasField(
        "waypoint"
    )
    by_ip = cart("clusterIP: 10.1.1.1", labels=USE)
    assert not service(translate(waypoint(addresses="10.1.1.1") + by_ip), CART).HasField("waypoint")
    instance = pod("cart", labels=f"{USE}, gateway.networking.k8s.io/gateway-name: wp")
    assert not workload(translate(waypoint("all") + instance), POD).HasField("waypoint")


def test_a_canary_splits_by_weight() -> None:
    other = waypoint().replace("name: wp,", "name: wp2,").replace("wp.example", "wp2.example")
    text = cart(
        labels=f"{USE}, istio.io/use-waypoint-canary: wp2",
        annotations="istio.io/use-waypoint-canary-weight: '20'",
    )
    made = service(translate(waypoint() + other + text), CART)
    found = [(w.destination.hostname.hostname, w.weight) for w in made.weighted_waypoints]
    assert found == [("wp.example", 80), ("wp2.example", 20)]


def test_an_application_tunnel_is_told_of_the_waypoints_pods() -> None:
    gateway = waypoint().replace(
        "labels: {}", "annotations: {ambient.istio.io/waypoint-inbound-binding: PROXY/15088}"
    )
    instance = pod("cart", labels="gateway.networking.k8s.io/gateway-name: wp")
    tunnel = workload(translate(gateway + instance), POD).application_tunnel
    assert (tunnel.protocol, tunnel.port) == (workload_pb2.ApplicationTunnel.Protocol.PROXY, 15088)


def test_none_opts_out_of_the_namespaces_waypoint() -> None:
    namespace = f"""
apiVersion: v1
kind: Namespace
metadata: {{name: shop, labels: {{{USE}}}}}
---
"""
    assert service(translate(namespace + waypoint() + cart()), CART).HasField("waypoint")
    opted_out = cart(labels="istio.io/use-waypoint: none")
    assert not service(translate(namespace + waypoint() + opted_out), CART).HasField("waypoint")


@pytest.mark.parametrize(
    ("listeners", "bound"),
    [
        ("", False),
        ("{name: m, port: 15008, protocol: HBONE}", False),
        (
            "{name: m, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: All}}}",
            True,
        ),
    ],
)
def test_another_namespaces_waypoint_must_admit(listeners: str, bound: bool) -> None:
    made = translate(
        waypoint(namespace="infra", listeners=listeners)
        + cart(labels=f"{USE}, istio.io/use-waypoint-namespace: infra")
    )
    assert service(made, CART).HasField("waypoint") is bound
    assert bool(made.notices) is not bound


def test_a_missing_waypoint_is_told() -> None:
    made = translate(cart(labels=USE))
    assert made.notices == (
        "Service shop/cart: waypoint shop/wp doesn't exist: traffic goes direct",
    )
