"""What a push of a large mesh costs a node: memory and CPU of agent and data plane, and how long
connections stall meanwhile.

`python -m bench.push --workloads 100000 --services 10000`. A real agent and data plane; only the
configuration comes from a server of the bench, which sends prepared bytes.
"""

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agent.cli.demo.mesh import CONTROL_PLANE_PORT, MeshError
from agent.cli.demo.shop import HTTP_PORT
from bench import delta_server, load, prober, resources, usage
from bench.delta_server import DeltaServer
from bench.prober import Stalls
from bench.rig import Pair, Rig, rig

XDS_PORT = CONTROL_PLANE_PORT + 1
# Before the push, for comparison: enough for a 99th percentile.
QUIET = 3.0


class PushError(Exception):
    """The push wasn't taken as it should; the text says what the node answered."""


@dataclass(frozen=True)
class ProcessCost:
    """Megabytes resident before, at most during, and settled after; CPU seconds from push to
    settled, less what the same time costs without one."""

    before: float
    peak: float
    settled: float
    cpu: float


@dataclass(frozen=True)
class Result:
    workloads: int
    services: int
    # Of the response as sent.
    megabytes: float
    # From sending to the ACK.
    seconds: float
    agent: ProcessCost
    dataplane: ProcessCost
    # New connections through the captured pod, and beside the mesh: the machine's own noise.
    inside_before: Stalls
    inside_during: Stalls
    beside_before: Stalls
    beside_during: Stalls


async def measure(built: Rig, workloads: int, services: int, settle: float) -> Result:
    """On a rig that hasn't been started, whose agents are to ask port XDS_PORT."""
    mesh, node = built.mesh, built.mesh.world.nodes[0]
    for pair in (built.inside, built.beside):
        await load.serve(mesh, pair.server)
    pods = resources.own([built.inside.client, built.inside.server])
    server = DeltaServer(delta_server.initial(resources.response(pods, "first")))
    listening = await server.start(node.namespace, node.ipv4, XDS_PORT, _root(mesh.folder))
    try:
        await mesh.start()
        response = resources.response(resources.made_up(workloads, services), "big")
        pids = await built.processes(node)
        probes = {name: await _probe(built, name) for name in ("inside", "beside")}
        await asyncio.sleep(1)  # first tunnels and pools aren't the push's
        quiet = await _watch(pids, QUIET)
        before = [usage.memory(pid).now for pid in pids]
        for pid in pids:
            usage.forget_peak(pid)
        used = [usage.process_seconds(pid) for pid in pids]
        pushed = time.monotonic()
        server.push(node.name, response)
        async with asyncio.timeout(300):
            acknowledged, complaint = await server.answer(node.name, "big")
        if complaint:
            raise PushError(f"rejected: {complaint[:400]}")
        # What follows an ACK (freeing the old, returning memory) belongs to the push too.
        await asyncio.sleep(2)
        loaded = time.monotonic()
        cpu = [
            usage.process_seconds(pid) - then - rate * (loaded - pushed)
            for pid, then, rate in zip(pids, used, quiet, strict=True)
        ]
        for name in probes:
            await mesh.kill(f"probe-{name}", signal.SIGTERM)
        await asyncio.sleep(settle)
        memory = [usage.memory(pid) for pid in pids]
    finally:
        await listening.stop(None)
    costs = [
        ProcessCost(start, seen.peak, seen.now, max(seconds, 0.0))
        for start, seen, seconds in zip(before, memory, cpu, strict=True)
    ]
    seen = {name: prober.read(file) for name, file in probes.items()}
    spans = {"before": (pushed - QUIET, pushed), "during": (pushed, loaded)}
    return Result(
        workloads=workloads,
        services=services,
        megabytes=len(response) / 1e6,
        seconds=acknowledged - pushed,
        agent=costs[0],
        dataplane=costs[1],
        inside_before=prober.stalls(seen["inside"], *spans["before"]),
        inside_during=prober.stalls(seen["inside"], *spans["during"]),
        beside_before=prober.stalls(seen["beside"], *spans["before"]),
        beside_during=prober.stalls(seen["beside"], *spans["during"]),
    )


async def _probe(built: Rig, name: str) -> Path:
    """Starts a prober inside or beside the mesh; returns where it writes."""
    pair: Pair = getattr(built, name)
    file = built.mesh.folder / f"probe-{name}.txt"
    await built.mesh.spawn(
        f"probe-{name}",
        [
            *(sys.executable, "-m", "bench.prober"),
            *(pair.server.sandbox.ipv4, str(HTTP_PORT), str(file)),
        ],
        pair.client.sandbox.namespace,
    )

    def answered() -> bool:
        return file.exists() and file.stat().st_size > 0

    await built.mesh.until(
        f"the first probe {name}",
        lambda: file.exists() and file.stat().st_size > 0,
        f"probe-{name}",
    )
    return file


async def _watch(pids: Sequence[int], seconds: float) -> list[float]:
    """CPU seconds a second of each process while nothing is pushed."""
    before = [usage.process_seconds(pid) for pid in pids]
    await asyncio.sleep(seconds)
    return [
        (usage.process_seconds(pid) - then) / seconds
        for pid, then in zip(pids, before, strict=True)
    ]


def _root(folder: Path) -> Path:
    return folder / "bench-root.pem"


def tables(result: Result) -> list[Table]:
    costs = Table(
        title=f"{result.workloads:,} workloads, {result.services:,} services: "
        f"{result.megabytes:.1f} MB, acknowledged after {result.seconds:.2f} s",
        title_justify="left",
    )
    for heading in ("process", "before", "peak", "settled", "CPU"):
        costs.add_column(heading, justify="left" if heading == "process" else "right")
    for name, cost in (("agent", result.agent), ("data plane", result.dataplane)):
        sizes = (f"{size:.1f} MB" for size in (cost.before, cost.peak, cost.settled))
        costs.add_row(name, *sizes, f"{cost.cpu:.2f} s")
    costs.add_row("both", "", "", "", f"{result.agent.cpu + result.dataplane.cpu:.2f} s")
    delays = Table(title="new connections, milliseconds to the first byte", title_justify="left")
    for heading in ("", "number", "failed", "median", "99 %", "longest"):
        delays.add_column(heading, justify="right" if heading else "left")
    for name, seen in (
        ("captured pod, before", result.inside_before),
        ("captured pod, during the push", result.inside_during),
        ("beside the mesh, before", result.beside_before),
        ("beside the mesh, during the push", result.beside_during),
    ):
        times = (f"{value:.2f}" for value in (seen.median, seen.p99, seen.longest))
        delays.add_row(name, str(seen.count), str(seen.failures), *times)
    return [costs, delays]


async def _main(options: argparse.Namespace) -> int:
    try:
        async with rig() as built:
            # The rig knows the addresses; certificates still come from the embedded control plane.
            first, mesh = built.mesh.world.nodes[0], built.mesh
            mesh.agent_options = [
                "--log-filter=info",
                f"--xds-address=https://{first.ipv4}:{XDS_PORT}",
                f"--xds-root={_root(mesh.folder)}",
                f"--ca-address=https://{first.ipv4}:{CONTROL_PLANE_PORT}",
                f"--ca-root={mesh.control_plane_state / 'root-cert.pem'}",
            ]
            result = await measure(built, options.workloads, options.services, options.settle)
    except (PushError, load.LoadError, MeshError) as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(asdict(result), indent=2))
    else:
        console = Console(width=120)
        for shown in tables(result):
            console.print(shown)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.push", description=__doc__)
    parser.add_argument("--workloads", type=int, default=100_000)
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument(
        "--settle", type=float, default=60, help="seconds until memory counts as settled"
    )
    parser.add_argument("--json", action="store_true")
    return asyncio.run(_main(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
