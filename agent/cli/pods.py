"""A pod as the user names it: NAME, NAMESPACE/NAME or uid."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from agent.cli.ask import ask
from agent.cli.reach import Where, said_so_far
from agent.cli.show import Row

_F = TypeVar("_F", bound=Callable[..., Any])


def one_pod(sought: Where, named: str) -> str:
    """Its uid. Raises ClickException when it is unknown, or when several have that name."""
    known = ask(sought, "pods").data
    found = [row for row in known if named in (row["uid"], row["name"], _key(row))]
    if len(found) == 1:
        uid: str = found[0]["uid"]
        return uid
    if not found:
        raise click.ClickException(
            f"no pod {named} on this node; known: {', '.join(map(_key, known)) or 'none'}"
        )
    names = "\n".join(f"  {_key(row)} {row['uid']}" for row in found)
    raise click.ClickException(f"several pods are named {named}; choose one:\n{names}")


def pod_option(command: _F) -> _F:
    return click.option(
        "--pod",
        metavar="POD",
        shell_complete=complete_pod,
        help="Only this one: NAME, NAMESPACE/NAME or uid.",
    )(command)


def complete_pod(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    try:
        known = ask(said_so_far(context), "pods").data
    except click.ClickException:
        return []
    return sorted(key for row in known if (key := _key(row)).startswith(incomplete))


def _key(row: Row) -> str:
    return f"{row['namespace']}/{row['name']}"
