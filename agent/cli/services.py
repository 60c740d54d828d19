"""`underpass services`: with -o wide each endpoint, where it is and whether it takes traffic."""

from collections.abc import Mapping

import click

from agent.cli import show
from agent.cli.ask import ask
from agent.cli.look import field, plain, qualified, waypoint
from agent.cli.reach import Where, where
from agent.cli.show import Column, Row


@click.command(help="Services this node knows; with -o wide their endpoints and health.")
@where
@show.output
@click.pass_obj
def services(sought: Where | None, output: str) -> None:
    place = sought or Where()
    answer = ask(place, "services")
    answer.note()
    workloads: Mapping[str, Row] = {}
    if output == "wide" and answer.data:
        # An endpoint is a uid; people know names and addresses.
        workloads = {row.get("uid", ""): row for row in ask(place, "workloads").data}

    def endpoints(row: Row) -> str:
        found = (row.get("endpoints") or {}).values()
        return "\n".join(sorted(_endpoint(one, workloads) for one in found)) or "-"

    columns = [
        Column("SERVICE", qualified),
        Column("ADDRESSES", lambda row: show.joined([plain(v) for v in row.get("vips") or []])),
        Column("PORTS", _ports),
        Column("HEALTHY", _healthy, right=True),
        Column("WAYPOINT", waypoint),
        Column("HOSTNAME", field("hostname"), wide=True),
        Column("ENDPOINTS", endpoints, wide=True),
    ]
    empty = "No services yet: the control plane sent none. See `underpass status`."
    show.rows(answer.data, columns, output, empty)


def _ports(row: Row) -> str:
    found = row.get("ports") or {}
    return show.joined(
        [
            service if str(target) in (service, "0") else f"{service}→{target}"
            for service, target in sorted(found.items(), key=lambda entry: int(entry[0]))
        ]
    )


def _healthy(row: Row) -> str:
    found = (row.get("endpoints") or {}).values()
    healthy = sum(not _unhealthy(endpoint) for endpoint in found)
    return f"{healthy}/{len(found)}"


def _endpoint(endpoint: Row, workloads: Mapping[str, Row]) -> str:
    uid = endpoint.get("workloadUid", "")
    health = "UNHEALTHY" if _unhealthy(endpoint) else "healthy"
    workload = workloads.get(uid)
    if workload is None:
        # The service was told of it, its own record hasn't come.
        return f"{uid} {health}, not known itself"
    return f"{qualified(workload)} {show.joined(workload.get('workloadIps'))} {health}"


def _unhealthy(endpoint: Row) -> bool:
    return bool(endpoint.get("status") == "Unhealthy")
