"""What an instance has on this machine, also after all its processes died: found, ended, removed.

Everything is known from the run folder and from its place among the cgroups.
"""

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from agent.claim import claimed
from agent.instance import remove_leaf, remove_parents
from agent.pods.ledger import Held, LedgerUnreadable, read
from agent.pods.netns import NetnsId, netns_id
from agent.slices import RunPaths
from redirect.base import Redirect, RedirectError, Target

BINARY = "underpass-dataplane"
# An agent passes the signal on and waits for its data planes, which drain.
AGENT_PATIENCE = timedelta(seconds=30)
DATAPLANE_PATIENCE = timedelta(seconds=20)
KILL_PATIENCE = timedelta(seconds=5)
_PROBE = 0.02
_NAMESPACES = Path("/run/netns")

_OURS = re.compile(
    r"admin\.sock|agent\.pid|(captured|precapture|roots)\.(json|new)"
    r"|dataplane\.sock(\.new)?|dataplane-\d+\.sock"
)


@dataclass(frozen=True)
class Process:
    """One of the instance's that runs."""

    what: str
    pid: int

    def __str__(self) -> str:
        return f"{self.what}, process {self.pid}"


@dataclass(frozen=True)
class Remains:
    paths: RunPaths
    # The agent first.
    processes: tuple[Process, ...]
    pods: tuple[Held, ...]
    # Why there may be more pods than `pods` names; "" when the list is sound.
    pods_unknown: str
    # The folder of its data planes' cgroups; None where there is no cgroup2.
    cgroup: Path | None
    leaves: tuple[Path, ...]
    # The folder of its pinned programs, where there is one.
    pins: Path | None
    files: tuple[Path, ...]
    # Of somebody else in the run folder; they stay.
    foreign: tuple[Path, ...]

    @property
    def nothing(self) -> bool:
        folders = (self.paths.root, self.cgroup, self.pins)
        return not self.processes and not any(path and path.exists() for path in folders)


@dataclass(frozen=True)
class Removal:
    """What happened to one thing; `error` is "" when it is gone."""

    what: str
    error: str = ""


def find(paths: RunPaths, cgroup_parent: Path | None, pins: Path) -> Remains:
    """Raises OSError where the run folder can't be read."""
    pods: list[Held] = []
    unknown = ""
    try:
        pods = read(paths.captured_pods)
    except LedgerUnreadable as exc:
        unknown = str(exc)
    entries = sorted(paths.root.iterdir()) if paths.root.is_dir() else []
    leaves = _leaves(cgroup_parent)
    return Remains(
        paths=paths,
        processes=(*_agent(paths), *_dataplanes(paths, leaves)),
        pods=tuple(pods),
        pods_unknown=unknown,
        cgroup=cgroup_parent,
        leaves=leaves,
        pins=pins if pins.is_dir() else None,
        files=tuple(path for path in entries if _OURS.fullmatch(path.name)),
        foreign=tuple(path for path in entries if not _OURS.fullmatch(path.name)),
    )


async def stop(found: Remains) -> AsyncIterator[Removal]:
    """Ends the processes: asked first, killed when they don't follow. The agent goes first, or it
    would start its data plane again."""
    for process in found.processes:
        patience = AGENT_PATIENCE if process.what == "agent" else DATAPLANE_PATIENCE
        yield await _end(process, patience)


async def remove(found: Remains, *redirects: Redirect) -> AsyncIterator[Removal]:
    """Programs, rules, cgroups, files, in this order. No agent can start meanwhile. Raises
    NodeClaimed, RunDirUnusable."""
    with claimed(found.paths):
        failed = bool(found.pods_unknown)
        if found.pins is not None:
            removal = _detach(found.pins)
            failed = failed or bool(removal.error)
            yield removal
        for held in found.pods:
            removal = await _release(held, redirects)
            failed = failed or bool(removal.error)
            yield removal
        for leaf in found.leaves:
            await remove_leaf(leaf)
            yield Removal(f"cgroup {leaf}", "is still in use" if leaf.exists() else "")
        if found.cgroup is not None:
            remove_parents(found.cgroup)
        for path in found.files:
            # What says where rules are is needed until they are gone.
            if not (failed and path == found.paths.captured_pods):
                path.unlink(missing_ok=True)
    yield _remove_folder(found.paths.root)


# ---- what is there


def _agent(paths: RunPaths) -> Iterator[Process]:
    """Whoever holds the lock on the pid file."""
    try:
        fd = os.open(paths.pid_file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(ValueError):
            yield Process("agent", int(os.read(fd, 32)))
    finally:
        os.close(fd)


def _dataplanes(paths: RunPaths, leaves: tuple[Path, ...]) -> Iterator[Process]:
    """By their sockets, and by their cgroups where the socket is lost. One that somebody else
    starts has its socket elsewhere and isn't ours to end."""
    pids = {pid for path in paths.root.glob("dataplane-*.sock") if (pid := _listener(path))}
    for leaf in leaves:
        with contextlib.suppress(OSError):
            members = map(int, (leaf / "cgroup.procs").read_text().split())
            pids |= {pid for pid in members if _program(pid) == BINARY}
    yield from (Process("data plane", pid) for pid in sorted(pids))


def _listener(path: Path) -> int | None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
            size = struct.calcsize("3i")
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        except OSError:
            return None
    pid: int = struct.unpack("3i", peer)[0]
    return pid or None


def _program(pid: int) -> str:
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name.removesuffix(" (deleted)")
    except OSError:
        return ""


def _leaves(parent: Path | None) -> tuple[Path, ...]:
    if parent is None:
        return ()
    return tuple(sorted(path for path in parent.glob("dataplane-*") if path.is_dir()))


# ---- how it goes


async def _end(process: Process, patience: timedelta) -> Removal:
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return Removal(str(process))
    try:
        for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, KILL_PATIENCE)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
            if await _gone(pidfd, wait):
                return Removal(str(process))
    finally:
        os.close(pidfd)
    return Removal(str(process), "survives SIGKILL")


async def _gone(pidfd: int, patience: timedelta) -> bool:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(patience.total_seconds()):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True


def _detach(pins: Path) -> Removal:
    """Programs that nothing pins or holds any more leave the kernel by themselves."""
    what = f"eBPF programs in {pins}"
    try:
        shutil.rmtree(pins)
    except OSError as exc:
        return Removal(what, f"{exc.filename}: {exc.strerror}")
    with contextlib.suppress(OSError):
        pins.parent.rmdir()
    return Removal(what)


async def _release(held: Held, redirects: Sequence[Redirect]) -> Removal:
    what = f"capture of {held.pod.key} in {held.pod.netns}"
    fd = held.open()
    if fd is None:
        fd = _search(held.netns)
    if fd is None:
        # The kernel removed it with the namespace.
        return Removal(f"{what} (the namespace is gone)")
    try:
        for redirect in redirects:
            await redirect.remove(Target(held.pod.uid, held.pod.key, fd))
    except RedirectError as exc:
        return Removal(what, str(exc))
    finally:
        os.close(fd)
    return Removal(what)


def _search(wanted: NetnsId) -> int | None:
    """A descriptor of the namespace, under another name or from a process that lives in it."""
    names = [*_NAMESPACES.glob("*"), *Path("/proc").glob("[0-9]*/ns/net")]
    for name in names:
        with contextlib.suppress(OSError):
            found = name.stat()
            if (found.st_ino, found.st_dev) != (wanted.inode, wanted.device):
                continue
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if netns_id(fd) == wanted:
                return fd
            os.close(fd)
    return None


def _remove_folder(root: Path) -> Removal:
    try:
        root.rmdir()
    except OSError:
        left = ", ".join(sorted(path.name for path in root.iterdir()))
        return Removal(f"folder {root}", f"stays, with {left}")
    with contextlib.suppress(OSError):
        root.parent.rmdir()
    return Removal(f"folder {root}")
