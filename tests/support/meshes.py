"""Meshes that tests start with options of their own."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from agent.cli.demo.mesh import Mesh
from agent.cli.demo.shop import Shop, build, serve_echo, serve_http

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from agent.cli.demo.world import World

M = TypeVar("M", bound=Mesh)


@asynccontextmanager
async def mesh_of(
    kind: type[M], world: World, capture: str, folder: Path, *options: str, settings: str = ""
) -> AsyncIterator[M]:
    """Two nodes without pods, whose agents will be started with these options and with `settings`
    as their configuration file. Nothing of it runs afterwards."""
    told = ["--log-filter=info", f"--capture={capture}", *options]
    if settings:
        file = folder / "agent.yaml"
        file.write_text(settings)
        told.append(f"--config={file}")
    made = kind(world, folder, folder / "run", agent_options=tuple(told))
    made.prepare()
    try:
        yield made
    finally:
        world.down()
        for process in made.processes.values():
            await process.wait()


async def stocked(mesh: Mesh) -> Shop:
    """The demo's six pods with servers on api (nginx), db and cart (echo); no agent runs yet."""
    made = build(mesh)
    await serve_http(mesh, made.api)
    for pod in (made.db, made.cart):
        await serve_echo(mesh, pod)
    return made
