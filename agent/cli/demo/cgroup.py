"""The cgroup above everything that runs in pods, which capture by eBPF asks for: this very process
is in it, and so is what it starts, since a socket belongs to the cgroup of who makes it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from agent.cli.demo.world import cgroup2_mounts, remove_cgroup


def folder(name: str) -> Path | None:
    """None where no cgroup2 is mounted."""
    mounts = cgroup2_mounts()
    return mounts[0] / name if mounts else None


def own() -> Path:
    """This process's. Raises OSError where no cgroup2 is mounted."""
    mounts = cgroup2_mounts()
    if not mounts:
        raise OSError("no cgroup2 is mounted")
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return mounts[0] / next(line[3:] for line in lines if line.startswith("0::")).lstrip("/")


def enter(cgroup: Path) -> None:
    """This process, with all that it starts from now on."""
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def entered(cgroup: Path) -> Iterator[Path]:
    """Made if need be. Who is left in it afterwards is the caller's to end; an empty one goes."""
    before = own()
    cgroup.mkdir(parents=True, exist_ok=True)
    enter(cgroup)
    try:
        yield cgroup
    finally:
        enter(before)
        remove_cgroup(cgroup)


@contextlib.contextmanager
def of_this_process(name: str) -> Iterator[Path]:
    """Its own one below a folder of that name; those of processes that crashed are swept away."""
    above = folder(name)
    if above is None:
        raise OSError("no cgroup2 is mounted")
    for left in above.glob("*"):
        if left.name.isdigit() and not Path(f"/proc/{left.name}").exists():
            remove_cgroup(left)
    with entered(above / str(os.getpid())) as made:
        yield made
    with contextlib.suppress(OSError):
        above.rmdir()
