"""`underpass why`: the last refusals and failures: who, where, which rule or cause, what to do."""

from datetime import UTC, datetime

import click

from agent.cli import show
from agent.cli.ask import ask
from agent.cli.reach import Where, where
from agent.cli.show import Row

# What a person reads; -n for more.
SHOWN = 20


@click.command()
@click.argument("pod", required=False)
@click.option(
    "-n", "--number", type=click.IntRange(min=1), default=SHOWN, show_default=True, help="How many."
)
@where
@show.output
@click.pass_obj
def why(sought: Where | None, pod: str | None, number: int, output: str) -> None:
    """Tell the last refusals and failures of this node, newest first.

    POD (NAME, NAMESPACE/NAME or uid) chooses those that it has part in, as either end. Equal ones
    are counted.
    """
    answer = ask(sought or Where(), "verdicts")
    answer.note()
    every: list[Row] = answer.data["verdicts"]
    found = [row for row in every if pod is None or _concerns(row, pod)][:number]
    if output in ("json", "yaml"):
        show.data(found, output)
        return
    if not found:
        of = f" of {pod}" if pod else ""
        click.echo(f"No refusals or failures{of} since this data plane was started.")
    for index, row in enumerate(found):
        if index:
            click.echo()
        click.echo(_told(row, datetime.now(UTC), wide=output == "wide"))
    lost = answer.data["lost"]
    if lost and len(found) < number:
        click.echo(f"\n{lost} older ones are forgotten.")


def _concerns(row: Row, pod: str) -> bool:
    if pod == row["pod_uid"]:
        return True
    ends = (row["src_workload"], row["dst_workload"])
    return pod in ends or ("/" not in pod and pod in [end.rpartition("/")[2] for end in ends])


def _told(row: Row, now: datetime, *, wide: bool) -> str:
    times = f", {row['count']} times" if row["count"] > 1 else ""
    ago = show.span((now - datetime.fromisoformat(row["time"])).total_seconds())
    lines = [
        f"{ago} ago{times}: {row['direction']} {row['flag']}",
        f"  from  {_end(row['src_workload'], row['src'], row['src_identity'])}",
        f"  to    {_end(row['dst_workload'] or row['dst_service'], row['dst'])}",
        f"  why   {row['cause']}",
    ]
    if row["policy"]:
        rule = f" (rule {row['rule']})" if row["rule"] is not None else ""
        lines.append(f"  by    {row['policy']}{rule}")
    if row["remedy"]:
        lines.append(f"  do    {row['remedy']}")
    if wide:
        lines.append(f"  pod   {row['pod_uid']}")
        lines.append(f"  time  {row['time']}")
    return "\n".join(lines)


def _end(name: str, address: str, identity: str = "") -> str:
    parts = [name, address, f"as {identity}" if identity else ""]
    return " ".join(part for part in parts if part) or "-"
