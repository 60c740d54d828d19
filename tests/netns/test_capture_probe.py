"""`underpass-dataplane capture probe`: what it finds on this kernel, what it says where something
is missing or in the way, and that nothing stays of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.world import cgroup2_mounts, remove_cgroup
from tests.support.binary import dataplane_binary
from tests.support.foreign_program import (
    NAME,
    PREORDER,
    SENDMSG6,
    foreign_program,
)
from tests.support.probe import probe as capture_probe

if TYPE_CHECKING:
    from collections.abc import Iterator


PINS = Path("/sys/fs/bpf/underpass/none")


@pytest.fixture
def top() -> Iterator[Path]:
    """A node's cgroup with one for its pods; the data planes' isn't there yet."""
    (mount, *_) = cgroup2_mounts()
    made = mount / f"underpass-tests-probe-{os.getpid()}"
    (made / "pods/one").mkdir(parents=True)
    yield made
    remove_cgroup(made)


def probe(top: Path, **changed: Path) -> tuple[int, dict[str, str]]:
    asked = {"pods": top / "pods", "leaves": top / "planes/node", "folder": PINS} | changed
    return capture_probe(asked["pods"], asked["leaves"], str(asked["folder"]))


def refused(top: Path) -> str:
    """The one reason, which is the order of programs."""
    code, missing = probe(top)
    assert code == 69
    assert list(missing) == ["no other program first"]
    return missing["no other program first"]


def test_this_kernel_has_everything_and_nothing_stays(top: Path) -> None:
    def mounted() -> list[str]:
        lines = Path("/proc/self/mounts").read_text().splitlines()
        return [line for line in lines if " bpf " in line]

    before = mounted()
    assert probe(top) == (0, {})
    assert sorted(path.name for path in top.iterdir() if path.is_dir()) == ["pods"]
    assert not PINS.exists()
    assert mounted() == before


def test_what_a_killed_probe_left_is_swept_away(top: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    (top / f"planes/node/dataplane-probe-{gone.pid}").mkdir(parents=True)
    assert probe(top) == (0, {})
    assert sorted(path.name for path in (top / "planes").rglob("dataplane-*")) == []


def test_each_missing_folder_is_named_with_what_to_do(top: Path, tmp_path: Path) -> None:
    code, missing = probe(
        top,
        pods=top / "absent",
        leaves=tmp_path / "planes",
        folder=tmp_path / "pins",
    )
    assert code == 69
    assert f"{top}/absent isn't there; " in missing["pods' cgroup"]
    assert "--pods-cgroup" in missing["pods' cgroup"]
    assert f"{tmp_path}/planes isn't on cgroup2; " in missing["data plane's cgroup"]
    assert "--dataplane-cgroup-parent" in missing["data plane's cgroup"]
    assert f"{tmp_path} is not on a BPF file system" in missing["bpffs"]
    assert "mount -t bpf" in missing["bpffs"]
    assert not list(tmp_path.iterdir())


def test_root_cgroups_and_pods_among_data_planes_are_refused(top: Path) -> None:
    (mount, *_) = cgroup2_mounts()
    _, missing = probe(top, pods=mount)
    assert "is the root: the host's processes are in it" in missing["pods' cgroup"]
    _, missing = probe(top, leaves=top)
    assert "the pods' cgroup lies in it" in missing["data plane's cgroup"]


def test_without_the_right_to_load_programs_the_reason_is_that(top: Path) -> None:
    options = [f"--pods-cgroup={top}/pods", f"--leaf-parent={top}/planes"]
    command = [dataplane_binary(), "capture", "probe", *options]
    drop = ["setpriv", "--bounding-set=-sys_admin,-bpf", "--inh-caps=-sys_admin,-bpf"]
    done = subprocess.run([*drop, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert "NO   bpf(2): Operation not permitted" in done.stdout
    assert "grant CAP_SYS_ADMIN" in done.stdout
    # What couldn't be tried isn't blamed.
    assert "program" not in done.stdout


@pytest.mark.parametrize("cgroup", ["pods", "pods/one"])
@pytest.mark.parametrize("at", [10, SENDMSG6])
def test_somebody_elses_program_before_ours_is_named(top: Path, cgroup: str, at: int) -> None:
    with foreign_program(top / cgroup, at):
        reason = refused(top)
    assert f"the program {NAME} (id " in reason
    assert f" on {top / cgroup} runs before ours at " in reason
    assert ("connect4" if at == 10 else "sendmsg6") in reason
    assert "attach it to the root cgroup" in reason
    assert "--capture nftables" in reason
    assert probe(top) == (0, {})


def test_somebody_elses_program_on_an_ancestor_is_fine_unless_it_claims_to_be_first(
    top: Path,
) -> None:
    with foreign_program(top):
        assert probe(top) == (0, {})
    with foreign_program(top, flags=PREORDER):
        assert f"{NAME} (id " in refused(top)


def test_a_program_that_only_bears_a_name_of_ours_is_somebody_elses(top: Path) -> None:
    with foreign_program(top / "pods", name="connect4"):
        assert "the program connect4 (id " in refused(top)
