"""The cgroup above all sockets that tests make in pods: this very process is in it, since a socket
belongs to the cgroup of the process that makes it."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from agent.cli.demo.world import cgroup2_mounts, remove_cgroup

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = "underpass-tests"


@contextmanager
def pods_cgroup() -> Iterator[Path]:
    """A crashed run's are swept away."""
    (mount, *_) = cgroup2_mounts()
    for left in (mount / FOLDER).glob("*"):
        if left.name.isdigit() and not Path(f"/proc/{left.name}").exists():
            remove_cgroup(left)
    made = mount / FOLDER / str(os.getpid())
    made.mkdir(parents=True)
    before = mount / _own().lstrip("/")
    (made / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield made
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
        remove_cgroup(made)


def _own() -> str:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next(line[3:] for line in lines if line.startswith("0::"))
