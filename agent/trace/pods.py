"""Which pods are traced: their network namespaces, found by what the node tells of each."""

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INODE = re.compile(r"net:\[(\d+)\]")
_PROC = Path("/proc")
_SELF = "/proc/self/"


@dataclass(frozen=True)
class Traced:
    """A pod and the namespace it has now."""

    uid: str
    # namespace/name
    key: str
    inode: int
    # Of its namespace, as the node names it: a path, or `net:[inode]`.
    place: str

    def open(self) -> int | None:
        """A descriptor of that namespace; None when it is gone or has no process and no name."""
        for path in self._paths():
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError:
                continue
            if os.fstat(fd).st_ino == self.inode:
                return fd
            os.close(fd)
        return None

    def _paths(self) -> Iterable[Path]:
        if not _INODE.fullmatch(self.place):
            yield Path(self.place)
            return
        for folder in _PROC.iterdir():
            if folder.name.isdecimal():
                path = folder / "ns/net"
                with contextlib.suppress(OSError):
                    if path.stat().st_ino == self.inode:
                        yield path


def traced(
    rows: Iterable[dict[str, Any]],
    agent_pid: int | None,
    uid: str | None = None,
    namespace: str | None = None,
) -> dict[int, Traced]:
    """By inode; without pods whose namespace isn't there."""
    found = {}
    for row in rows:
        if uid is not None and row["uid"] != uid:
            continue
        if namespace is not None and row["namespace"] != namespace:
            continue
        place = row.get("netns") or ""
        # Dedicated mode's pod is where the agent is, seen by the agent.
        if place.startswith(_SELF) and agent_pid:
            place = f"/proc/{agent_pid}/{place.removeprefix(_SELF)}"
        if (inode := _inode(place)) is not None:
            found[inode] = Traced(row["uid"], f"{row['namespace']}/{row['name']}", inode, place)
    return found


def _inode(place: str) -> int | None:
    if told := _INODE.fullmatch(place):
        return int(told[1])
    try:
        return os.stat(place).st_ino
    except OSError:
        return None
