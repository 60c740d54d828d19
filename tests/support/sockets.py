"""What the kernel holds for one namespace: sockets by state, and connection entries."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from agent.cli.demo.netns import inside
from tests.support.sysctl import read

if TYPE_CHECKING:
    from agent.cli.demo.manifests import Pod

ESTABLISHED, TIME_WAIT = 1, 6


class Socket(NamedTuple):
    local_port: int
    remote: str
    remote_port: int
    state: int


def tcp_sockets(pod: Pod) -> list[Socket]:
    """Of IPv4."""
    text = inside(pod.sandbox.namespace, lambda: Path("/proc/thread-self/net/tcp").read_text())
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        local, (address, port) = fields[1].split(":"), fields[2].split(":")
        host = socket.inet_ntoa(bytes.fromhex(address)[::-1])
        found.append(Socket(int(local[1], 16), host, int(port, 16), int(fields[3], 16)))
    return found


def tracked(pod: Pod) -> int:
    """Entries of connection tracking; 0 where nothing in the namespace asks for it."""
    try:
        return int(read(pod, "net/netfilter/nf_conntrack_count"))
    except FileNotFoundError:
        return 0
