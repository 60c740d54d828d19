"""Lists: readable tables, untouched JSON and YAML, words where there is nothing."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.unit.cli.node import agent, underpass

if TYPE_CHECKING:
    from pathlib import Path

POD = {
    "uid": "6b1c9d0e-web",
    "name": "web",
    "namespace": "shop",
    "service_account": "web",
    "netns": "/run/netns/web",
    "state": "captured",
    "captured": True,
    "verified": True,
    "verified_at": "2026-11-23T10:00:00+00:00",
    "proof": "proved",
    "proof_reason": "",
    "proof_at": "2026-11-23T10:00:01+00:00",
    "repairs": 2,
    "problem": "",
    "remedy": "",
    "identity": "spiffe://cluster.local/ns/shop/sa/web-account",
    "workload_uid": "Kubernetes//Pod/shop/web",
    "inbound_connections": 3,
    "outbound_connections": 14,
}
BARE = POD | {
    "name": "api",
    "uid": "api-uid",
    "state": "failed",
    "verified": False,
    "proof": "not proved",
    "proof_reason": "went past us",
    "problem": "rule outbound-v4 was removed",
    "remedy": "it is put back by itself",
    "identity": "",
}
WORKLOAD = {
    "workloadIps": ["10.1.0.2", "fd00::2"],
    "protocol": "HBONE",
    "uid": "Kubernetes//Pod/shop/web",
    "name": "web",
    "namespace": "shop",
    "serviceAccount": "web",
    "node": "node-a",
    "status": "Healthy",
    "waypoint": {"destination": "/10.9.0.1", "hboneMtlsPort": 15008},
    "authorizationPolicies": ["shop/only-web"],
}
SERVICE = {
    "name": "api",
    "namespace": "shop",
    "hostname": "api.shop.svc.cluster.local",
    "vips": ["/10.96.0.1", "net2/10.97.0.1"],
    "ports": {"443": 8443, "80": 80},
    "endpoints": {
        "a": {"workloadUid": "a", "port": {"80": 80}, "status": "Healthy"},
        "b": {"workloadUid": "b", "port": {"80": 80}, "status": "Unhealthy"},
    },
}
CONNECTION = {
    "id": 1,
    "pod_uid": "6b1c9d0e-web",
    "direction": "outbound",
    "src": "10.1.0.2:41000",
    "original_dst": "10.96.0.1:80",
    "actual_dst": "10.2.0.9:15008",
    "protocol": "HBONE",
    "src_identity": "spiffe://cluster.local/ns/shop/sa/web",
    "dst_identity": "spiffe://cluster.local/ns/shop/sa/api",
    "dst_service": "api.shop.svc.cluster.local",
    "age_ms": 3_723_000,
    "bytes_sent": 1_234,
    "bytes_received": 5_600_000,
    "src_workload": "web",
    "dst_workload": "api",
}


def certificate(**changes: Any) -> dict[str, Any]:
    return {
        "identity": "spiffe://cluster.local/ns/shop/sa/web",
        "state": "Available",
        "not_before": "2026-11-22T10:00:00+00:00",
        "not_after": (datetime.now(UTC) + timedelta(hours=5, minutes=30, seconds=30)).isoformat(),
        "serial": "4711",
        "last_error": "",
        "next_attempt": None,
    } | changes


ANSWERS: dict[str, list[dict[str, Any]]] = {
    "pods": [POD, BARE],
    "workloads": [WORKLOAD],
    "services": [SERVICE],
    "certificates": [certificate()],
    "connections": [CONNECTION],
}


@pytest.mark.parametrize("section", ANSWERS)
def test_a_table_fits_80_columns(tmp_path: Path, section: str) -> None:
    with agent(tmp_path, "node-a", ANSWERS):
        result = underpass(tmp_path, section)
    assert result.exit_code == 0, result.output
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    assert result.stderr == ""


@pytest.mark.parametrize("section", ANSWERS)
def test_json_and_yaml_hold_the_answer_as_it_came(tmp_path: Path, section: str) -> None:
    with agent(tmp_path, "node-a", ANSWERS):
        as_json = underpass(tmp_path, section, "-o", "json").stdout
        as_yaml = underpass(tmp_path, section, "--output=yaml").stdout
    assert json.loads(as_json) == ANSWERS[section]
    assert yaml.safe_load(as_yaml) == ANSWERS[section]


@pytest.mark.parametrize("section", ANSWERS)
def test_nothing_is_said_in_words_for_people_and_empty_for_machines(
    tmp_path: Path, section: str
) -> None:
    with agent(tmp_path, "node-a", {key: [] for key in ANSWERS}):
        told = underpass(tmp_path, section)
        machine = underpass(tmp_path, section, "-o", "json")
    assert told.exit_code == 0
    assert told.stdout.startswith("No ")
    assert json.loads(machine.stdout) == []


def test_pods_are_sorted_and_say_why_one_is_not_verified(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", ANSWERS):
        lines = _unfolded(underpass(tmp_path, "pods", "-o", "wide").stdout)
    assert lines[1].startswith("shop/api")
    assert "failed" in lines[1]
    assert "NO" in lines[1].split()
    assert "rule outbound-v4 was removed; it is put back by itself" in lines[1]
    wanted = ["shop/web", "captured", "-", "yes", "yes", "shop/web-account", "3", "14"]
    assert lines[2].split()[:8] == wanted
    assert "2026-11-23T10:00:01" in lines[2]
    assert "/run/netns/web" in lines[2]


def test_a_workload_shows_addresses_and_waypoint(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", ANSWERS):
        text = underpass(tmp_path, "workloads", "-o", "wide").stdout
    for part in ("shop/web", "10.1.0.2, fd00::2", "HBONE", "node-a", " 10.9.0.1 ", "shop/only-web"):
        assert part in text


def test_a_service_shows_ports_networks_and_healthy_endpoints(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", ANSWERS):
        text = underpass(tmp_path, "services", "-o", "wide").stdout
    for part in ("shop/api", "10.96.0.1, net2/10.97.0.1", "80, 443→8443", "1/2"):
        assert part in text


def test_a_wide_service_names_each_endpoint_with_its_health(tmp_path: Path) -> None:
    known = WORKLOAD | {"uid": "a", "name": "api-1"}
    with agent(tmp_path, "node-a", ANSWERS | {"workloads": [known]}):
        text = underpass(tmp_path, "services", "-o", "wide").stdout
        narrow = underpass(tmp_path, "services").stdout
    assert "shop/api-1 10.1.0.2, fd00::2 healthy" in text
    assert "b UNHEALTHY, not known itself" in text
    assert "api-1" not in narrow


def test_a_connection_shows_ends_age_and_bytes(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", ANSWERS):
        text = underpass(tmp_path, "connections", "-o", "wide").stdout
    for part in ("web 10.1.0.2:41000", "api 10.96.0.1:80", "1h2m", "1.2 kB", "5.6 MB", "shop/api"):
        assert part in text


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        # Made when the test runs, which may be long after collection.
        (None, ["Available", "in 5h30m"]),
        (certificate(not_after="2020-01-01T00:00:00+00:00"), ["EXPIRED"]),
        (
            certificate(state="Unavailable", not_after=None, last_error="the CA refused: 403"),
            ["Unavailable", "the CA refused: 403"],
        ),
        (
            {
                "identity": "spiffe://cluster.local/ns/shop/sa/web",
                "state": "Unavailable: the CA refused: 403",
                "certChain": [{"serialNumber": "12", "expirationTime": "2020-01-01T00:00:00Z"}],
            },
            ["Unavailable", "EXPIRED", "the CA refused: 403", "12"],
        ),
    ],
    ids=["good", "expired", "none", "as in upstream's dump"],
)
def test_a_certificate_shows_what_is_left_of_it(
    tmp_path: Path, row: dict[str, Any] | None, parts: list[str]
) -> None:
    with agent(tmp_path, "node-a", {"certificates": [row or certificate()]}):
        text = underpass(tmp_path, "certificates", "-o", "wide").stdout
    for part in parts:
        assert part in text


def test_names_from_outside_are_not_read_as_markup(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"pods": [POD | {"name": "[red]web[/red]"}]}):
        assert "shop/[red]web[/red]" in underpass(tmp_path, "pods", "-o", "wide").stdout


def _unfolded(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]
