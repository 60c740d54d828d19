"""`underpass demo`: runs the story; `underpass demo down` removes every trace."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from agent.cli.demo.mesh import Mesh, MeshError
from agent.cli.demo.shop import HTTP_PORT
from agent.cli.demo.story import ClaimFailed, Story
from agent.cli.demo.world import World, WorldError, down, forget

PREFIX = "demo"
RUN_DIR = Path("/run/underpass")
FOLDER = Path("/run/underpass-demo")


@click.group(invoke_without_command=True)
@click.option("--keep", is_flag=True, help="Leave the mesh up and print commands to explore it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for machines.")
@click.pass_context
def demo(context: click.Context, keep: bool, as_json: bool) -> None:
    """Two nodes, six pods, one wire: every claim is proved on the running mesh.

    Needs root. Everything lives in network namespaces of its own; the host's network isn't
    touched.
    """
    if context.invoked_subcommand is not None:
        return
    if os.geteuid() != 0:
        raise click.ClickException("the demo makes network namespaces: run it as root")
    sys.exit(asyncio.run(tell(keep, Voice(as_json))))


@demo.command("down")
def down_command() -> None:
    """Remove every trace of a demo, also of one that crashed."""
    remove()
    click.echo("no trace of the demo is left")


class Voice:
    """How the story is told: for people, or as JSON lines."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.started = time.monotonic()

    def chapter(self, number: int, title: str) -> contextlib.AbstractContextManager[Any]:
        if self.as_json or not sys.stdout.isatty():
            return contextlib.nullcontext()
        from rich.console import Console

        return Console().status(f"{number}. {title} …")

    def proved(self, number: int, title: str, evidence: list[str], seconds: float) -> None:
        if self.as_json:
            self._emit(chapter=number, claim=title, evidence=evidence, seconds=round(seconds, 3))
            return
        click.echo(f"{click.style('✓', fg='green')} {number}. {title}  ({seconds:.1f} s)")
        for line in evidence:
            click.echo(f"     {line}")

    def failed(self, number: int, title: str, why: str) -> None:
        if self.as_json:
            self._emit(chapter=number, claim=title, failed=why)
            return
        click.echo(f"{click.style('✗', fg='red')} {number}. {title}", err=True)
        click.echo(f"     {why}", err=True)

    def end(self, text: str, **fields: Any) -> None:
        seconds = time.monotonic() - self.started
        if self.as_json:
            self._emit(done=True, seconds=round(seconds, 1), **fields)
        else:
            click.echo(f"\n{text} ({seconds:.0f} s)")

    @staticmethod
    def _emit(**fields: Any) -> None:
        click.echo(json.dumps(fields, ensure_ascii=False))


async def tell(keep: bool, voice: Voice) -> int:
    """Runs all chapters; 0 when every claim held. Cleans up unless told to keep, also when
    interrupted."""
    remove()
    FOLDER.mkdir(parents=True)
    world = World(PREFIX)
    mesh = Mesh(world, FOLDER, RUN_DIR, tied=not keep)
    story = Story(mesh)
    task = asyncio.current_task()
    assert task is not None, "tell() runs as a task"
    loop = asyncio.get_running_loop()
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(interrupt, task.cancel)
    kept = False
    try:
        world.up()
        for number, (title, chapter) in enumerate(story.chapters(), 1):
            started = time.monotonic()
            try:
                with voice.chapter(number, title):
                    evidence = await chapter()
            except Exception as exc:
                voice.failed(number, title, explain(exc, mesh))
                return 1
            voice.proved(number, title, evidence, time.monotonic() - started)
        kept = keep
        voice.end(f"all {number} claims hold", chapters=number)
        if keep and not voice.as_json:
            click.echo(explore(story))
        return 0
    except WorldError as exc:
        voice.failed(0, "namespaces", str(exc))
        return 1
    except asyncio.CancelledError:
        click.echo("interrupted; removing everything", err=True)
        return 130
    finally:
        if not kept:
            remove()


def explain(exc: Exception, mesh: Mesh) -> str:
    """The failure, and the ends of the logs: the folder is removed with the demo."""
    expected = isinstance(exc, (ClaimFailed, MeshError))
    text = str(exc) if expected else f"{type(exc).__name__}: {exc}"
    names = ["controlplane", *(node.name for node in mesh.world.nodes)]
    return "\n".join([text, *(mesh.tail(name, 8) for name in names)])


def remove() -> None:
    """Processes, namespaces, cgroups and files of the demo."""
    down(PREFIX)
    for folder in RUN_DIR.glob(f"{PREFIX}-node*"):
        forget(folder)
    with contextlib.suppress(OSError):
        RUN_DIR.rmdir()
    forget(FOLDER)


def explore(story: Story) -> str:
    """Commands for a mesh that was kept."""
    api = story.shop.api.sandbox.ipv4
    return f"""
The mesh is still up. Look around:

  underpass --node {PREFIX}-node1 status
  underpass --node {PREFIX}-node1 pods -o wide
  underpass --node {PREFIX}-node2 connections
  underpass --node {PREFIX}-node2 services
  nsenter --net=/run/netns/up-{PREFIX}-web curl http://{api}:{HTTP_PORT}/ http://{story.vips["api"]}/

Manifests are watched in {FOLDER}/manifests, logs lie in {FOLDER}.
`underpass demo down` removes everything."""
