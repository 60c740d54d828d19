"""Throughput, requests and new connections between two nodes, through the mesh and beside none.

`python -m bench.traffic --seconds 5`. Scenario by scenario both are measured one after the other,
so that they see the same machine.
"""

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from agent.cli.demo.mesh import MeshError
from bench import load, usage
from bench.load import Count, LoadError
from bench.rig import Pair, Rig, rig

Run = Callable[[Pair, float], Awaitable[Count]]


@dataclass(frozen=True)
class Scenario:
    """`factor` turns amounts a second into the unit shown; costs are per amount."""

    name: str
    run: Run
    unit: str
    factor: float
    cost_unit: str
    cost_factor: float
    # Design section 7: ztunnel's rate by no mesh's, and its CPU per amount in `cost_unit`.
    ztunnel_ratio: float
    ztunnel_cost: float


SCENARIOS = (
    Scenario(
        "one TCP stream",
        lambda pair, seconds: load.streams(pair.client, pair.server, 1, seconds),
        *("Gb/s", 8.0, "CPU-s/GB", 1.0),
        ztunnel_ratio=4.8 / 16.5,
        ztunnel_cost=1.97,
    ),
    Scenario(
        "eight TCP streams",
        lambda pair, seconds: load.streams(pair.client, pair.server, 8, seconds),
        *("Gb/s", 8.0, "CPU-s/GB", 1.0),
        ztunnel_ratio=5.2 / 22,
        ztunnel_cost=2.09,
    ),
    Scenario(
        "HTTP keep-alive, 16 connections",
        lambda pair, seconds: load.requests(pair.client, pair.server, 16, seconds),
        *("/s", 1.0, "µs/request", 1e6),
        ztunnel_ratio=14_800 / 71_000,
        ztunnel_cost=70,
    ),
    Scenario(
        "a new connection per request, 8 clients",
        lambda pair, seconds: load.connections(pair.client, pair.server, 8, seconds),
        *("/s", 1.0, "µs/connection", 1e6),
        ztunnel_ratio=2_370 / 10_500,
        ztunnel_cost=473,
    ),
)


@dataclass(frozen=True)
class Figure:
    """One scenario; rates in its unit, costs in its cost unit."""

    scenario: str
    unit: str
    cost_unit: str
    beside: float
    inside: float
    ratio: float
    proxies: float
    machine: float
    machine_beside: float
    ztunnel_ratio: float
    ztunnel_cost: float


@dataclass(frozen=True)
class _Sample:
    """One run: rate and CPU for one amount."""

    rate: float
    proxies: float
    machine: float


async def measure(rig: Rig, seconds: float, rounds: int, *, mesh: bool) -> list[Figure]:
    """Everything of this file, on a rig that hasn't been started."""
    for pair in (rig.beside, rig.inside):
        await load.serve(rig.mesh, pair.server)
    pids: list[int] = []
    if mesh:
        await rig.mesh.start()
        pids = [pid for node in rig.mesh.world.nodes for pid in await rig.processes(node)]
        # Certificates, first tunnels and allocator arenas aren't what is measured.
        await load.requests(rig.inside.client, rig.inside.server, 16, 1)
    figures = []
    for scenario in SCENARIOS:
        beside, inside = [], []
        for _ in range(rounds):
            beside.append(await _sample(scenario, rig.beside, seconds, pids))
            # Without a mesh the second pair is bare as well: then both columns must agree.
            inside.append(await _sample(scenario, rig.inside, seconds, pids))
        figures.append(_figure(scenario, _median(beside), _median(inside)))
    return figures


async def _sample(scenario: Scenario, pair: Pair, seconds: float, pids: Sequence[int]) -> _Sample:
    before = usage.cpu(pids)
    count = await scenario.run(pair, seconds)
    used = usage.cpu(pids) - before
    if not count.amount:
        raise LoadError(f"{scenario.name}: nothing arrived at {pair.server.name}")
    return _Sample(count.rate, used.proxies / count.amount, used.machine / count.amount)


def _median(samples: Sequence[_Sample]) -> _Sample:
    """The sample in the middle by rate; its costs belong to it."""
    middle = statistics.median_low(sample.rate for sample in samples)
    return next(sample for sample in samples if sample.rate == middle)


def _figure(scenario: Scenario, beside: _Sample, inside: _Sample) -> Figure:
    return Figure(
        scenario=scenario.name,
        unit=scenario.unit,
        cost_unit=scenario.cost_unit,
        beside=beside.rate * scenario.factor,
        inside=inside.rate * scenario.factor,
        ratio=inside.rate / beside.rate,
        proxies=inside.proxies * scenario.cost_factor,
        machine=inside.machine * scenario.cost_factor,
        machine_beside=beside.machine * scenario.cost_factor,
        ztunnel_ratio=scenario.ztunnel_ratio,
        ztunnel_cost=scenario.ztunnel_cost,
    )


def table(figures: Sequence[Figure]) -> Table:
    shown = Table(title="across nodes; CPU per unit of work", title_justify="left")
    for heading in ("scenario", "no mesh", "mesh", "ratio", "ztunnel's"):
        shown.add_column(heading, justify="left" if heading == "scenario" else "right")
    for heading in ("proxies", "ztunnel's", "machine", "no mesh"):
        shown.add_column(f"CPU {heading}", justify="right")
    for figure in figures:
        shown.add_row(
            figure.scenario,
            f"{_short(figure.beside)} {figure.unit}",
            f"{_short(figure.inside)} {figure.unit}",
            f"{figure.ratio:.3f}",
            f"{figure.ztunnel_ratio:.3f}",
            f"{_short(figure.proxies)} {figure.cost_unit}",
            _short(figure.ztunnel_cost),
            _short(figure.machine),
            _short(figure.machine_beside),
        )
    return shown


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


async def _main(options: argparse.Namespace) -> int:
    try:
        async with rig(["--log-filter=info"]) as built:
            figures = await measure(
                built, options.seconds, options.rounds, mesh=not options.no_mesh
            )
    except (LoadError, MeshError) as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([asdict(figure) for figure in figures], indent=2))
    else:
        Console(width=160).print(table(figures))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.traffic", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="of each run")
    parser.add_argument("--rounds", type=int, default=1, help="of each scenario; medians are shown")
    parser.add_argument("--no-mesh", action="store_true", help="start no mesh: shows the noise")
    parser.add_argument("--json", action="store_true")
    return asyncio.run(_main(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
