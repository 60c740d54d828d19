"""`underpass connections`: one pod's, and what opens and closes while somebody watches."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.cli.node import agent, underpass
from tests.unit.cli.test_look import BARE, CONNECTION, POD

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OTHER = CONNECTION | {"id": 2, "src": "10.1.0.2:41002", "age_ms": 900}


def watching(monkeypatch: pytest.MonkeyPatch, *looks: Any) -> Callable[..., Any]:
    """The agent's answers one after another; then the user presses Ctrl-C."""
    left = list(looks)

    def sleep(_: float) -> None:
        if not left:
            raise KeyboardInterrupt

    monkeypatch.setattr("agent.cli.connections.sleep", sleep)
    return lambda method, query: left.pop(0)


def test_follow_tells_each_that_opens_and_closes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing = CONNECTION | {"bytes_sent": 9_000, "age_ms": 5_000}
    looks = watching(monkeypatch, [CONNECTION], [closing, OTHER], [OTHER], [OTHER])
    with agent(tmp_path, "node-a", {"connections": looks}):
        result = underpass(tmp_path, "connections", "--follow")
    assert result.exit_code == 0
    told = [line.split(maxsplit=1)[1].split("  ") for line in result.stdout.splitlines()]
    assert [line[0] for line in told] == ["opened", "opened", "closed"]
    assert "web 10.1.0.2:41002 → api 10.96.0.1:80" in told[1]
    # What it had when it was last seen.
    assert "sent 9.0 kB, received 5.6 MB" in told[2]
    assert "after 5s" in told[2]


def test_follow_for_machines_is_one_object_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = watching(monkeypatch, [CONNECTION], [])
    with agent(tmp_path, "node-a", {"connections": looks}):
        result = underpass(tmp_path, "connections", "-f", "-o", "json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["opened", "closed"]
    assert all(CONNECTION.items() <= line.items() for line in lines)


def test_follow_outlives_a_data_plane_that_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one counts from 1 again; what has the same number is another connection."""
    after = CONNECTION | {"src": "10.1.0.2:50000"}
    looks = watching(monkeypatch, [CONNECTION], 503, [after])
    with agent(tmp_path, "node-a", {"connections": looks}):
        result = underpass(tmp_path, "connections", "--follow")
    assert [line.split()[1] for line in result.stdout.splitlines()] == [
        "opened",
        "closed",
        "opened",
    ]
    assert "not today" in result.stderr


@pytest.mark.parametrize("named", ["web", "shop/web", "6b1c9d0e-web"])
def test_a_pod_is_named_as_people_or_machines_do(tmp_path: Path, named: str) -> None:
    asked = []

    def answer(_: str, query: dict[str, str]) -> Any:
        asked.append(query)
        return [CONNECTION]

    with agent(tmp_path, "node-a", {"connections": answer, "pods": [POD, BARE]}):
        assert underpass(tmp_path, "connections", "--pod", named).exit_code == 0
    assert asked == [{"pod": "6b1c9d0e-web"}]


def test_pods_that_cannot_be_told_apart_or_are_not_here_are_said_so(tmp_path: Path) -> None:
    twin = POD | {"namespace": "other", "uid": "twin"}
    with agent(tmp_path, "node-a", {"pods": [POD, twin]}):
        several = underpass(tmp_path, "connections", "--pod", "web")
        none = underpass(tmp_path, "connections", "--pod", "db")
    assert several.exit_code == none.exit_code == 1
    assert "several pods are named web" in several.stderr
    assert "other/web twin" in several.stderr
    assert "no pod db on this node; known: shop/web, other/web" in none.stderr
