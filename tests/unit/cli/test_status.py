"""The one screen, and its exit code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

from tests.unit.cli.node import agent, underpass

if TYPE_CHECKING:
    from pathlib import Path

GOOD: dict[str, Any] = {
    "node": "node-a",
    "version": "0.1.0",
    "pid": 11,
    "started": "2026-11-23T10:00:00+00:00",
    "ready": True,
    "pending": [],
    "capture": {"mode": "nftables", "reason": "asked for", "notes": ["by its mark alone"]},
    "dataplane": {
        "state": "serving",
        "pid": 12,
        "since": "2026-11-23T10:00:00+00:00",
        "restarts": 1,
        "seconds_without_service": 0.25,
        "draining": [9],
        "error": "",
    },
    "control_plane": {
        "source": "https://192.0.2.10:15012",
        "connected": True,
        "since": "2026-11-23T10:00:00+00:00",
        "last_error": "",
        "last_push": "2026-11-23T10:00:00+00:00",
        "types": {"t": {"processed": True, "rejected": {"shop/bad": "unknown action"}}},
    },
    "certificates": {"available": 2, "total": 3, "next_expiry": "2999-01-01T00:00:00+00:00"},
    "pods": {
        "total": 3,
        "captured": 3,
        "verified": 2,
        "enforced": 2,
        "failed": 1,
        "source": "file:/etc/pods",
    },
    "connections": {"inbound": 5, "outbound": 6},
    "problems": [],
}
PROBLEM = {
    "what": "shop/web is not captured",
    "why": "its network namespace is missing",
    "remedy": "check `netns` of this pod in the list",
}


def test_the_screen_shows_every_part_within_80_columns(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"status": GOOD}):
        result = underpass(tmp_path, "status")
    assert result.exit_code == 0, result.output
    for part in (
        "Node node-a: ready",
        "nftables: asked for",
        "note: by its mark alone",
        "serving, pid 12",
        "started again 1 times (0.2 s without service)",
        "draining: pid 9",
        "connected to https://192.0.2.10:15012",
        "rejected shop/bad: unknown action",
        "2 of 3 available",
        "3 of 3 captured, 2 verified, 2 enforced, 1 FAILED",
        "5 inbound, 6 outbound",
        "Nothing is wrong.",
    ):
        assert part in " ".join(result.stdout.split()), part
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    assert not any(line.endswith(" ") for line in result.stdout.splitlines())


def test_pods_of_a_zds_server_are_served_not_captured(tmp_path: Path) -> None:
    capture = {"mode": "external", "reason": "the ZDS server redirects", "notes": []}
    pods = {"total": 3, "captured": 0, "verified": 0, "served": 2, "failed": 1, "source": "zds:/z"}
    rows = [{"namespace": "shop", "name": "web", "state": "served", "verified": False}]
    with agent(tmp_path, "node-a", {"status": GOOD | {"capture": capture, "pods": pods}}):
        text = underpass(tmp_path, "status").output
    assert "2 of 3 served, 1 FAILED (zds:/z)" in text
    assert "captured" not in text
    with agent(tmp_path, "node-a", {"pods": rows}):
        (row,) = [line for line in underpass(tmp_path, "pods").output.splitlines() if "web" in line]
    assert "NO" not in row.split()


def test_a_problem_comes_with_its_remedy_and_a_failing_exit_code(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"status": GOOD | {"problems": [PROBLEM]}}):
        result = underpass(tmp_path, "status")
        machine = underpass(tmp_path, "status", "-o", "json")
        for_people = underpass(tmp_path, "status", "-o", "yaml")
    assert result.exit_code == machine.exit_code == for_people.exit_code == 1
    for part in PROBLEM.values():
        assert part in result.stdout
    assert f"→ {PROBLEM['remedy']}" in result.stdout
    assert "Nothing is wrong" not in result.stdout
    assert json.loads(machine.stdout)["problems"] == [PROBLEM]
    assert yaml.safe_load(for_people.stdout)["problems"] == [PROBLEM]


def test_a_node_that_is_not_ready_fails_and_says_what_it_waits_for(tmp_path: Path) -> None:
    waiting = GOOD | {"ready": False, "pending": ["control plane", "pods"]}
    with agent(tmp_path, "node-a", {"status": waiting}):
        result = underpass(tmp_path, "status")
    assert result.exit_code == 1
    assert "NOT READY, waiting for control plane, pods" in result.stdout


def test_a_lost_control_plane_is_shown_with_its_error(tmp_path: Path) -> None:
    lost = GOOD["control_plane"] | {"connected": False, "last_error": "connection refused"}
    with agent(tmp_path, "node-a", {"status": GOOD | {"control_plane": lost}}):
        text = " ".join(underpass(tmp_path, "status").stdout.split())
    assert "NOT connected to https://192.0.2.10:15012" in text
    assert "connection refused" in text


def test_an_agent_that_has_just_started_is_shown(tmp_path: Path) -> None:
    """Parts that aren't known yet are empty, not an error."""
    bare = {"node": "node-a", "ready": False, "pending": ["data plane"], "problems": []}
    with agent(tmp_path, "node-a", {"status": bare}):
        result = underpass(tmp_path, "status")
    assert result.exit_code == 1
    assert "waiting for data plane" in result.stdout
    assert "none needed yet" in result.stdout
