"""What the agent makes of the probe's answers, and of none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from agent import ebpf_probe
from agent.slices import DataplaneProcess, Ebpf
from redirect.base import Probe

if TYPE_CHECKING:
    from pathlib import Path

MET = {"name": "BTF", "reason": "", "remedy": ""}
MISSING = {"name": "bpf(2)", "reason": "not permitted", "remedy": "grant it"}
ALSO = {"name": "program lookup", "reason": "refused", "remedy": "another kernel"}


def answer(*entries: dict[str, str]) -> str:
    return json.dumps({"requirements": entries})


async def asked(tmp_path: Path, script: str) -> Probe:
    binary = tmp_path / "dataplane"
    binary.write_text(f"#!/bin/sh\n{script}\n")
    binary.chmod(0o755)
    process = DataplaneProcess(binary=binary, cgroup_parent=tmp_path / "planes")
    return await ebpf_probe.probe(Ebpf(tmp_path / "pods", tmp_path / "pins"), process)


async def test_all_met_is_usable_and_the_binary_is_told_where(tmp_path: Path) -> None:
    script = f"echo \"$@\" > {tmp_path}/said; echo '{answer(MET)}'"
    assert await asked(tmp_path, script) == Probe(usable=True)
    assert (tmp_path / "said").read_text().split() == [
        *("capture", "probe", "--json"),
        f"--pods-cgroup={tmp_path}/pods",
        f"--leaf-parent={tmp_path}/planes",
        f"--folder={tmp_path}/pins",
    ]


async def test_the_first_missing_is_told_with_its_remedy_and_others_by_name(tmp_path: Path) -> None:
    found = await asked(tmp_path, f"echo '{answer(MET, MISSING, ALSO)}'; exit 69")
    assert not found.usable
    assert found.reason == ("bpf(2): not permitted; grant it (also missing: program lookup)")


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo unknown subcommand >&2; exit 64", "unknown subcommand"),
        ("exit 70", "exit code 70"),
        ("echo '{}'", "exit code 0"),
        ("echo '[1]'", "exit code 0"),
    ],
)
async def test_a_binary_that_has_no_answer_makes_ebpf_unusable(
    tmp_path: Path, script: str, why: str
) -> None:
    found = await asked(tmp_path, script)
    assert not found.usable
    assert why in found.reason
    assert str(tmp_path / "dataplane") in found.reason


async def test_a_busy_machine_changes_nothing_for_a_node_that_captures_by_ebpf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ebpf_probe, "PATIENCE", 0.2)
    found = await asked(tmp_path, "exec sleep 60")
    assert not found.usable
    assert "didn't end within 0.2 s" in found.reason
    (tmp_path / "pins/links").mkdir(parents=True)
    found = await asked(tmp_path, "exec sleep 60")
    assert found.usable
    assert "programs of an earlier data plane serve" in found.notes[0]


async def test_without_a_binary_here_the_data_plane_is_taken_at_its_word(tmp_path: Path) -> None:
    process = DataplaneProcess(socket=tmp_path / "dp.sock")
    found = await ebpf_probe.probe(Ebpf(tmp_path, tmp_path), process)
    assert found.usable
    assert "shows with the first pod" in found.notes[0]
    assert not (await ebpf_probe.probe(None, process)).usable
