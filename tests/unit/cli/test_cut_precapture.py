"""`underpass cut-precapture`: what is asked of the agent, and what is refused before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.unit.cli.node import agent, underpass

if TYPE_CHECKING:
    from pathlib import Path

PODS = [{"uid": "u-1", "name": "web", "namespace": "shop"}]


@pytest.mark.parametrize(
    ("arguments", "asked"), [(["web"], {"pod": "u-1"}), (["--all"], {"all": ""})]
)
def test_pods_are_asked_for_by_uid(
    tmp_path: Path, arguments: list[str], asked: dict[str, str]
) -> None:
    seen = []

    def cut(*request: object) -> dict[str, int]:
        seen.append(request)
        return {"cut": 1}

    with agent(tmp_path, "node-a", {"pods": PODS, "precapture/cut": cut}):
        result = underpass(tmp_path, "cut-precapture", *arguments)
    assert (result.exit_code, result.stdout) == (0, "1 connection cut.\n")
    assert seen == [("POST", asked)]


@pytest.mark.parametrize("arguments", [[], ["web", "--all"]])
def test_nothing_is_cut_by_an_unclear_command(tmp_path: Path, arguments: list[str]) -> None:
    result = underpass(tmp_path, "cut-precapture", *arguments)
    assert result.exit_code == 2
    assert "name a pod, or write --all" in result.stderr


def test_pod_that_is_not_there_is_told(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"pods": PODS}):
        result = underpass(tmp_path, "cut-precapture", "bank/web")
    assert result.exit_code == 1
    assert "no pod bank/web on this node; known: shop/web" in result.stderr
