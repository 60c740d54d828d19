"""`underpass dump`: what the node knows, in the shape of upstream's config dump (facts ztunnel
13.1), streamed: nothing of it is held here."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from agent.cli.ask import Unknown, stream
from agent.cli.reach import Where, where

# As upstream prints them, by the alphabet.
SECTIONS = (
    "certificates",
    "config",
    "policies",
    "services",
    "stagedServices",
    "staticConfig",
    "version",
    "workloadState",
    "workloads",
)


@click.command()
@click.argument("section", required=False, type=click.Choice(SECTIONS))
@click.option(
    "--file", "-f", type=click.Path(path_type=Path), help="Write there, whole or not at all."
)
@where
@click.pass_obj
def dump(sought: Where | None, section: str | None, file: Path | None) -> None:
    """Print everything the node knows as JSON, or one SECTION of it.

    The shape is upstream's: `istioctl ztunnel-config workload -f FILE` reads it. Keys and tokens
    are never in it.
    """
    place = sought or Where()
    if file is None:
        _write(place, section, sys.stdout.buffer.write)
        sys.stdout.buffer.flush()
        return
    # Beside it, so that the last step is a rename.
    scratch = file.with_name(f".{file.name}.new")
    try:
        # Addresses and identities of a whole mesh aren't for everybody.
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            _write(place, section, out.write)
        scratch.replace(file)
    except OSError as exc:
        raise click.ClickException(f"{file}: {exc.strerror or exc}") from exc
    finally:
        scratch.unlink(missing_ok=True)


def _write(place: Where, section: str | None, sink: Callable[[bytes], object]) -> None:
    if section is not None:
        answer = stream(place, f"dump/{section}", sink)
        sink(b"\n")
        answer.note()
        return
    separator = b"{\n"
    missing = []
    for name in SECTIONS:
        before = separator + f'"{name}": '.encode()
        try:
            answer = stream(place, f"dump/{name}", sink, before=before)
        except Unknown:
            missing.append(name)
            continue
        separator = b",\n"
    sink(b"\n}\n")
    answer.note()
    if missing:
        click.echo(f"left out, for only an agent tells it: {', '.join(missing)}", err=True)
