"""`underpass bypass`: what is wanted in the mesh but goes past it, and why."""

import sys

import click

from agent.cli import show
from agent.cli.ask import ask
from agent.cli.look import field
from agent.cli.reach import Where, where
from agent.cli.show import Column


@click.command()
@where
@show.output
@click.pass_obj
def bypass(sought: Where | None, output: str) -> None:
    """What is wanted in the mesh but goes past it: pods that aren't captured, connections older
    than their pod's capture, workloads of this node without a pod. Exits with 1 when there is
    any."""
    answer = ask(sought or Where(), "bypass")
    columns = [
        Column("POD", field("pod")),
        Column("WHAT", field("what")),
        Column("WHY", field("why")),
        Column("REMEDY", field("remedy")),
        Column("KIND", field("kind"), wide=True),
    ]
    show.rows(answer.data, columns, output, "Nothing goes past the mesh, as far as can be seen.")
    sys.exit(1 if answer.data else 0)
