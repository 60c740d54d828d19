"""What capture alone costs a new connection: a pod of the mesh calls a server that no mesh knows,
on the same node, so that the data plane only relays, without TLS or policy.

A node of its own for each capture mode, both up at once, and a client and server beside them; they
take turns, round by round.
"""

import asyncio
import signal
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from agent.cli.demo import manifests
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.shop import HTTP_PORT
from agent.cli.demo.world import World, down
from bench import load, prober, usage
from bench.load import LoadError
from bench.prober import Probe

WORLD = "relay"
NAMESPACE = "bench"
NO_MESH = "no mesh"
# As in bench.traffic.
CLIENTS = 8


@dataclass(frozen=True)
class Connecting:
    """New connections of one kind, one request each; microseconds of CPU for one connection, and
    milliseconds to the first byte of the answer, one after another."""

    mode: str
    rate: float
    # By that without a mesh.
    ratio: float
    median: float
    p99: float
    # Of the agent and the data plane of its node; of everything on the machine.
    proxies: float
    machine: float
    failures: int


@dataclass
class _Way:
    """One way to connect, and what was seen on it."""

    mode: str
    mesh: Mesh
    client: Pod
    server: Pod
    pids: tuple[int, ...] = ()
    # Rate, CPU of the proxies and of the machine for one connection.
    samples: list[tuple[float, float, float]] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)


async def measure(
    modes: Sequence[str], folder: Path, cgroup: Path, seconds: float, rounds: int
) -> list[Connecting]:
    """Leaves nothing behind."""
    async with AsyncExitStack() as stack:
        ways: list[_Way] = []
        for mode in modes:
            mesh = await stack.enter_async_context(_node(mode, folder / mode, cgroup))
            if not ways:
                ways.append(_Way(NO_MESH, mesh, *_pair(mesh, "bare", ambient=False)))
            ways.append(_Way(mode, mesh, *_pair(mesh, "inside", ambient=True)))
        for way in ways:
            if way.mode != NO_MESH:
                await way.mesh.start()
        for way in ways:
            await load.serve(way.mesh, way.server)
            if way.mode != NO_MESH:
                (node,) = way.mesh.world.nodes
                dataplane = (await way.mesh.admin(node, "status"))["dataplane"]["pid"]
                way.pids = (way.mesh.processes[node.name].pid, dataplane)
            # Allocators and caches reach their size first.
            await load.connections(way.client, way.server, CLIENTS, 1)
        for number in range(rounds):
            for way in ways:
                await _sample(way, seconds)
                way.probes += await _probe(way, number, seconds)
    bare = statistics.median(rate for rate, _, _ in ways[0].samples)
    return [_result(way, bare) for way in ways]


@asynccontextmanager
async def _node(mode: str, folder: Path, cgroup: Path) -> AsyncIterator[Mesh]:
    """One node and its agent, not started."""
    world = World(f"{WORLD}-{mode}", nodes=1)
    options = ("--log-filter=info", f"--capture={mode}", f"--pods-cgroup={cgroup}")
    mesh = Mesh(world, folder, folder / "run", agent_options=options)
    try:
        world.up()
        mesh.prepare()
        mesh.apply("namespace", manifests.namespace(NAMESPACE))
        yield mesh
    finally:
        down(world.prefix)
        for process in mesh.processes.values():
            await process.wait()


def _pair(mesh: Mesh, name: str, *, ambient: bool) -> tuple[Pod, Pod]:
    """A client, and a server that nobody is told of."""
    (node,) = mesh.world.nodes
    client = Pod(mesh.world.add_pod(node, name), NAMESPACE, name, ambient=ambient)
    other = f"{name}-server"
    server = Pod(mesh.world.add_pod(node, other), NAMESPACE, other, ambient=False)
    if ambient:
        mesh.add(client)
    return client, server


async def _sample(way: _Way, seconds: float) -> None:
    before = usage.cpu(way.pids)
    count = await load.connections(way.client, way.server, CLIENTS, seconds)
    used = usage.cpu(way.pids) - before
    if not count.amount:
        raise LoadError(f"{way.mode}: no connection in {seconds:g} s")
    sample = (count.rate, used.proxies / count.amount, used.machine / count.amount)
    way.samples.append(sample)


async def _probe(way: _Way, number: int, seconds: float) -> list[Probe]:
    file = way.mesh.folder / f"probe-{way.mode.replace(' ', '-')}-{number}.txt"
    command = [
        *(sys.executable, "-m", "bench.prober"),
        *(way.server.sandbox.ipv4, str(HTTP_PORT), str(file)),
    ]
    await way.mesh.spawn("probe", command, way.client.sandbox.namespace)

    def answered() -> bool:
        return file.exists() and file.stat().st_size > 0

    await way.mesh.until(f"the first probe, {way.mode}", answered, "probe")
    await asyncio.sleep(seconds)
    await way.mesh.kill("probe", signal.SIGTERM)
    return prober.read(file)


def _result(way: _Way, bare: float) -> Connecting:
    rate, proxies, machine = sorted(way.samples)[(len(way.samples) - 1) // 2]
    seen = prober.stalls(way.probes, float("-inf"), float("inf"))
    return Connecting(
        mode=way.mode,
        rate=rate,
        ratio=rate / bare,
        median=seen.median,
        p99=seen.p99,
        proxies=proxies * 1e6,
        machine=machine * 1e6,
        failures=seen.failures,
    )
