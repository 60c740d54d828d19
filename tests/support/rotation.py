"""Roots of a mesh that change under traffic, whoever the authority is."""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

from agent.cli.demo.clients import Conversation, Load
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT
from agent.cli.demo.story import progress

if TYPE_CHECKING:
    from pathlib import Path

    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop


async def rotates_and_drops_nothing(mesh: Mesh, shop: Shop, authority: str, stage: Path) -> None:
    """At SIGUSR1 the process `authority` hands out a second root, then signs by it, then drops the
    first; it writes into `stage` which of them it has done."""

    async def step(number: int) -> None:
        mesh.processes[authority].send_signal(signal.SIGUSR1)
        done = partial(_reads, stage, str(number))
        await mesh.until(f"{authority}'s step {number}", done, authority)

    host = shop.db.sandbox.ipv4
    async with (
        Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load,
        AsyncExitStack() as open_until_the_end,
    ):
        await progress(load, 10)
        first = await open_until_the_end.enter_async_context(
            Conversation(shop.web, host, ECHO_PORT)
        )
        await step(1)
        await said(mesh, "roots rotate", 1)
        await progress(load, 10)
        await step(2)
        await renewed(mesh)
        await progress(load, 10)
        assert await first.echo("proved by the old root, and still here")
        second = await open_until_the_end.enter_async_context(
            Conversation(shop.web, host, ECHO_PORT)
        )
        await step(3)
        await said(mesh, "roots rotate", 2)
        await progress(load, 10)
        await said(mesh, "old roots end", 1)
        assert await first.ended(15), "what the old root proved ends with it"
        assert await second.echo("proved by the new root")
        await progress(load, 10)
        assert load.failures == []


async def said(mesh: Mesh, text: str, times: int) -> None:
    """Both agents said it so often."""
    for node in mesh.world.nodes:
        log = mesh.log(node.name)
        await mesh.until(
            f"{text!r} from {node.name}",
            lambda log=log: log.read_text().count(text) >= times,  # type: ignore[misc]
            node.name,
        )


async def serials(mesh: Mesh) -> set[str]:
    held = [await mesh.admin(node, "certificates") for node in mesh.world.nodes]
    return {entry["serial"] for entries in held for entry in entries}


async def renewed(mesh: Mesh, before: set[str] | None = None) -> None:
    """Every certificate is another one than `before`, which is now unless told."""
    before = before or await serials(mesh)

    async def none_left() -> bool:
        return not before & await serials(mesh)

    await mesh.until("every certificate renewed", none_left)


def _reads(file: Path, text: str) -> bool:
    return file.read_text() == text
