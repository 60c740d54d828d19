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
        fd = os.open(paths.pid_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise RunDirUnusable(f"{paths.root}: {exc.strerror}") from exc
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            raise NodeClaimed(
                f"{paths.root}: another agent of this node runs, process {other}"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        yield
        paths.pid_file.unlink(missing_ok=True)
    finally:
        os.close(fd)
