"""`underpass explain`: what would happen to a connection, step by step; nothing is sent."""

import sys
from collections.abc import Mapping

import click

from agent.cli import show
from agent.cli.ask import ask
from agent.cli.reach import Where, where
from agent.cli.show import Column, Row

REFUSED = 1
UNKNOWN = 2

MARKS: Mapping[str, str] = {
    "ok": "ok",
    "refused": "NO",
    "unknown": "?",
    "dry_run": "dry",
}
# With --why-not.
AGAINST = ("refused", "unknown")


class NoAnswer(click.ClickException):
    """Scripts tell an answer from the lack of one."""

    exit_code = 3


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option("--why-not", is_flag=True, help="Only what refuses, or isn't known, and the remedy.")
@where
@show.output
@click.pass_obj
def explain(
    sought: Where | None, source: str, destination: str, why_not: bool, output: str
) -> None:
    """Tell what would happen to a connection from SOURCE to DESTINATION; nothing is sent.

    SOURCE is a pod or workload (NAME, NAMESPACE/NAME or its uid), DESTINATION is IP:PORT or
    HOSTNAME:PORT. The exit code is 0 where it is allowed, 1 where it is refused, 2 where something
    is known elsewhere only, 3 without an answer.
    """
    query = {"source": source, "destination": destination}
    try:
        answer = ask(sought or Where(), "explain", query)
    except click.ClickException as exc:
        raise NoAnswer(exc.message) from exc
    answer.note()
    found: Row = answer.data
    if why_not:
        found = found | {"steps": [s for s in found["steps"] if s["outcome"] in AGAINST]}
    if output in ("json", "yaml"):
        show.data(found, output)
    else:
        _paint(found, wide=output == "wide")
    sys.exit(exit_code(found))


def exit_code(found: Row) -> int:
    if not found["allowed"]:
        return REFUSED
    return UNKNOWN if any(s["outcome"] == "unknown" for s in found["steps"]) else 0


def _paint(found: Row, *, wide: bool) -> None:
    lines = [
        (MARKS.get(step["outcome"], step["outcome"]), step["name"], _told(step))
        for step in found["steps"]
    ]
    if lines:
        columns = [Column(title, lambda row: "") for title in ("", "STEP", "WHAT")]
        show.table(columns, lines, wide=wide)
        click.echo()
    click.echo(found["verdict"])
    if found["remedy"]:
        click.echo(f"what to do: {found['remedy']}")


def _told(step: Row) -> str:
    return f"{step['subject']}: {step['text']}" if step["subject"] else str(step["text"])
