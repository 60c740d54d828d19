"""TCP connections of the network namespace that the calling thread is in."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from redirect import sock_diag
from redirect.base import RedirectError

Address = tuple[IPv4Address | IPv6Address, int]

# Those that carry bytes or are about to.
STATES = (
    sock_diag.ESTABLISHED,
    sock_diag.SYN_SENT,
    sock_diag.FIN_WAIT_1,
    sock_diag.FIN_WAIT_2,
    sock_diag.CLOSE_WAIT,
)
_ENDS = struct.Struct("!HH16s16s")


@dataclass(frozen=True, slots=True)
class Connection:
    local: Address
    remote: Address
    mark: int = 0
    cgroup: int = 0
    state: int = sock_diag.ESTABLISHED
    # For the kernel: the family of the socket, which may be IPv6 for IPv4 addresses, and its id.
    family: int = socket.AF_INET
    id: bytes = b""
    # Payload so far; 0 unless asked for.
    sent: int = 0
    received: int = 0

    def __str__(self) -> str:
        return f"{_text(self.local)} ↔ {_text(self.remote)}"


def connections(*, sizes: bool = False, arriving: bool = False) -> list[Connection]:
    """Raises RedirectError. Marks are 0 without CAP_NET_ADMIN. `arriving`: also those whose client
    hasn't answered the SYN-ACK yet, which no process has."""
    states = (*STATES, sock_diag.SYN_RECV) if arriving else STATES
    try:
        with sock_diag.opened() as diag:
            return [connection(entry) for entry in sock_diag.listed(diag, *states, sizes=sizes)]
    except OSError as exc:
        raise RedirectError(f"connections can't be listed: {exc.strerror or exc}") from exc


def listening() -> set[int]:
    """Ports that somebody accepts TCP connections on. Raises RedirectError."""
    try:
        with sock_diag.opened() as diag:
            return {entry.local_port for entry in sock_diag.listed(diag, sock_diag.LISTEN)}
    except OSError as exc:
        raise RedirectError(f"listeners can't be listed: {exc.strerror or exc}") from exc


def connection(entry: sock_diag.Entry) -> Connection:
    sport, dport, source, destination = _ENDS.unpack_from(entry.id)
    length = 4 if entry.family == socket.AF_INET else 16
    return Connection(
        (plain(source[:length]), sport),
        (plain(destination[:length]), dport),
        entry.mark,
        entry.cgroup,
        entry.state,
        entry.family,
        entry.id,
        entry.sent,
        entry.received,
    )


def plain(packed: bytes) -> IPv4Address | IPv6Address:
    """Sockets of both families see IPv4 peers as mapped addresses."""
    found = ip_address(packed)
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found


def _text(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"
