"""The cgroup above everything that the bench runs in pods, which capture by eBPF asks for: this
very process is in it, and so is what it starts."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from agent.cli.demo.world import cgroup2_mounts, remove_cgroup

FOLDER = "underpass-bench"


@contextlib.contextmanager
def pods_cgroup() -> Iterator[Path]:
    """A crashed run's are swept away; who is left in it is the caller's to end."""
    (mount, *_) = cgroup2_mounts()
    for left in (mount / FOLDER).glob("*"):
        if left.name.isdigit() and not Path(f"/proc/{left.name}").exists():
            remove_cgroup(left)
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    before = mount / next(line[3:] for line in lines if line.startswith("0::")).lstrip("/")
    made = mount / FOLDER / str(os.getpid())
    made.mkdir(parents=True)
    (made / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield made
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
        remove_cgroup(made)
        with contextlib.suppress(OSError):
            (mount / FOLDER).rmdir()
