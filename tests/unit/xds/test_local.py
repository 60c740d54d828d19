"""The local file as a source of configuration."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from agent.dataplane import DataplaneLost
from agent.xds import ADDRESS, AUTHORIZATION, LocalFile, local
from agent.xds.fields import LocalFileError
from agent.xds.manifest import parse
from proto.gen import authorization_pb2, discovery_pb2, workload_pb2
from tests.support.eventually import eventually
from tests.support.targets import RecordingDataplane

MESH = """
workloads:
- uid: c//Pod/shop/web
  name: web
  namespace: shop
  serviceAccount: web
  workloadIps: [10.0.0.1, "fd00::1"]
  network: n
  protocol: HBONE
  node: node-a
  clusterId: c
  status: Healthy
  waypoint: {destination: shop/wp.shop.svc, hboneMtlsPort: 15008}
  authorizationPolicies: [shop/deny]
  locality: {region: r, zone: z}
  capacity: 3
  services:
    shop/web.shop.svc.cluster.local: {80: 8080}
- name: plain
  namespace: shop
  workloadIps: [10.0.0.2]
  protocol: TCP
services:
- name: web
  namespace: shop
  hostname: web.shop.svc.cluster.local
  vips: [n/10.1.0.1, /10.1.0.2]
  ports: {"80": 8080}
  waypoint: {destination: n/10.9.0.1}
  loadBalancer: {mode: Failover, routingPreferences: [Region, Zone], healthPolicy: AllowAll}
  endpoints:
    Kubernetes//Pod/shop/plain: {port: {80: 9090}}
policies:
- name: deny
  namespace: shop
  scope: WorkloadSelector
  action: Deny
  rules:
  - - - principals: [{Exact: cluster.local/ns/shop/sa/bad}]
        notSourceIps: [10.0.0.0/8]
        destinationPorts: [80]
        serviceAccounts: [{namespace: shop, serviceAccount: x}]
      - namespaces: [{Presence: []}]
"""


def test_document_becomes_the_resources_it_describes() -> None:
    found = parse(MESH, "mesh.yaml")
    assert set(found[ADDRESS]) == {
        "c//Pod/shop/web",
        "Kubernetes//Pod/shop/plain",
        "shop/web.shop.svc.cluster.local",
    }
    web = found[ADDRESS]["c//Pod/shop/web"].message
    assert isinstance(web, workload_pb2.Address)
    assert web.workload.addresses[0] == bytes([10, 0, 0, 1])
    assert len(web.workload.addresses[1]) == 16
    assert web.workload.tunnel_protocol == workload_pb2.HBONE
    assert web.workload.waypoint.hostname.hostname == "wp.shop.svc"
    assert web.workload.capacity.value == 3
    port = web.workload.services["shop/web.shop.svc.cluster.local"].ports[0]
    assert (port.service_port, port.target_port) == (80, 8080)
    plain = found[ADDRESS]["Kubernetes//Pod/shop/plain"].message
    assert isinstance(plain, workload_pb2.Address)
    port = plain.workload.services["shop/web.shop.svc.cluster.local"].ports[0]
    assert port.target_port == 9090
    service = found[ADDRESS]["shop/web.shop.svc.cluster.local"].message
    assert isinstance(service, workload_pb2.Address)
    assert service.service.addresses[0].network == "n"
    assert service.service.waypoint.address.address == bytes([10, 9, 0, 1])
    assert service.service.load_balancing.mode == workload_pb2.LoadBalancing.FAILOVER
    assert service.service.load_balancing.routing_preference == [1, 2]
    policy = found[AUTHORIZATION]["shop/deny"].message
    assert isinstance(policy, authorization_pb2.Authorization)
    assert policy.action == authorization_pb2.DENY
    first, second = policy.rules[0].clauses[0].matches
    assert first.principals[0].exact == "cluster.local/ns/shop/sa/bad"
    assert first.not_source_ips[0].length == 8
    assert first.service_accounts[0].serviceAccount == "x"
    assert second.namespaces[0].HasField("presence")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("workload: []", ("unknown key workload", "workloads")),
        ("- a", ("a mapping is expected",)),
        ("workloads: {}", ("workloads", "a list is expected")),
        ("workloads: [{namespace: a}]", ("workloads[0].name", "missing")),
        (
            "workloads: [{name: a, namespace: b, adress: x}]",
            ("workloads[0]", "unknown key adress"),
        ),
        (
            "workloads: [{name: a, namespace: b, workloadIps: [10.0.0]}]",
            ("workloads[0].workloadIps[0]", "no IP address"),
        ),
        (
            "workloads: [{name: a, namespace: b, protocol: QUIC}]",
            ("workloads[0].protocol", "TCP, HBONE"),
        ),
        (
            "workloads: [{name: a, namespace: b, services: {x/y: {80: 99999}}}]",
            ("workloads[0].services.x/y", "99999"),
        ),
        (
            "workloads: [{name: a, namespace: b}, {name: a, namespace: b}]",
            ("workloads[1]", "twice"),
        ),
        (
            "workloads: [{name: a, namespace: b, waypoint: {destination: x}}]",
            ("workloads[0].waypoint.destination",),
        ),
        ("policies: [{name: a, namespace: b}]", ("policies[0].action", "missing")),
        (
            "policies: [{name: a, namespace: b, action: Deny, rules: [[[{sourceIps: [x]}]]]}]",
            ("policies[0].rules[0][0][0].sourceIps[0]",),
        ),
        (
            "policies: [{name: a, namespace: b, action: Deny, rules: [[[{principals: [x]}]]]}]",
            ("principals[0]", "Exact"),
        ),
        ("a: [", ("mesh.yaml", "line")),
    ],
)
def test_mistake_is_named_with_file_and_field(text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(LocalFileError) as raised:
        parse(text, "mesh.yaml")
    assert str(raised.value).startswith("mesh.yaml: ")
    for part in parts:
        assert part in str(raised.value)


@contextlib.asynccontextmanager
async def running(path: Path) -> AsyncIterator[LocalFile]:
    source = LocalFile(path, poll=timedelta(milliseconds=10))
    task = asyncio.create_task(source.run())
    try:
        yield source
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def replace(path: Path, text: str) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_text(text)
    os.replace(scratch, path)


def kinds(target: RecordingDataplane) -> list[str]:
    """Of each response: which type, and whether it brings or takes."""
    found = []
    for raw in target.responses:
        response = discovery_pb2.DeltaDiscoveryResponse.FromString(raw)
        what = response.type_url.rpartition(".")[2]
        found.append(f"{'+' if response.resources else '-'}{what}")
    return found


def last(target: RecordingDataplane) -> discovery_pb2.DeltaDiscoveryResponse:
    return discovery_pb2.DeltaDiscoveryResponse.FromString(target.responses[-1])


async def test_changes_are_sent_as_differences(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    target = RecordingDataplane()
    async with running(path) as source:
        source.attach(target, [])
        await eventually(lambda: source.status().processed)
        assert len(target.held[ADDRESS]) == 3
        assert set(target.held[AUTHORIZATION]) == {"shop/deny"}
        assert len(target.responses) == 2
        web = parse(MESH, "x")[ADDRESS]["c//Pod/shop/web"]
        sent = discovery_pb2.DeltaDiscoveryResponse.FromString(target.responses[1])
        packed = next(entry for entry in sent.resources if entry.name == "c//Pod/shop/web")
        assert packed.resource.type_url == ADDRESS
        assert workload_pb2.Address.FromString(packed.resource.value) == web.message
        replace(path, MESH.replace("10.0.0.2", "10.0.0.3"))
        await eventually(lambda: len(target.responses) == 3)
        assert [entry.name for entry in last(target).resources] == ["Kubernetes//Pod/shop/plain"]
        replace(path, "services: []")
        await eventually(lambda: len(target.responses) == 5)
        assert target.held == {ADDRESS: {}, AUTHORIZATION: {}}


async def test_policies_come_before_the_workloads_that_list_them_and_leave_after(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    target = RecordingDataplane()
    async with running(path) as source:
        source.attach(target, [])
        await eventually(lambda: source.status().processed)
        replace(path, "{}")
        await eventually(lambda: len(target.responses) == 4)
        assert kinds(target) == ["+Authorization", "+Address", "-Address", "-Authorization"]


async def test_bad_file_keeps_the_last_good_state(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    target = RecordingDataplane()
    async with running(path) as source:
        source.attach(target, [])
        await eventually(lambda: source.status().connected)
        replace(path, "workloads: [{}]")
        await eventually(lambda: "workloads[0].name" in source.status().last_error)
        assert str(path) in source.status().last_error
        assert len(target.responses) == 2
        path.unlink()
        await eventually(lambda: "No such file" in source.status().last_error)
        assert len(target.responses) == 2
        replace(path, MESH.replace("10.0.0.2", "10.0.0.3"))
        await eventually(lambda: len(target.responses) == 3)
        await eventually(lambda: source.status().last_error == "")


async def test_file_that_appears_later_is_found(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    target = RecordingDataplane()
    async with running(path) as source:
        source.attach(target, [])
        await eventually(lambda: "No such file" in source.status().last_error)
        assert not source.status().processed
        replace(path, "{}")
        await eventually(lambda: source.status().processed)


async def test_adopted_data_plane_is_sent_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    target = RecordingDataplane()
    async with running(path) as source:
        source.attach(target, [])
        await eventually(lambda: source.status().processed)
        source.detach()
        target.held[ADDRESS]["stale"] = "1"
        del target.held[ADDRESS]["c//Pod/shop/web"]
        source.attach(target, target.types_now())
        await eventually(lambda: len(target.responses) == 3)
        assert list(last(target).removed_resources) == ["stale"]
        assert [entry.name for entry in last(target).resources] == ["c//Pod/shop/web"]


async def test_lost_push_is_repeated_and_a_rejected_resource_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    target = RecordingDataplane()
    target.reject = {"shop/deny": "no"}
    target.fail = DataplaneLost("nobody answers")
    async with running(path) as source:
        source.attach(target, [])
        await eventually(lambda: source.status().processed)
        assert source.status().types[AUTHORIZATION].rejected == {"shop/deny": "no"}
        await eventually(lambda: source.status().connected)
        assert len(target.responses) == 2


async def test_defect_while_reading_ends_nothing_and_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    good = parse
    monkeypatch.setattr(local, "_AFTER_DEFECT", timedelta(milliseconds=10))
    monkeypatch.setattr(local, "parse", lambda *_: 1 // 0)
    async with running(path) as source:
        target = RecordingDataplane()
        source.attach(target, [])
        await eventually(lambda: "ZeroDivisionError" in source.status().last_error)
        monkeypatch.setattr(local, "parse", good)
        await eventually(lambda: len(target.responses) == 2)
        await eventually(lambda: source.status().last_error == "")
