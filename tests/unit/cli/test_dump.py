"""`underpass dump`: one document whatever answers, whole files or none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from proto.gen import control_pb2
from tests.support.fake_dataplane import FakeConnection, FakeDataplane
from tests.unit.cli.node import agent, background, underpass

if TYPE_CHECKING:
    from pathlib import Path

HELD = {"workloads": [{"uid": "a"}], "certificates": [], "workloadState": {"a": {"state": "Up"}}}
ANSWERS = {f"dump/{name}": content for name, content in HELD.items()}


def test_whole_is_one_document_and_says_what_nobody_told(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", ANSWERS):
        result = underpass(tmp_path, "dump")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == HELD
    assert list(json.loads(result.stdout)) == sorted(HELD)
    assert "left out" in result.stderr
    assert "policies" in result.stderr


def test_section_is_printed_alone(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", ANSWERS):
        assert json.loads(underpass(tmp_path, "dump", "workloads").stdout) == HELD["workloads"]
        missing = underpass(tmp_path, "dump", "policies")
    assert missing.exit_code == 1
    assert "the agent of node-a has no dump/policies" in missing.stderr


def test_file_is_for_its_owner_and_stays_as_it_was_when_the_dump_fails(tmp_path: Path) -> None:
    file = tmp_path / "dump.json"
    with agent(tmp_path, "node-a", ANSWERS):
        assert underpass(tmp_path, "dump", "-f", str(file)).stdout == ""
    assert json.loads(file.read_text()) == HELD
    assert file.stat().st_mode & 0o777 == 0o600
    with agent(tmp_path, "node-a", ANSWERS | {"dump/workloads": 503}):
        result = underpass(tmp_path, "dump", "-f", str(file))
    assert result.exit_code == 1
    assert "answered 503 to dump/workloads: not today" in result.stderr
    assert json.loads(file.read_text()) == HELD
    assert [path.name for path in tmp_path.iterdir() if "dump" in path.name] == ["dump.json"]


def test_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", ANSWERS):
        result = underpass(tmp_path, "dump", "-f", str(tmp_path / "missing" / "dump.json"))
    assert result.exit_code == 1
    assert "missing/dump.json: No such file or directory" in result.stderr


@pytest.mark.parametrize("whole", [True, False])
def test_data_plane_answers_alone_when_the_agent_is_away(tmp_path: Path, *, whole: bool) -> None:
    async def answer(
        connection: FakeConnection, request: control_pb2.Request, _: list[int]
    ) -> None:
        name = request.dump.section
        if name not in HELD:
            error = control_pb2.Error(code="NOT_FOUND", subject=name, text="no such section")
            await connection.reply(request, error=error)
            return
        text = json.dumps(HELD[name]).encode()
        for piece, more in ((text[:1], True), (text[1:], False)):
            await connection.reply(request, more=more, chunk=control_pb2.Chunk(data=piece))

    (tmp_path / "node-a").mkdir()
    with background(lambda: FakeDataplane(tmp_path / "node-a/dataplane.sock", answer)):
        result = underpass(tmp_path, "dump", *([] if whole else ["workloads"]))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == (HELD if whole else HELD["workloads"])
    assert "The agent of node-a is away" in result.stderr
