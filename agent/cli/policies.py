"""`underpass policies`: what the control plane sent, and how often each decided."""

from collections.abc import Mapping
from datetime import UTC, datetime

import click

from agent.cli import show
from agent.cli.ask import ask
from agent.cli.look import field, qualified
from agent.cli.reach import Where, where
from agent.cli.show import Column, Row

EMPTY = "No authorization policies: everything that isn't refused otherwise is allowed."


@click.command(help="Authorization policies this node knows, and how often each decided here.")
@where
@show.output
@click.pass_obj
def policies(sought: Where | None, output: str) -> None:
    place = sought or Where()
    answer = ask(place, "policies")
    answer.note()
    hits: Mapping[str, Row] = {}
    if answer.data:
        hits = {row["name"]: row for row in ask(place, "policy-hits").data}
    found = [row | {"hits": _hits(row, hits)} for row in answer.data]
    show.rows(found, COLUMNS, output, EMPTY)


def _hits(row: Row, hits: Mapping[str, Row]) -> Row:
    """Of a policy that came between the two questions nothing is counted yet."""
    counted = hits.get(qualified(row), {})
    return {
        "decided": counted.get("decided", 0),
        "dryRun": counted.get("dryRun", 0),
        "last": counted.get("last"),
    }


def _shown(row: Row) -> str:
    """Of a policy in dry-run: what it would have decided."""
    hits = row["hits"]
    return f"({hits['dryRun']})" if row.get("dryRun") else str(hits["decided"])


def _last(row: Row) -> str:
    last = row["hits"]["last"]
    if last is None:
        return "never"
    ago = (datetime.now(UTC) - datetime.fromisoformat(last)).total_seconds()
    return f"{show.span(ago)} ago"


COLUMNS = [
    Column("POLICY", qualified),
    Column("ACTION", field("action")),
    Column("SCOPE", field("scope")),
    Column("RULES", lambda row: str(len(row.get("rules") or [])), right=True),
    Column("DRY RUN", lambda row: "yes" if row.get("dryRun") else "no"),
    Column("HITS", _shown, right=True),
    Column("LAST", _last),
    Column("DECIDED", lambda row: str(row["hits"]["decided"]), wide=True, right=True),
    Column("WOULD DECIDE", lambda row: str(row["hits"]["dryRun"]), wide=True, right=True),
]
