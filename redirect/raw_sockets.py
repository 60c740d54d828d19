"""Sockets that write packets by themselves: what they send meets no hook that captures, and that of
packet sockets no rule either. It can't be prevented, so it is shown."""

from __future__ import annotations

from pathlib import Path

# One socket a line, below a heading; of the network namespace that the calling thread is in.
_TABLES = ("packet", "raw", "raw6")
_FOLDER = Path("/proc/thread-self/net")


def count() -> int:
    """Of a kernel without packet sockets or IPv6 the table is missing: none of those."""
    return sum(_lines(_FOLDER / table) for table in _TABLES)


def _lines(table: Path) -> int:
    try:
        text = table.read_text()
    except OSError:
        return 0
    return max(0, len(text.splitlines()) - 1)
