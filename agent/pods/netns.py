"""Pods' network namespaces by path: opened, told apart, and refused when they aren't a pod's."""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from agent.errors import NetnsMissing, NetnsRefused

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


@dataclass(frozen=True)
class NetnsPath:
    """Where a pod's namespace is to be found."""

    path: Path
    # A path may come to name a successor of the namespace; a process id only names a stranger.
    follow: bool = True

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
            self._check(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def identity(self) -> NetnsId | None:
        """What the path names now; None when nothing."""
        return _identity(self.path)

    def _check(self, fd: int) -> None:
        try:
            kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
        except OSError as exc:
            raise NetnsRefused(f"{self.path}: not a network namespace") from exc
        if kind != _CLONE_NEWNET:
            raise NetnsRefused(f"{self.path}: a namespace of another kind")
        if netns_id(fd) in (_identity(_OWN), _identity(_INIT)):
            raise NetnsRefused(
                f"{self.path}: the node's own network namespace; capture would cut it off"
            )


def netns_id(fd: int) -> NetnsId:
    found = os.fstat(fd)
    return NetnsId(found.st_ino, found.st_dev)


def _identity(path: Path) -> NetnsId | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return NetnsId(found.st_ino, found.st_dev)
