"""The commands that run something, and how mistakes in their options are told."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from agent.cli.main import COMMANDS, main
from agent.settings import SETTINGS
from controlplane import server
from controlplane.tokens import TokenKey

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.stdout


def test_the_list_of_commands_is_complete() -> None:
    text = CliRunner().invoke(main, ["--help"]).stdout
    assert all(name in text for name in COMMANDS)


def test_an_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["nonsense"])
    assert result.exit_code == 2
    assert "nonsense" in result.stderr


def test_the_agents_help_names_every_flag_and_environment_variable() -> None:
    text = CliRunner().invoke(main, ["agent", "--help"], terminal_width=200).stdout
    for setting in SETTINGS:
        if setting.only_in_file:
            assert f"{setting.name}:" in text
            assert setting.flag not in text
        else:
            assert setting.flag in text
            assert setting.env in text


def test_the_agent_reports_all_mistakes_together_and_exits_64(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("log: {format: xml}\nnonsense: 1\n")
    result = CliRunner(env={"UNDERPASS_XDS_ADDRESS": "http://plain:1"}).invoke(
        main,
        ["agent", "--pods", "etcd:x", "--config", str(tmp_path / "config.yaml")],
    )
    assert result.exit_code == 64
    for part in ("--pods", "etcd", "UNDERPASS_XDS_ADDRESS", "log.format", "xml", "nonsense"):
        assert part in result.stderr
    assert "Traceback" not in result.output


def test_looking_loads_neither_grpc_nor_the_control_plane() -> None:
    """`status` is run by scripts every few seconds."""
    check = (
        "import sys, agent.cli.main as m\n"
        "for name in ('status', 'look'): __import__('agent.cli.' + name)\n"
        "print([n for n in ('grpc', 'aiohttp', 'rich', 'pyroute2', 'controlplane', 'yaml')"
        " if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_names_the_program() -> None:
    result = CliRunner().invoke(main, ["version"])
    assert result.exit_code == 0
    assert "underpass" in result.stdout


# ---- control plane


def test_a_token_is_for_the_named_node(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main,
        ["controlplane", "token", "--node", "node-a", "--state", str(tmp_path), "--ttl", "1h"],
    )
    assert result.exit_code == 0, result.output
    token = TokenKey.load(tmp_path).verify(result.stdout)
    assert token.node == "node-a"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["token"], "--node"),
        (["token", "--node", "a", "--ttl", "soon"], "not a duration"),
        (["token", "--node", "", "--state", "/dev/null/x"], "state"),
        ([], "--manifests"),
        (["--manifests", "x", "--certificate-ttl", "1 year"], "not a duration"),
    ],
)
def test_mistakes_of_the_control_plane_are_told(arguments: list[str], part: str) -> None:
    result = CliRunner().invoke(main, ["controlplane", *arguments])
    assert result.exit_code != 0
    assert part in result.stderr
    assert "Traceback" not in result.output


def test_the_control_plane_gets_its_options_and_passes_its_exit_code_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[server.Options] = []

    def run(options: server.Options) -> int:
        seen.append(options)
        return 64

    monkeypatch.setattr(server, "run", run)
    result = CliRunner(env={"UNDERPASS_CONTROLPLANE_NETWORK": "net1"}).invoke(
        main,
        [
            "controlplane",
            f"--manifests={tmp_path}",
            "--listen=127.0.0.1:1",
            "--listen=[::1]:1",
            "--san=192.0.2.1",
            "--certificate-ttl=2h",
        ],
    )
    assert result.exit_code == 64
    assert seen[0].listen == ("127.0.0.1:1", "[::1]:1")
    assert seen[0].extra_sans == ("192.0.2.1",)
    assert seen[0].certificate_ttl == timedelta(hours=2)
    assert seen[0].network == "net1"
    assert seen[0].trust_domain == "cluster.local"
