"""The mesh's root changes under traffic: nothing is dropped, and at the end the old one is worth
nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.mesh import Mesh
from tests.support.meshes import mesh_of, stocked
from tests.support.rotation import rotates_and_drops_nothing

if TYPE_CHECKING:
    from pathlib import Path

    from agent.cli.demo.world import World

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def start_authority(mesh: Mesh) -> tuple[str, ...]:
    """In the first node's namespace; returns what agents must be told of it."""
    node = mesh.world.nodes[0]
    address = f"{node.ipv4}:15013"
    folder = mesh.folder / "authority"
    folder.mkdir()
    arguments = [sys.executable, "-m", "tests.support.rotating_ca", address, str(folder)]
    await mesh.spawn("authority", arguments, node.namespace)
    stage = folder / "stage"
    await mesh.until("the authority", stage.exists, "authority")
    return (f"--ca-address=https://{address}", f"--ca-root={folder / 'root.pem'}")


async def test_a_root_rotates_under_traffic_and_drops_nothing(
    world: World, capture: str, tmp_path: Path
) -> None:
    async with mesh_of(Mesh, world, capture, tmp_path, "--trust-overlap=6s") as mesh:
        shop = await stocked(mesh)
        told = await start_authority(mesh)
        mesh.agent_options = (*mesh.agent_options, *told)
        await mesh.start()
        stage = mesh.folder / "authority" / "stage"
        await rotates_and_drops_nothing(mesh, shop, "authority", stage)
