"""Kernel settings and counters of one pod's network namespace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agent.cli.demo.netns import inside

if TYPE_CHECKING:
    from agent.cli.demo.manifests import Pod


def read(pod: Pod, name: str) -> str:
    """`name` is a path below /proc/sys. Raises OSError."""
    return inside(pod.sandbox.namespace, lambda: Path("/proc/sys", name).read_text().strip())


def write(pod: Pod, name: str, value: object) -> None:
    """Raises OSError."""
    inside(pod.sandbox.namespace, lambda: Path("/proc/sys", name).write_text(str(value)))
