"""Shell completion, by the shells' own scripts; bash for real."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.unit.cli.node import agent, underpass
from tests.unit.cli.test_look import POD

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A folder for PATH with `underpass` in it, as an installation has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "underpass"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m agent.cli.main "$@"\n')
    script.chmod(0o755)
    return folder


def complete(program: Path, *words: str) -> list[str]:
    """What bash offers at the end of these words."""
    text = (
        'source <(underpass completion bash)\nCOMP_WORDS=("$@")\nCOMP_CWORD=$(($# - 1))\n'
        '_underpass_completion underpass\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "-c", text, "bash", *words],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": f"{program}:{os.environ['PATH']}"},
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["st"], ["status"]),
        (["co"], ["completion", "connections", "controlplane"]),
        (["pods", "--out"], ["--output"]),
        (["pods", "-o", "j"], ["json"]),
        (["log", "re"], ["reset"]),
    ],
)
def test_bash_completes_commands_and_options(
    program: Path, words: list[str], offered: list[str]
) -> None:
    assert complete(program, "underpass", *words) == offered


def test_bash_completes_names_of_nodes_and_pods(program: Path, tmp_path: Path) -> None:
    run = f"--run-dir={tmp_path}"
    with agent(tmp_path, "node-a", {"pods": [POD]}):
        assert complete(program, "underpass", run, "--node", "no") == ["node-a"]
        assert complete(program, "underpass", run, "connections", "--pod", "s") == ["shop/web"]


@pytest.mark.parametrize(("shell", "mark"), [("zsh", "compdef"), ("fish", "complete ")])
def test_other_shells_get_a_script_of_their_own(tmp_path: Path, shell: str, mark: str) -> None:
    text = underpass(tmp_path, "completion", shell).stdout
    assert mark in text
    assert "_UNDERPASS_COMPLETE" in text
