"""Pods, entries and slices as nodes are told of them (facts istio-ambient 6.2 to 6.4)."""

from ipaddress import ip_address

import pytest

from proto.gen import workload_pb2
from tests.unit.controlplane.world import pod, translate, workload

AMBIENT = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
"""
PLAIN = AMBIENT.replace(", labels: {istio.io/dataplane-mode: ambient}", "")
CART = "Kubernetes//Pod/shop/cart"


@pytest.mark.parametrize(
    ("namespace", "labels", "spec", "hbone"),
    [
        (AMBIENT, "", "", True),
        (PLAIN, "", "", False),
        ("", "", "", False),
        (PLAIN, "istio.io/dataplane-mode: ambient", "", True),
        (AMBIENT, "istio.io/dataplane-mode: none", "", False),
        (AMBIENT, "", "hostNetwork: true", False),
        (PLAIN, "networking.istio.io/tunnel: http", "", True),
    ],
)
def test_ambient_pods_are_published_as_hbone(
    namespace: str, labels: str, spec: str, hbone: bool
) -> None:
    made = workload(translate(namespace + pod("cart", labels=labels, spec=spec)), CART)
    wanted = workload_pb2.TunnelProtocol.HBONE if hbone else workload_pb2.TunnelProtocol.NONE
    assert made.tunnel_protocol == wanted


def test_a_pod_carries_identity_place_and_canonical_name() -> None:
    text = (
        pod("cart", labels="app: trolley, version: v2", account="seller")
        + """
apiVersion: v1
kind: Node
metadata:
  name: n1
  labels: {topology.kubernetes.io/region: eu, topology.kubernetes.io/zone: eu-1}
"""
    )
    made = workload(translate(text), CART)
    assert (made.uid, made.name, made.namespace) == (CART, "cart", "shop")
    assert made.service_account == "seller"
    assert (made.canonical_name, made.canonical_revision) == ("trolley", "v2")
    assert (made.node, made.locality.region, made.locality.zone) == ("n1", "eu", "eu-1")
    assert list(made.addresses) == [ip_address("10.0.1.5").packed]
    assert made.workload_type == workload_pb2.WorkloadType.POD
    assert made.trust_domain == ""


def test_a_deployment_gives_its_pods_their_workload_name() -> None:
    text = """
apiVersion: v1
kind: Pod
metadata:
  name: cart-5d6f-abcde
  namespace: shop
  uid: u
  labels: {pod-template-hash: 5d6f}
  ownerReferences: [{kind: ReplicaSet, name: cart-5d6f, controller: true}]
spec: {nodeName: n1}
status: {podIPs: [{ip: 10.0.1.5}, {ip: "fd00::5"}]}
"""
    made = workload(translate(text), "Kubernetes//Pod/shop/cart-5d6f-abcde")
    assert made.workload_name == "cart"
    assert made.canonical_name == "cart"
    assert made.service_account == "default"
    assert len(made.addresses) == 2


@pytest.mark.parametrize(
    ("status", "healthy"),
    [
        ("", True),
        (", conditions: [{type: Ready, status: 'False'}]", False),
        (", conditions: [{type: Ready, status: 'True'}]", True),
    ],
)
def test_a_pod_that_is_not_ready_is_unhealthy(status: str, healthy: bool) -> None:
    text = pod("cart").replace("}]}", "}]" + status + "}")
    made = workload(translate(text), CART)
    assert (made.status == workload_pb2.WorkloadStatus.HEALTHY) is healthy


def test_a_finished_pod_is_not_published() -> None:
    text = pod("cart").replace("status: {", "status: {phase: Succeeded, ")
    made = translate(text)
    assert not made.addresses
    assert not made.accounts


def test_named_target_ports_are_resolved_per_pod_and_a_missing_name_drops_the_port() -> None:
    text = (
        pod(
            "cart",
            labels="app: cart",
            spec="containers: [{name: c, ports: [{name: web, containerPort: 8080}]}]",
        )
        + """
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  selector: {app: cart}
  ports:
  - {name: http, port: 80, targetPort: web}
  - {name: admin, port: 81, targetPort: nowhere}
  - {name: raw, port: 82}
  - {name: dns, port: 53, protocol: UDP}
"""
    )
    made = workload(translate(text), CART)
    ports = made.services["shop/cart.shop.svc.cluster.local"].ports
    assert [(p.service_port, p.target_port) for p in ports] == [(80, 8080), (82, 82)]


def test_selectors_reach_pods_of_their_own_namespace_only() -> None:
    text = (
        pod("cart", namespace="other", labels="app: cart")
        + """
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {selector: {app: cart}, ports: [{port: 80}]}
"""
    )
    assert not workload(translate(text), "Kubernetes//Pod/other/cart").services


SLICE = """
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {ports: [{name: sql, port: 5432}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
ports: [{name: sql, port: 15432}, {name: other, port: 1}]
endpoints:
- addresses: [10.9.9.9]
  conditions: {ready: false}
- addresses: [10.0.1.5]
  targetRef: {kind: Pod, name: cart, namespace: shop}
---
"""


def test_a_slice_endpoint_without_a_pod_is_a_workload_without_account() -> None:
    made = workload(
        translate(SLICE + pod("cart")),
        "Kubernetes/discovery.k8s.io/EndpointSlice/shop/db-1/10.9.9.9",
    )
    assert made.service_account == ""
    assert made.network_mode == workload_pb2.NetworkMode.HOST_NETWORK
    assert made.status == workload_pb2.WorkloadStatus.UNHEALTHY
    ports = made.services["shop/db.shop.svc.cluster.local"].ports
    assert [(p.service_port, p.target_port) for p in ports] == [(5432, 15432)]


def test_a_slice_endpoint_with_a_pod_joins_the_pod_to_the_service() -> None:
    made = translate(SLICE + pod("cart"))
    ports = workload(made, CART).services["shop/db.shop.svc.cluster.local"].ports
    assert [(p.service_port, p.target_port) for p in ports] == [(5432, 15432)]
    assert len(made.addresses) == 3


def test_a_workload_entry_joins_a_service_entry_by_label() -> None:
    made = translate("""
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm, namespace: shop}
spec:
  address: 10.7.0.1
  labels: {app: legacy}
  serviceAccount: vm
  weight: 3
  locality: eu/eu-1/rack
  ports: {http: 9000}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: legacy, namespace: shop}
spec:
  hosts: [legacy.example.com]
  resolution: STATIC
  workloadSelector: {labels: {app: legacy}}
  ports: [{number: 80, name: http, protocol: HTTP}]
""")
    vm = workload(made, "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm")
    assert (vm.service_account, vm.capacity.value, vm.locality.subzone) == ("vm", 3, "rack")
    port = vm.services["shop/legacy.example.com"].ports[0]
    assert (port.service_port, port.target_port) == (80, 9000)


def test_inline_endpoints_and_dns_hosts_become_workloads() -> None:
    made = translate("""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: pay, namespace: shop}
spec:
  hosts: [pay.example.com]
  resolution: STATIC
  endpoints: [{address: 192.0.2.1, ports: {tls: 8443}}]
  ports: [{number: 443, name: tls, protocol: TLS}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: map, namespace: shop}
spec:
  hosts: [map.example.com]
  resolution: DNS
  ports: [{number: 443, name: tls}]
""")
    base = "Kubernetes/networking.istio.io/ServiceEntry/shop"
    inline = workload(made, f"{base}/pay/192.0.2.1")
    assert inline.services["shop/pay.example.com"].ports[0].target_port == 8443
    by_name = workload(made, f"{base}/map/map.example.com")
    assert by_name.hostname == "map.example.com"
    assert not by_name.addresses


def test_another_trust_domain_is_told() -> None:
    from dataclasses import replace

    from tests.unit.controlplane.world import MESH

    made = translate(pod("cart"), replace(MESH, trust_domain="td.example"))
    assert workload(made, CART).trust_domain == "td.example"


def test_an_address_that_two_pods_claim_is_told() -> None:
    made = translate(pod("cart") + pod("web"))
    assert made.notices == ("Pod shop/web: 10.0.1.5 is Pod shop/cart's address too",)


def test_accounts_are_known_by_node() -> None:
    made = translate(pod("cart") + pod("web", node="n2", ip="10.0.2.5"))
    assert made.accounts == {"n1": {("shop", "cart")}, "n2": {("shop", "web")}}
