"""Ports that nobody listens on any more but that ended connections still hold.

A proxy that shared its ports (SO_REUSEPORT) leaves connections in TIME_WAIT behind that keep its
successor from binding for a minute, unless that one shares them too, which ours never does (seen).
The kernel lets a privileged process end them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from redirect import sock_diag
from redirect.base import RedirectError

if TYPE_CHECKING:
    from collections.abc import Collection

    from redirect.netns import NetnsThread


async def free(threads: NetnsThread, netns_fd: int, ports: Collection[int], *, subject: str) -> int:
    """How many ended connections were made to let go of these ports: none while any of the ports
    has a listener. Raises RedirectError."""
    return await threads.run(netns_fd, lambda: _free(frozenset(ports), subject), subject=subject)


def _free(ports: frozenset[int], subject: str) -> int:
    try:
        with sock_diag.opened() as diag:
            # Alone first: a pod has few listeners, and may have thousands of the others.
            if any(entry.local_port in ports for entry in sock_diag.listed(diag, sock_diag.LISTEN)):
                return 0
            # All is acknowledged: they owe their peers nothing more.
            ended = list(sock_diag.listed(diag, sock_diag.FIN_WAIT_2, sock_diag.TIME_WAIT))
            mine = [entry for entry in ended if entry.local_port in ports and not entry.inode]
            return sum(sock_diag.destroyed(diag, entry) for entry in mine)
    except OSError as exc:
        raise RedirectError(f"{subject}: ended connections on its ports: {exc.strerror}") from exc
