"""Pods' network namespaces, by path or by descriptor: opened, told apart, and refused when they
aren't a pod's."""

import fcntl
import os
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from agent.errors import NetnsMissing, NetnsRefused
from redirect.netns import duplicate

# ioctl_ns(2): _IO(0xb7, 3) answers with the clone flag of the namespace's kind.
_NS_GET_NSTYPE = 0xB703
_CLONE_NEWNET = 0x4000_0000
_OWN = Path("/proc/self/ns/net")
_INIT = Path("/proc/1/ns/net")


@dataclass(frozen=True)
class NetnsId:
    """Unique among living namespaces; a number may return after its namespace died."""

    inode: int
    device: int


class PodNetns(Protocol):
    """Where a pod's namespace is to be had. Equal ones are the same place."""

    @property
    def follow(self) -> bool:
        """The place may come to name a successor of the namespace."""

    @property
    def lasting(self) -> bool:
        """It names the namespace for as long as somebody holds it, also after the pod's end."""

    def open(self) -> int:
        """A new descriptor. Raises NetnsMissing, NetnsRefused."""

    def identity(self) -> "NetnsId | None":
        """What it names now; None when nothing."""


@dataclass(frozen=True)
class NetnsPath:
    """A namespace by its name in the file system."""

    path: Path
    # A path may come to name a successor of the namespace; a process id only names a stranger.
    follow: bool = True
    # The agent's own namespace is meant (dedicated mode), not named by mistake.
    own: bool = False
    lasting: bool = field(default=False, init=False)

    @classmethod
    def of_pid(cls, pid: int) -> "NetnsPath":
        return cls(Path(f"/proc/{pid}/ns/net"), follow=False)

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> int:
        """A new descriptor. Raises NetnsMissing, NetnsRefused."""
        try:
            # O_NONBLOCK: a FIFO of that name must not hang the agent.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, ProcessLookupError, NotADirectoryError) as exc:
            raise NetnsMissing(f"{self.path}: no such network namespace") from exc
        except OSError as exc:
            raise NetnsRefused(f"{self.path}: can't be opened: {exc.strerror}") from exc
        try:
            check(fd, str(self.path), own=self.own)
            return duplicate(fd)
        except OSError as exc:
            raise NetnsRefused(f"{self.path}: {exc.strerror}; raise LimitNOFILE") from exc
        finally:
            os.close(fd)

    def identity(self) -> NetnsId | None:
        """What the path names now; None when nothing."""
        return _identity(self.path)


class HeldNetns:
    """A namespace by a descriptor, which is all there is of it; closed when nobody needs it."""

    follow = False
    lasting = True

    def __init__(self, fd: int) -> None:
        """Takes the descriptor over. Raises NetnsRefused."""
        try:
            self._fd = duplicate(fd)
        except OSError as exc:
            raise NetnsRefused(f"the descriptor: {exc.strerror}; raise LimitNOFILE") from exc
        finally:
            os.close(fd)
        weakref.finalize(self, os.close, self._fd)
        check(self._fd, "the descriptor")
        self._id = netns_id(self._fd)

    def open(self) -> int:
        return duplicate(self._fd)

    def identity(self) -> NetnsId:
        return self._id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeldNetns) and other._id == self._id

    def __hash__(self) -> int:
        return hash(self._id)

    def __str__(self) -> str:
        return f"net:[{self._id.inode}]"


def check(fd: int, name: str, *, own: bool = False) -> None:
    """Raises NetnsRefused for what is no pod's network namespace."""
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError as exc:
        raise NetnsRefused(f"{name}: not a network namespace") from exc
    if kind != _CLONE_NEWNET:
        raise NetnsRefused(f"{name}: a namespace of another kind")
    if not own and netns_id(fd) in (_identity(_OWN), _identity(_INIT)):
        raise NetnsRefused(f"{name}: the node's own network namespace; capture would cut it off")


def netns_id(fd: int) -> NetnsId:
    found = os.fstat(fd)
    return NetnsId(found.st_ino, found.st_dev)


# Of one pod; a stat each.
_PROCESSES = 64


def namespaces_of(cgroup: Path) -> set[NetnsId]:
    """Of processes in a cgroup and those below; empty where none is, or it can't be read."""
    found: set[NetnsId] = set()
    looked = 0
    for members in cgroup.glob("**/cgroup.procs"):
        try:
            pids = members.read_text().split()
        except OSError:
            continue
        for pid in pids:
            if looked >= _PROCESSES:
                return found
            looked += 1
            if (one := _identity(Path("/proc", pid, "ns/net"))) is not None:
                found.add(one)
    return found


def _identity(path: Path) -> NetnsId | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return NetnsId(found.st_ino, found.st_dev)
