"""`underpass policies`: what was sent, with what each policy decided on this node."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from tests.unit.cli.node import agent, underpass

if TYPE_CHECKING:
    from pathlib import Path

POLICY: dict[str, Any] = {
    "name": "only-web",
    "namespace": "shop",
    "scope": "WorkloadSelector",
    "action": "Allow",
    "rules": [[], []],
    "dryRun": False,
}
TRIAL = POLICY | {"name": "trial", "action": "Deny", "dryRun": True}


def answers() -> dict[str, Any]:
    last = (datetime.now(UTC) - timedelta(minutes=3, seconds=1)).isoformat()
    return {
        "policies": [TRIAL, POLICY],
        "policy-hits": [
            {"name": "shop/only-web", "decided": 12, "dryRun": 0, "last": last},
            {"name": "shop/trial", "decided": 0, "dryRun": 7, "last": last},
        ],
    }


def test_hits_and_their_last_time_stand_beside_each_policy(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", answers()):
        lines = underpass(tmp_path, "policies").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split()[:7] == [
        "shop/only-web", "Allow", "WorkloadSelector", "2", "no", "12", "3m1s"
    ]  # fmt: skip
    assert lines[2].split()[4:6] == ["yes", "(7)"], "in dry-run it decided nothing"


def test_a_policy_without_hits_never_decided(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", answers() | {"policy-hits": []}):
        row = underpass(tmp_path, "policies").stdout.splitlines()[1].split()
        found = json.loads(underpass(tmp_path, "policies", "-o", "json").stdout)
    assert row[-2:] == ["0", "never"]
    assert found[1] == POLICY | {"hits": {"decided": 0, "dryRun": 0, "last": None}}


def test_without_policies_words_for_people_and_nothing_for_machines(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"policies": []}):
        assert underpass(tmp_path, "policies").stdout.startswith("No authorization policies")
        assert json.loads(underpass(tmp_path, "policies", "-o", "json").stdout) == []
