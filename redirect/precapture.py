"""Connections that are older than their pod's capture: told apart, looked at again, and ended.

Everything here is for a thread that is inside the pod's network namespace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from redirect import cgroups, sock_diag
from redirect.base import NotRetryable, RedirectError
from redirect.sockets import STATES, connection, connections

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from redirect.base import CaptureConfig
    from redirect.sockets import Connection

_MARK_MASK = 0xFFF
_SURE = frozenset(STATES) - {sock_diag.SYN_SENT, sock_diag.CLOSE_WAIT}
NO_SOCK_DESTROY = (
    "this kernel can't end connections of others (it lacks CONFIG_INET_DIAG_DESTROY); restart the"
    " application instead"
)


def find(config: CaptureConfig) -> list[Connection]:
    """Raises RedirectError. A connection made while looking may be among them, see `confirmed`.

    Not among them: one whose SYN isn't answered, for the next SYN is captured; and one whose far
    end has closed, which a captured one would look like after the data plane's end is gone.
    """
    there = past_the_proxy(connections(), config, leaves(config))
    return [one for one in there if one.state in _SURE]


def confirmed(config: CaptureConfig) -> list[Connection]:
    """As `find`, twice: the kernel's table isn't read in one moment, so of a new connection the
    application's end may be seen and the data plane's not yet."""
    first = find(config)
    if not first:
        return []
    second = {one.id for one in find(config)}
    return [one for one in first if one.id in second]


def alive(known: Iterable[tuple[int, bytes]]) -> list[Connection]:
    """Those of these sockets, each by family and id, that are still connected."""
    try:
        with sock_diag.opened() as diag:
            entries = (sock_diag.found(diag, family, id) for family, id in known)
            return [connection(entry) for entry in entries if entry and entry.state in STATES]
    except OSError as exc:
        raise RedirectError(f"connections can't be listed: {exc.strerror or exc}") from exc


def cut(doomed: Iterable[Connection]) -> int:
    """How many were ended; both sides see a reset. Raises RedirectError."""
    count = 0
    try:
        with sock_diag.opened() as diag:
            for one in doomed:
                # It may have changed its state meanwhile.
                entry = sock_diag.found(diag, one.family, one.id)
                count += entry is not None and sock_diag.destroyed(diag, entry)
    except sock_diag.NotPossible as exc:
        raise NotRetryable(NO_SOCK_DESTROY) from exc
    except PermissionError as exc:
        raise NotRetryable("connections can't be ended; give the agent CAP_NET_ADMIN") from exc
    except OSError as exc:
        raise RedirectError(f"connections can't be ended: {exc.strerror or exc}") from exc
    return count


def past_the_proxy(
    found: Iterable[Connection], config: CaptureConfig, leaves: Collection[int] = ()
) -> list[Connection]:
    """An application's connection is captured when it leads to the listener for outbound traffic,
    or when its other end is one of the data plane's."""
    own: list[Connection] = []
    rest: list[Connection] = []
    for one in found:
        (own if _is_the_data_planes(one, config, leaves) else rest).append(one)
    taken = {one.remote for one in own if one.local[1] == config.ports.outbound}
    ends = {(one.remote, one.local) for one in own}
    # Both ends in this pod: it talks to itself, which is nobody's business.
    inside = {(one.remote, one.local) for one in rest}
    return [
        one
        for one in rest
        if one.local not in taken
        and (one.local, one.remote) not in ends
        and (one.local, one.remote) not in inside
        and not one.remote[0].is_loopback
        and one.remote[0] not in config.probe_addresses
    ]


def _is_the_data_planes(one: Connection, config: CaptureConfig, leaves: Collection[int]) -> bool:
    """By its mark, which every process with NET_RAW can set, and by its cgroup where that is known:
    what it accepts counts to the cgroup of who made the listener, which is empty or gone after a
    hand-over."""
    if one.mark & _MARK_MASK != config.mark:
        return one.cgroup in leaves
    known = leaves and one.cgroup
    return not known or one.cgroup in leaves or not cgroups.inhabited(one.cgroup)


def leaves(config: CaptureConfig) -> tuple[int, ...]:
    """Inodes of the data planes' cgroups, as far as they can be read."""
    found = []
    for leaf in config.exempt_cgroups:
        try:
            found.append(cgroups.identify(leaf))
        except RedirectError:
            continue
    return tuple(found)
