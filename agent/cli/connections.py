"""`underpass connections`: what is open now, or with --follow what opens and closes."""

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from time import sleep
from typing import Any

import click

from agent.cli import show
from agent.cli.ask import ask
from agent.cli.look import CONNECTIONS, end
from agent.cli.pods import one_pod, pod_option
from agent.cli.reach import Unreachable, Where, where
from agent.cli.show import Row

# Often enough for a person who watches, and nothing for the node.
INTERVAL = 1.0


@click.command(help="Live connections of this node's pods.")
@click.option(
    "--follow",
    "-f",
    is_flag=True,
    help="Print a line for each one that opens or closes, looking every second; what lives for"
    " less may not be seen. Ends with Ctrl-C.",
)
@pod_option
@where
@show.output
@click.pass_obj
def connections(sought: Where | None, pod: str | None, follow: bool, output: str) -> None:
    place = sought or Where()
    query = {"pod": one_pod(place, pod)} if pod else {}
    if follow:
        _follow(place, query, output)
        return
    answer = ask(place, "connections", query)
    answer.note()
    show.rows(answer.data, CONNECTIONS, output, "No live connections.")


def _follow(place: Where, query: dict[str, str], output: str) -> None:
    """Until the reader leaves or the node is gone."""
    known: dict[tuple[Any, ...], Row] = {}
    told: bool | None = None
    try:
        while True:
            now: dict[tuple[Any, ...], Row] = {}
            try:
                answer = ask(place, "connections", query)
            except Unreachable:
                raise
            except click.ClickException as exc:
                # No data plane at the moment, and with it no connection.
                if known:
                    exc.show()
            else:
                if answer.from_agent is not told:
                    answer.note()
                    told = answer.from_agent
                now = {_key(row): row for row in answer.data}
            for what, row in changes(known, now):
                _print(what, row, output)
            known = now
            sleep(INTERVAL)
    except KeyboardInterrupt:
        sys.exit(0)


def changes(
    before: dict[tuple[Any, ...], Row], after: dict[tuple[Any, ...], Row]
) -> Iterator[tuple[str, Row]]:
    """What closed, with its last figures, then what opened, the oldest first."""
    yield from (("closed", row) for key, row in before.items() if key not in after)
    opened = [row for key, row in after.items() if key not in before]
    for row in sorted(opened, key=lambda row: -int(row.get("age_ms", 0))):
        yield "opened", row


def _key(row: Row) -> tuple[Any, ...]:
    """Numbers begin anew with each data plane; the addresses tell its connections apart."""
    return tuple(row.get(name) for name in ("id", "pod_uid", "direction", "src", "original_dst"))


def _print(what: str, row: Row, output: str) -> None:
    moment = datetime.now(UTC)
    if output in ("json", "yaml"):
        # One object a line, which is YAML too.
        line = {"time": moment.isoformat(timespec="milliseconds"), "event": what} | row
        click.echo(json.dumps(line, ensure_ascii=False))
        return
    source, destination = end("src_workload", "src"), end("dst_workload", "original_dst")
    parts = [
        moment.strftime("%H:%M:%SZ"),
        what,
        f"{row.get('direction', '-'):8}",
        f"{source(row)} → {destination(row)}",
        f"by {row.get('protocol', '-')}",
    ]
    if what == "closed":
        sent, received = row.get("bytes_sent", 0), row.get("bytes_received", 0)
        parts.append(f"sent {show.size(sent)}, received {show.size(received)}")
        parts.append(f"after {show.span(row.get('age_ms', 0) / 1000)}")
    if output == "wide":
        parts += [row.get(name) or "-" for name in ("src_identity", "dst_identity", "actual_dst")]
    click.echo("  ".join(parts))
