"""Finds the agent, or at least the data plane, of a node on this machine."""

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click

RUN_DIR = Path("/run/underpass")
# A socket of this machine whose owner lives answers at once.
CONNECT_TIMEOUT = 5.0

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Where:
    """What the user said about the node to ask."""

    node: str | None = None
    run_dir: Path = RUN_DIR


@dataclass(frozen=True)
class Place:
    """A node's folder of sockets."""

    folder: Path

    @property
    def node(self) -> str:
        return self.folder.name

    @property
    def admin(self) -> Path:
        return self.folder / "admin.sock"

    @property
    def dataplane(self) -> Path:
        return self.folder / "dataplane.sock"


class Unreachable(click.ClickException):
    """No agent and no data plane; the text says how to start or find one."""

    exit_code = 1


def where(command: _F) -> _F:
    """`--node` and `--run-dir` behind the command's name; they win over those before it."""

    def node(context: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is not None:
            context.obj = replace(context.obj or Where(), node=value)

    def run_dir(context: click.Context, _: click.Parameter, value: Path | None) -> None:
        if value is not None:
            context.obj = replace(context.obj or Where(), run_dir=value)

    command = click.option(
        "--run-dir",
        type=click.Path(path_type=Path),
        callback=run_dir,
        expose_value=False,
        help="Folder of the nodes' sockets  [env: UNDERPASS_RUN_DIR]",
    )(command)
    return click.option(
        "--node",
        callback=node,
        expose_value=False,
        shell_complete=complete_node,
        help="The node to ask, where several are on this machine  [env: UNDERPASS_NODE]",
    )(command)


def said_so_far(context: click.Context) -> Where:
    """While a shell completes, no command has run yet to say it."""
    if isinstance(context.obj, Where):
        return context.obj
    root = context.find_root().params
    return Where(root.get("node"), root.get("run_dir") or RUN_DIR)


def complete_node(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names of nodes that have sockets here."""
    run_dir = said_so_far(context).run_dir
    try:
        names = [folder.name for folder in run_dir.iterdir() if _has_sockets(Place(folder))]
    except OSError:
        return []
    return sorted(name for name in names if name.startswith(incomplete))


def find(sought: Where) -> Place:
    """The named node, or the only one here. Raises Unreachable."""
    if sought.node is not None:
        return _named(sought.run_dir, sought.node)
    try:
        places = [Place(f) for f in sorted(sought.run_dir.iterdir()) if _has_sockets(Place(f))]
    except FileNotFoundError:
        places = []
    except PermissionError as exc:
        raise Unreachable(f"{sought.run_dir} can't be read: run this as root") from exc
    except NotADirectoryError as exc:
        raise Unreachable(f"{sought.run_dir} is not a folder: name the right --run-dir") from exc
    living = [place for place in places if answers(place.admin) or answers(place.dataplane)]
    if len(living) == 1:
        return living[0]
    if living:
        names = "\n".join(f"  {place.node}" for place in living)
        raise Unreachable(f"several nodes are on this machine; choose one with --node:\n{names}")
    raise Unreachable(nobody(sought.run_dir, [place.node for place in places]))


def nobody(run_dir: Path, stopped: list[str]) -> str:
    """What to do when no node of this machine answers."""
    text = f"no agent is running below {run_dir}"
    if stopped:
        text += f" (stopped: {', '.join(stopped)})"
    return (
        f"{text}\n"
        "Start one: underpass agent --node NAME --pods file:PATH --xds-address https://HOST:PORT\n"
        "Try it out: underpass demo --keep\n"
        "If it runs elsewhere, name its folder: --run-dir DIR, or UNDERPASS_RUN_DIR"
    )


def answers(path: Path) -> bool:
    """Somebody listens there. A socket we may not open counts: its owner's error comes later."""
    try:
        connect(path).close()
    except OSError as exc:
        return exc.errno in (errno.EACCES, errno.EPERM)
    return True


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(CONNECT_TIMEOUT)
    try:
        connection.connect(os.fspath(path))
    except BaseException:
        connection.close()
        raise
    return connection


def _named(run_dir: Path, node: str) -> Place:
    place = Place(run_dir / node)
    if answers(place.admin) or answers(place.dataplane):
        return place
    others = []
    if os.access(run_dir, os.R_OK) and run_dir.is_dir():
        others = [f.name for f in sorted(run_dir.iterdir()) if _has_sockets(Place(f))]
    text = nobody(run_dir, []).replace("no agent", f"no agent of node {node}", 1)
    if others:
        text += f"\nThere are sockets of: {', '.join(others)}"
    raise Unreachable(text)


def _has_sockets(place: Place) -> bool:
    return place.admin.is_socket() or place.dataplane.is_socket()
