"""`underpass cut-precapture`: ends connections that are older than their pod's capture."""

import click

from agent.cli import show
from agent.cli.ask import change
from agent.cli.pods import complete_pod, one_pod
from agent.cli.reach import Where, where


@click.command("cut-precapture")
@click.argument("pod", required=False, shell_complete=complete_pod)
@click.option("--all", "every", is_flag=True, help="Those of all pods of the node.")
@where
@show.output
@click.pass_obj
def cut_precapture(sought: Where | None, pod: str | None, every: bool, output: str) -> None:
    """Cut connections of POD (NAME, NAMESPACE/NAME or uid) that are older than its capture: they go
    past the mesh in clear, and no policy was asked. Both ends see a reset; others go on.

    `underpass pods -o wide` names them.
    """
    if every == bool(pod):
        raise click.UsageError("name a pod, or write --all")
    asked = sought or Where()
    query = {"all": ""} if pod is None else {"pod": one_pod(asked, pod)}
    answer = change(asked, "precapture/cut", query)
    if output in ("json", "yaml"):
        show.data(answer, output)
        return
    count = answer["cut"]
    click.echo(f"{count} connection{'' if count == 1 else 's'} cut.")
