"""`underpass demo`: runs the story; `underpass demo exec` runs a command as one of its pods;
`underpass demo down` removes every trace."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from agent.cli.demo import cgroup
from agent.cli.demo.mesh import Mesh, MeshError
from agent.cli.demo.shop import HTTP_PORT
from agent.cli.demo.story import ClaimFailed, Story
from agent.cli.demo.world import PREFIX as UP
from agent.cli.demo.world import World, WorldError, down, forget, namespaces, remove_cgroup

PREFIX = "demo"
RUN_DIR = Path("/run/underpass")
FOLDER = Path("/run/underpass-demo")
PODS_CGROUP = "underpass-demo"


@click.group(invoke_without_command=True)
@click.option("--keep", is_flag=True, help="Leave the mesh up and print commands to explore it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for machines.")
@click.option(
    "--capture",
    type=click.Choice(["auto", "ebpf", "nftables"]),
    default="auto",
    help="How traffic is caught. [auto: by eBPF where the machine can, else by nftables]",
)
@click.pass_context
def demo(context: click.Context, keep: bool, as_json: bool, capture: str) -> None:
    """Two nodes, six pods, one wire: every claim is proved on the running mesh.

    Needs root. Everything lives in network namespaces of its own; the host's network isn't
    touched.
    """
    if context.invoked_subcommand is not None:
        return
    need_root()
    sys.exit(asyncio.run(tell(keep, Voice(as_json), capture)))


@demo.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("pod")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_command(pod: str, command: tuple[str, ...]) -> None:
    """Run a command as if in a pod of a demo that was kept: in its network namespace, and in the
    cgroup of its processes, which capture by eBPF goes by."""
    need_root()
    prefix = f"{UP}-{PREFIX}-"
    there = [name.removeprefix(prefix) for name in namespaces(PREFIX)]
    pods = [name for name in there if not name.startswith("node")]
    if pod not in pods:
        remedy = f"it has {', '.join(pods)}" if pods else "start one with `underpass demo --keep`"
        raise click.ClickException(f"the demo has no pod {pod}; {remedy}")
    above = cgroup.folder(PODS_CGROUP)
    if above is not None and above.is_dir():
        cgroup.enter(above)
    os.execvp("nsenter", ["nsenter", f"--net=/run/netns/{prefix}{pod}", "--", *command])


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


def need_root() -> None:
    if os.geteuid() != 0:
        raise click.ClickException("the demo lives in network namespaces: run it as root")


async def tell(keep: bool, voice: Voice, capture: str = "auto") -> int:
    """Runs all chapters; 0 when every claim held. Cleans up unless told to keep, also when
    interrupted."""
    remove()
    FOLDER.mkdir(parents=True)
    mesh = Mesh(World(PREFIX), FOLDER, RUN_DIR, (f"--capture={capture}",), tied=not keep)
    kept = False
    try:
        with pods_apart(mesh):
            code = await prove(mesh, keep, voice)
        kept = keep and code == 0
        return code
    finally:
        if not kept:
            remove()


@contextlib.contextmanager
def pods_apart(mesh: Mesh) -> Iterator[None]:
    """This process, and with it servers and clients of the pods, moves into the pods' cgroup;
    agents and control plane stay where it was. Where that can't be, the agents are told of no
    cgroup, and say what comes of it."""
    above = cgroup.folder(PODS_CGROUP)
    with contextlib.ExitStack() as scope:
        if above is not None:
            with contextlib.suppress(OSError):
                before = cgroup.own()
                scope.enter_context(cgroup.entered(above))
                mesh.daemons = before
                # Agents are told by their environment, which is this process's.
                os.environ["UNDERPASS_PODS_CGROUP"] = str(above)
        yield


async def prove(mesh: Mesh, keep: bool, voice: Voice) -> int:
    """Chapter by chapter; 0 when every claim held, 130 when interrupted."""
    story = Story(mesh)
    task = asyncio.current_task()
    assert task is not None, "prove() runs as a task"
    loop = asyncio.get_running_loop()
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(interrupt, task.cancel)
    try:
        mesh.world.up()
        for number, (title, chapter) in enumerate(story.chapters(), 1):
            started = time.monotonic()
            try:
                with voice.chapter(number, title):
                    evidence = await chapter()
            except Exception as exc:
                voice.failed(number, title, explain(exc, mesh))
                return 1
            voice.proved(number, title, evidence, time.monotonic() - started)
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


def explain(exc: Exception, mesh: Mesh) -> str:
    """The failure, and the ends of the logs: the folder is removed with the demo."""
    expected = isinstance(exc, (ClaimFailed, MeshError))
    text = str(exc) if expected else f"{type(exc).__name__}: {exc}"
    names = ["controlplane", *(node.name for node in mesh.world.nodes)]
    return "\n".join([text, *(mesh.tail(name, 8) for name in names)])


def remove() -> None:
    """Processes, namespaces, cgroups and files of the demo."""
    down(PREFIX)
    if (pods_cgroup := cgroup.folder(PODS_CGROUP)) is not None:
        remove_cgroup(pods_cgroup)
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
  underpass demo exec web curl http://{api}:{HTTP_PORT}/ http://{story.vips["api"]}/

Manifests are watched in {FOLDER}/manifests, logs lie in {FOLDER}.
`underpass demo down` removes everything."""
