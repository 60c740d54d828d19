"""`underpass log`: what is asked of the agent, and how its answer is told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from proto.gen import control_pb2
from tests.support.fake_dataplane import FakeDataplane
from tests.unit.cli.node import agent, background, underpass

if TYPE_CHECKING:
    from pathlib import Path

LEVELS = {"filter": "info,underpass=debug", "configured": "info", "dataplane": True}


def test_levels_in_force_are_shown_beside_the_configured_ones(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"log": LEVELS}):
        assert underpass(tmp_path, "log").stdout.splitlines() == [
            "info,underpass=debug",
            "configured: info (back to it: underpass log reset)",
        ]
        assert json.loads(underpass(tmp_path, "log", "-o", "json").stdout) == LEVELS


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["set", "underpass=debug"], ("POST", {"set": "underpass=debug"})),
        (["reset"], ("POST", {"reset": ""})),
        ([], ("GET", {})),
    ],
)
def test_each_word_asks_for_what_it_says(
    tmp_path: Path, arguments: list[str], asked: tuple[str, dict[str, str]]
) -> None:
    seen = []

    def answer(method: str, query: dict[str, str]) -> Any:
        seen.append((method, query))
        return LEVELS

    with agent(tmp_path, "node-a", {"log": answer}):
        assert underpass(tmp_path, "log", *arguments).exit_code == 0
    assert seen == [asked]


def test_refusal_is_told(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"log": 400}):
        result = underpass(tmp_path, "log", "set", "loud")
    assert result.exit_code == 1
    assert "answered 400 to log: not today" in result.stderr


def test_without_an_agent_levels_are_shown_but_not_changed(tmp_path: Path) -> None:
    (tmp_path / "node-a").mkdir()
    fake = FakeDataplane(tmp_path / "node-a/dataplane.sock")
    fake.hello.config.CopyFrom(control_pb2.InstanceConfig(node="node-a"))
    fake.hello.config.log.filter = "debug"
    with background(lambda: fake):
        shown = underpass(tmp_path, "log")
        changed = underpass(tmp_path, "log", "set", "info")
    assert shown.stdout == "debug\n"
    assert "The agent of node-a is away" in shown.stderr
    assert changed.exit_code == 1
    assert "only it can change this" in changed.stderr
