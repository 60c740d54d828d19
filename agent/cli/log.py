"""`underpass log`: the levels of both processes, shown and changed while they run."""

import click

from agent.cli import show
from agent.cli.ask import ask, change
from agent.cli.reach import Where, where


@click.group(invoke_without_command=True)
@where
@show.output
@click.pass_context
def log(context: click.Context, output: str) -> None:
    """Show or change log levels, in agent and data plane, while they run.

    A directive is LEVEL or target=LEVEL, with one of trace, debug, info, warn, error, off; several
    are separated by commas. A change lasts until `reset` or until the agent ends.
    """
    if context.invoked_subcommand is not None:
        return
    answer = ask(context.obj or Where(), "log")
    answer.note()
    _show(answer.data, output)


@log.command("set")
@click.argument("directives")
@where
@show.output
@click.pass_obj
def set_levels(sought: Where | None, directives: str, output: str) -> None:
    """Add DIRECTIVES to the levels in force, for example `underpass=debug`."""
    _show(change(sought or Where(), "log", {"set": directives}), output)


@log.command()
@where
@show.output
@click.pass_obj
def reset(sought: Where | None, output: str) -> None:
    """Return to the levels of the configuration."""
    _show(change(sought or Where(), "log", {"reset": ""}), output)


def _show(found: show.Row, output: str) -> None:
    if output in ("json", "yaml"):
        show.data(found, output)
        return
    click.echo(found["filter"])
    if found["filter"] != found["configured"]:
        click.echo(f"configured: {found['configured']} (back to it: underpass log reset)")
    if not found["dataplane"]:
        click.echo("No data plane serves; the next one starts with these levels.", err=True)
