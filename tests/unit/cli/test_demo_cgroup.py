"""Where the demo's processes live, on machines that have cgroups and on those that don't."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.cli.demo import cgroup, commands
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.world import World


@pytest.mark.parametrize("above", [None, Path("/proc/version/pods")])
def test_without_a_cgroup_for_pods_agents_are_told_of_none(
    above: Path | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cgroup, "folder", lambda _: above)
    monkeypatch.delenv("UNDERPASS_PODS_CGROUP", raising=False)
    mesh = Mesh(World("t"), tmp_path, tmp_path)
    before = cgroup.own()
    with commands.pods_apart(mesh):
        assert cgroup.own() == before
        assert "UNDERPASS_PODS_CGROUP" not in os.environ
        assert list(mesh.apart()) == []
