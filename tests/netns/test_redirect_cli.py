"""The commands against a real agent and, after its death, its real data plane."""

from __future__ import annotations

import asyncio
import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.mesh import UNDERPASS

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh

pytestmark = pytest.mark.asyncio(loop_scope="module")

LISTS = ("pods", "workloads", "services", "policies", "certificates", "connections")


async def underpass(mesh: Mesh, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*UNDERPASS, f"--run-dir={mesh.run_dir}", *arguments]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, check=False
    )


async def test_commands_find_the_agent_and_outlive_it(mesh: Mesh, capture: str) -> None:
    node = mesh.world.nodes[0]
    missing = await underpass(mesh, "status")
    assert missing.returncode == 1
    assert "underpass agent --node" in missing.stderr

    await mesh.start_control_plane()
    await mesh.start_agent(node)

    async def ready() -> bool:
        return (await underpass(mesh, "status")).returncode == 0

    await mesh.until("a status without problems", ready, node.name)
    screen = (await underpass(mesh, "status")).stdout
    assert f"Node {node.name}: ready" in screen
    assert capture in screen
    assert "Nothing is wrong." in screen
    for section in LISTS:
        found = await underpass(mesh, section, "-o", "json")
        assert (found.returncode, found.stderr) == (0, ""), section
        assert isinstance(json.loads(found.stdout), list)

    await mesh.kill(node.name)
    screen = (await underpass(mesh, "status")).stdout
    assert f"Node {node.name}: agent away, data plane serving" in screen
    assert (await underpass(mesh, "status")).returncode == 1
    for section in LISTS:
        found = await underpass(mesh, section, "-o", "json")
        assert found.returncode == 0, section
        assert "data plane still serves" in found.stderr
        assert isinstance(json.loads(found.stdout), list)
