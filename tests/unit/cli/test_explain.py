"""`underpass explain` and `underpass why`: what is printed, and what scripts go by."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.unit.cli.node import agent, underpass

if TYPE_CHECKING:
    from pathlib import Path


def step(name: str, outcome: str, text: str, subject: str = "") -> dict[str, str]:
    return {"name": name, "outcome": outcome, "subject": subject, "text": text}


OK = step("source", "ok", "a pod of this node", "shop/[web]")
DENY = step("policy", "refused", "DENY, its rule 0 matches", "shop/no-batch")
ELSEWHERE = step("certificate", "unknown", "held by the proxy of node b", "spiffe://x")
DRY = step("policy", "dry_run", "would deny", "shop/trial")


def told(allowed: bool, *steps: dict[str, str], remedy: str = "") -> dict[str, Any]:
    return {
        "allowed": allowed,
        "verdict": "allowed: to db" if allowed else "refused: explicitly denied",
        "remedy": remedy,
        "steps": list(steps),
    }


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (told(True, OK, DRY), 0),
        (told(False, OK, DENY), 1),
        (told(False, ELSEWHERE, DENY), 1),
        (told(True, OK, ELSEWHERE), 2),
        (404, 3),
    ],
    ids=["allowed", "refused", "refused and unknown", "unknown", "no answer"],
)
@pytest.mark.parametrize("output", ["table", "wide", "json", "yaml"])
def test_the_exit_code_is_the_verdict(tmp_path: Path, answer: Any, code: int, output: str) -> None:
    with agent(tmp_path, "node-a", {"explain": answer}):
        result = underpass(tmp_path, "explain", "web", "db:9000", "-o", output)
        why_not = underpass(tmp_path, "explain", "web", "db:9000", "--why-not", "-o", output)
    assert (result.exit_code, why_not.exit_code) == (code, code), result.output


def test_nobody_to_ask_is_no_verdict(tmp_path: Path) -> None:
    assert underpass(tmp_path, "explain", "web", "db:9000").exit_code == 3


def test_the_question_reaches_the_agent_as_it_was_put(tmp_path: Path) -> None:
    asked: list[dict[str, str]] = []

    def answer(_: str, query: dict[str, str]) -> Any:
        asked.append(query)
        return told(True)

    with agent(tmp_path, "node-a", {"explain": answer}):
        underpass(tmp_path, "explain", "shop/web&x=1", "[fd00::1]:80")
    assert asked == [{"source": "shop/web&x=1", "destination": "[fd00::1]:80"}]


def test_steps_are_in_order_with_verdict_and_remedy_below(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"explain": told(False, OK, DENY, remedy="change that rule")}):
        lines = underpass(tmp_path, "explain", "web", "db:9000").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split()[:3] == ["ok", "source", "shop/[web]:"]
    assert lines[2].split()[:3] == ["NO", "policy", "shop/no-batch:"]
    assert lines[-2:] == ["refused: explicitly denied", "what to do: change that rule"]


def test_why_not_leaves_only_what_stands_against_it(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"explain": told(False, OK, ELSEWHERE, DENY, DRY)}):
        text = underpass(tmp_path, "explain", "web", "db:9000", "--why-not").stdout
        form = ("--why-not", "-o", "json")
        found = json.loads(underpass(tmp_path, "explain", "web", "db:9000", *form).stdout)
    assert "shop/no-batch" in text
    assert "shop/[web]" not in text
    assert found["steps"] == [ELSEWHERE, DENY]


# ---- why


def verdict(**changes: Any) -> dict[str, Any]:
    return {
        "time": (datetime.now(UTC) - timedelta(minutes=2, seconds=1)).isoformat(),
        "pod_uid": "uid-db",
        "direction": "inbound",
        "src": "10.1.0.9:41000",
        "dst": "10.2.0.3:9000",
        "src_identity": "spiffe://td/ns/shop/sa/batch",
        "src_workload": "shop/batch",
        "dst_workload": "shop/db",
        "dst_service": "",
        "flag": "DENY",
        "cause": "explicitly denied by: shop/no-batch",
        "policy": "shop/no-batch",
        "rule": 3,
        "count": 5,
        "remedy": "change that rule",
    } | changes


OTHER: dict[str, Any] = {
    "pod_uid": "uid-web",
    "direction": "outbound",
    "src_workload": "shop/web",
    "dst_workload": "",
    "dst_service": "api.shop",
    "flag": "NO_ROUTE",
    "cause": "no healthy endpoint",
    "policy": "",
    "rule": None,
    "count": 1,
    "remedy": "",
}


def test_a_refusal_says_who_where_which_rule_and_what_to_do(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"verdicts": {"verdicts": [verdict()], "lost": 0}}):
        text = underpass(tmp_path, "why").stdout
    assert text.splitlines() == [
        "2m1s ago, 5 times: inbound DENY",
        "  from  shop/batch 10.1.0.9:41000 as spiffe://td/ns/shop/sa/batch",
        "  to    shop/db 10.2.0.3:9000",
        "  why   explicitly denied by: shop/no-batch",
        "  by    shop/no-batch (rule 3)",
        "  do    change that rule",
    ]


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        ((), ["DENY", "NO_ROUTE"]),
        (("-n", "1"), ["DENY"]),
        (("uid-web",), ["NO_ROUTE"]),
        (("shop/batch",), ["DENY"]),
        (("db",), ["DENY"]),
        (("web", "-n", "1"), ["NO_ROUTE"]),
        (("other/db",), []),
    ],
)
def test_a_pod_chooses_what_it_has_part_in_as_either_end(
    tmp_path: Path, arguments: tuple[str, ...], flags: list[str]
) -> None:
    both = {"verdicts": [verdict(), verdict(**OTHER)], "lost": 0}
    with agent(tmp_path, "node-a", {"verdicts": both}):
        found = yaml.safe_load(underpass(tmp_path, "why", *arguments, "-o", "yaml").stdout)
        text = underpass(tmp_path, "why", *arguments).stdout
    assert [row["flag"] for row in found] == flags
    assert all(flag in text for flag in flags)
    assert (
        flags or text == "No refusals or failures of other/db since this data plane was started.\n"
    )


def test_forgotten_ones_are_mentioned_where_they_are_missed(tmp_path: Path) -> None:
    many = {"verdicts": [verdict()], "lost": 9}
    with agent(tmp_path, "node-a", {"verdicts": many}):
        assert "9 older ones are forgotten" in underpass(tmp_path, "why").stdout
        assert "forgotten" not in underpass(tmp_path, "why", "-n", "1").stdout
