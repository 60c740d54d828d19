"""Two nodes with a client on one and a server on the other, in the mesh and beside it."""

import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.cli.demo import manifests
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.world import Node, World, down

PREFIX = "bench"
NAMESPACE = "bench"


@dataclass(frozen=True)
class Pair:
    client: Pod
    server: Pod


@dataclass(frozen=True)
class Rig:
    """`inside` is captured; `beside` runs over the same nodes and wire without capture."""

    mesh: Mesh
    inside: Pair
    beside: Pair

    async def processes(self, node: Node) -> tuple[int, int]:
        """Process ids of a node's agent and data plane."""
        status = await self.mesh.admin(node, "status")
        return self.mesh.processes[node.name].pid, status["dataplane"]["pid"]


@contextlib.asynccontextmanager
async def rig(options: Sequence[str] = ()) -> AsyncIterator[Rig]:
    """Namespaces and manifests; starts no process. Leaves nothing behind."""
    world = World(PREFIX)
    with tempfile.TemporaryDirectory(prefix="underpass-bench-") as name:
        folder = Path(name)
        # Short, for sockets lie in it.
        mesh = Mesh(world, folder, folder / "run", agent_options=options)
        try:
            world.up()
            mesh.prepare()
            yield _fill(mesh)
        finally:
            down(PREFIX)
            for process in mesh.processes.values():
                await process.wait()


def _fill(mesh: Mesh) -> Rig:
    one, two = mesh.world.nodes

    def pod(node: Node, name: str, *, ambient: bool) -> Pod:
        return Pod(mesh.world.add_pod(node, name), NAMESPACE, name, ambient=ambient)

    inside = Pair(pod(one, "client", ambient=True), pod(two, "server", ambient=True))
    beside = Pair(pod(one, "bare-client", ambient=False), pod(two, "bare-server", ambient=False))
    mesh.apply("namespace", manifests.namespace(NAMESPACE))
    mesh.add(inside.client, inside.server, beside.client, beside.server)
    return Rig(mesh, inside, beside)
