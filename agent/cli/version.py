"""`underpass version`."""

import platform
from importlib import metadata
from typing import Any

import click

from agent.cli import show


def versions() -> dict[str, Any]:
    try:
        ours = metadata.version("underpass")
    except metadata.PackageNotFoundError:
        # Run from a source tree that isn't installed.
        ours = "unknown"
    return {"underpass": ours, "python": platform.python_version(), "kernel": platform.release()}


@click.command()
@show.output
def version(output: str) -> None:
    """Versions of this program and what it runs on."""
    found = versions()
    if output in ("json", "yaml"):
        show.data(found, output)
    else:
        for name, value in found.items():
            click.echo(f"{name} {value}")
