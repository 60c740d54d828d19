"""What capture itself costs, by eBPF and by nftables in one run: to enrol very many pods at once,
and to carry a new connection.

`python -m bench.capture --pods 1000 --seconds 5 --rounds 3`.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agent.cli.demo.cgroup import of_this_process
from agent.cli.demo.mesh import MeshError
from agent.cli.demo.world import WorldError
from bench import enrol, load, relay
from bench.enrol import Enrolled
from bench.relay import Connecting

MODES = ("ebpf", "nftables")


@dataclass(frozen=True)
class Machine:
    kernel: str
    processors: int
    # Of the last minute, before anything was started: what else ran.
    load: float


@dataclass(frozen=True)
class Result:
    machine: Machine
    enrolled: list[Enrolled]
    connecting: list[Connecting]


def machine() -> Machine:
    return Machine(platform.release(), os.cpu_count() or 0, os.getloadavg()[0])


async def measure(pods: int, seconds: float, rounds: int) -> Result:
    seen = machine()
    folder = tempfile.TemporaryDirectory(prefix="underpass-bench-")
    with folder as name, of_this_process("underpass-bench") as cgroup:
        connecting: list[Connecting] = []
        if rounds:
            connecting = await relay.measure(MODES, Path(name), cgroup, seconds, rounds)
        enrolled: list[Enrolled] = []
        if pods:
            enrolled = await enrol.measure(MODES, pods, Path(name) / "enrol", cgroup)
    return Result(seen, enrolled, connecting)


def tables(result: Result) -> list[Table]:
    made = result.machine
    title = f"kernel {made.kernel}, {made.processors} processors, load {made.load:.1f} before"
    enrolled = Table(title=title, title_justify="left")
    for heading in ("capture", "pods", "all", "each", "goal"):
        enrolled.add_column(heading, justify="left" if heading == "capture" else "right")
    for heading in ("agent", "data plane", "machine", "leaving"):
        enrolled.add_column(heading, justify="right")
    for one in result.enrolled:
        costs = (one.agent, one.dataplane, one.machine)
        enrolled.add_row(
            one.mode,
            f"{one.pods:,}",
            f"{one.seconds:.1f} s",
            f"{one.each:.1f} ms",
            f"≤ {one.goal:g} ms",
            *(f"{cost:.1f} CPU-s" for cost in costs),
            f"{one.leaving:.1f} s",
        )
    connecting = Table(
        title="new connections through capture alone; CPU for each", title_justify="left"
    )
    for heading in ("capture", "rate", "ratio", "median", "99 %"):
        connecting.add_column(heading, justify="left" if heading == "capture" else "right")
    for heading in ("CPU proxies", "CPU machine", "failed"):
        connecting.add_column(heading, justify="right")
    for way in result.connecting:
        connecting.add_row(
            way.mode,
            f"{way.rate:,.0f} /s",
            f"{way.ratio:.3f}",
            f"{way.median:.2f} ms",
            f"{way.p99:.2f} ms",
            f"{way.proxies:,.0f} µs",
            f"{way.machine:,.0f} µs",
            str(way.failures),
        )
    return [table for table in (enrolled, connecting) if table.row_count]


async def _main(options: argparse.Namespace) -> int:
    try:
        result = await measure(options.pods, options.seconds, options.rounds)
    except (enrol.EnrolError, load.LoadError, MeshError, WorldError) as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(asdict(result), indent=2))
    else:
        console = Console(width=140)
        for shown in tables(result):
            console.print(shown)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.capture", description=__doc__)
    parser.add_argument("--pods", type=int, default=1000, help="to enrol at once; 0 for none")
    parser.add_argument("--seconds", type=float, default=5, help="of each run of connections")
    parser.add_argument("--rounds", type=int, default=3, help="of connections; 0 for none")
    parser.add_argument("--json", action="store_true")
    return asyncio.run(_main(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
