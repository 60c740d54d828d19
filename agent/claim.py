"""One agent a node: the run folder and a lock on its pid file, held for the agent's life."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from agent.errors import AgentError, NodeClaimed
from agent.slices import RunPaths


class RunDirUnusable(AgentError):
    remedy = "run as root, or choose another --run-dir"


@contextmanager
def claimed(paths: RunPaths) -> Iterator[None]:
    """Raises NodeClaimed naming the other agent's pid, RunDirUnusable. The dead claim nothing."""
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        # Control sockets are within: nobody else is to find a way to them.
        paths.root.chmod(0o700)
        fd = _locked(paths)
    except OSError as exc:
        raise RunDirUnusable(f"{paths.root}: {exc.strerror}") from exc
    try:
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        yield
        paths.pid_file.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _locked(paths: RunPaths) -> int:
    """Raises NodeClaimed, OSError."""
    while True:
        fd = os.open(paths.pid_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The former owner may have removed the file between our open and our lock, and a lock
            # on a nameless file keeps nobody out.
            if _named(paths) == os.fstat(fd).st_ino:
                return fd
        except BlockingIOError:
            other = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise NodeClaimed(
                f"{paths.root}: another agent of this node runs, process {other}"
            ) from None
        os.close(fd)


def _named(paths: RunPaths) -> int | None:
    try:
        return paths.pid_file.stat().st_ino
    except FileNotFoundError:
        return None
