"""`underpass controlplane`, and its command that makes node tokens."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from agent.errors import Mistake
from agent.values import duration

STATE = Path("/var/lib/underpass/controlplane")


def _duration(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> timedelta | None:
    if value is None:
        return None
    try:
        return duration(value)
    except Mistake as mistake:
        raise click.BadParameter(f"{value}: {mistake}") from mistake


_state = click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=STATE,
    show_default=True,
    show_envvar=True,
    help="Folder of keys and roots; made if missing.",
)


@click.group(
    invoke_without_command=True,
    context_settings={"auto_envvar_prefix": "UNDERPASS_CONTROLPLANE", "show_default": True},
)
@click.option(
    "--manifests",
    type=click.Path(path_type=Path),
    show_envvar=True,
    help="Folder of Kubernetes and Istio manifests; watched.  [required]",
)
@_state
@click.option("--listen", multiple=True, show_envvar=True, help="host:port; may be repeated.")
@click.option("--trust-domain", show_envvar=True, help="Trust domain of the mesh.")
@click.option("--cluster-id", show_envvar=True, help="Name of this cluster.")
@click.option("--network", show_envvar=True, help="Network id of the workloads.")
@click.option("--root-namespace", show_envvar=True, help="Namespace of mesh-wide policies.")
@click.option(
    "--vip-range",
    "vip_ranges",
    multiple=True,
    show_envvar=True,
    help="Range for services without an address; one a family.",
)
@click.option(
    "--san",
    "extra_sans",
    multiple=True,
    show_envvar=True,
    help="A further name or address in the server's certificate.",
)
@click.option(
    "--certificate-ttl",
    metavar="DURATION",
    callback=_duration,
    show_envvar=True,
    help="Life of certificates.",
)
@click.option(
    "--max-certificate-ttl",
    metavar="DURATION",
    callback=_duration,
    show_envvar=True,
    help="Longest life to be asked for.",
)
@click.pass_context
def controlplane(context: click.Context, /, **given: Any) -> None:
    """Run the embedded control plane: manifests in, workloads, policies and certificates out."""
    if context.invoked_subcommand is not None:
        return
    if given["manifests"] is None:
        raise click.UsageError("--manifests is needed: the folder with your manifests", context)

    from controlplane import server

    # What wasn't given has its default beside the field in Options.
    wanted = {name: value for name, value in given.items() if value is not None and value != ()}
    sys.exit(server.run(server.Options(**wanted)))


@controlplane.command()
@click.option("--node", required=True, help="Name of the node, as pods have it in spec.nodeName.")
@_state
@click.option(
    "--ttl",
    metavar="DURATION",
    callback=_duration,
    help="How long the token is good.  [default: 30 days]",
)
def token(node: str, state: Path, ttl: timedelta | None) -> None:
    """Print a token that lets a node's agent in, for certificates of that node's pods only."""
    from controlplane import tokens

    try:
        made = tokens.issue(state, node, tokens.DEFAULT_TTL if ttl is None else ttl)
    except tokens.TokenError as error:
        raise click.ClickException(str(error)) from error
    click.echo(made)
