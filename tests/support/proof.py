"""That a connection was carried by the mesh: by the server's view, the wire and both logs."""

from __future__ import annotations

import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from agent.cli.demo.mesh import access_lines
from agent.cli.demo.story import spiffe
from tests.support.leaks import Leaks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.mesh import Mesh
    from tests.support.intruder import Heard


def new_marker() -> str:
    return f"marker-{uuid.uuid4().hex[:12]}"


@asynccontextmanager
async def nothing_in_clear(mesh: Mesh, marker: str) -> AsyncIterator[Leaks]:
    """Between pods of the mesh on different nodes no TCP but the mesh's own passes during the
    block, not even a SYN, and the marker in no packet of any kind."""
    tap = Leaks(mesh.world.nodes[0].namespace, "wire", marker)
    with tap:
        yield tap
    strangers = {
        address
        for pod in mesh.pods
        if not pod.ambient
        for address in (pod.sandbox.ipv4, pod.sandbox.ipv6)
    }
    outside = {
        seen
        for seen in tap.tcp_outside_the_mesh()
        if not strangers & {seen.source, seen.destination}
    }
    assert not outside, f"past the mesh: {sorted(outside)}"
    assert tap.sightings == 0, f"{marker} crossed the wire {tap.sightings} times in clear"


def assert_talked(said: Heard, server: Pod, sees: str) -> None:
    """Greeted by that server, which saw that address as its client, and echoed to."""
    assert said.greeting == f"{server.name} sees {sees}", said
    assert said.echoed, said


class Logs:
    """Access log lines of both ends that come after this was made."""

    def __init__(self, mesh: Mesh, client: Pod, server: Pod) -> None:
        self._mesh = mesh
        self._ends = (client, server)
        self._before = {direction: self._count(direction) for direction in ("outbound", "inbound")}

    def _count(self, direction: str) -> int:
        client, server = self._ends
        node = (client if direction == "outbound" else server).sandbox.node
        needles = (
            f'direction="{direction}"',
            f'src.identity="{spiffe(client)}"',
            f'dst.identity="{spiffe(server)}"',
        )
        return len(access_lines(self._mesh.log(node.name), *needles))

    async def both_name(self, connections: int = 1) -> None:
        """Client's and server's node each logged that many with both identities."""
        for direction, before in self._before.items():

            def logged(direction: str = direction, wanted: int = before + connections) -> bool:
                return self._count(direction) >= wanted

            await self._mesh.until(f"{connections} {direction} lines", logged, seconds=15)
