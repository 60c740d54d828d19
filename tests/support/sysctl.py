"""Kernel settings and counters of one pod's network namespace."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from agent.cli.demo.netns import inside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.cli.demo.manifests import Pod


def read(pod: Pod, name: str) -> str:
    """`name` is a path below /proc/sys. Raises OSError."""
    return inside(pod.sandbox.namespace, lambda: Path("/proc/sys", name).read_text().strip())


def write(pod: Pod, name: str, value: object) -> None:
    """Raises OSError."""
    inside(pod.sandbox.namespace, lambda: Path("/proc/sys", name).write_text(str(value)))


@contextmanager
def always_cookies(pod: Pod) -> Iterator[None]:
    """Of a SYN nothing is remembered, as under a flood."""
    usual = read(pod, "net/ipv4/tcp_syncookies")
    write(pod, "net/ipv4/tcp_syncookies", 2)
    try:
        yield
    finally:
        write(pod, "net/ipv4/tcp_syncookies", usual)


def netstat(pod: Pod, name: str) -> int:
    """A counter of the TCP stack, by its name in /proc/net/netstat."""
    text = inside(pod.sandbox.namespace, Path("/proc/thread-self/net/netstat").read_text)
    names, values = text.splitlines()[:2]
    return int(values.split()[names.split().index(name)])
