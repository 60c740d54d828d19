"""A pod and a remote host as two joined namespaces, and sockets inside them.

Sockets are made on a thread that enters the namespace and are then used from anywhere: a socket
stays in the namespace, and in the cgroup, it was made in.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import subprocess
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from redirect import Target
from redirect.cgroups import MOUNTINFO, mount_point

if TYPE_CHECKING:
    from collections.abc import Iterator

SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h, and the same number for IPv6
IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75
DATA_PLANE_MARK = 0x539

TcpSocket = socket.socket  # inside Host the word is a method

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Host:
    netns: str
    v4: str
    v6: str

    def address(self, family: int) -> str:
        return self.v4 if family == socket.AF_INET else self.v6

    def socket(self, family: int) -> TcpSocket:
        """A TCP socket in this namespace that gives up after two seconds."""
        made: list[TcpSocket] = []

        def make() -> None:
            with open(f"/run/netns/{self.netns}") as namespace:
                os_setns(namespace.fileno())
            made.append(socket.socket(family))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        made[0].settimeout(2)
        return made[0]

    def listen(self, family: int, port: int) -> TcpSocket:
        listener = self.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("" if family == socket.AF_INET else "::", port))
        listener.listen(64)
        return listener

    def run(self, *command: str) -> str:
        """Output of a command in this namespace; a failing one fails the test with its message."""
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.netns}", *command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout


@dataclass(frozen=True)
class World:
    pod: Host
    remote: Host


@contextmanager
def world() -> Iterator[World]:
    """A pod (interface eth0, default route) and the remote host that is its only neighbour."""
    _sweep()
    number = next(_numbers)
    base = f"up-redirect-{os.getpid()}-{number}"
    pod = Host(f"{base}-p", f"10.77.{number % 250}.2", f"fd77:{number:x}::2")
    remote = Host(f"{base}-r", f"10.77.{number % 250}.1", f"fd77:{number:x}::1")
    try:
        _ip("netns", "add", pod.netns)
        _ip("netns", "add", remote.netns)
        _ip("link", "add", "eth0", "netns", pod.netns, "type", "veth", "peer", "name", "eth0",
            "netns", remote.netns)  # fmt: skip
        for host in (pod, remote):
            _ip("-n", host.netns, "link", "set", "lo", "up")
            _ip("-n", host.netns, "link", "set", "eth0", "up")
            _ip("-n", host.netns, "addr", "add", f"{host.v4}/24", "dev", "eth0")
            _ip("-n", host.netns, "addr", "add", f"{host.v6}/64", "dev", "eth0", "nodad")
        _ip("-n", pod.netns, "route", "add", "default", "via", remote.v4)
        _ip("-n", pod.netns, "-6", "route", "add", "default", "via", remote.v6)
        yield World(pod, remote)
    finally:
        for host in (pod, remote):
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", host.netns)


@contextmanager
def target(pod: Host, **options: object) -> Iterator[Target]:
    with open(f"/run/netns/{pod.netns}") as namespace:
        yield Target(
            uid=pod.netns,
            name=f"test/{pod.netns}",
            netns_fd=namespace.fileno(),
            **options,  # type: ignore[arg-type]
        )


@contextmanager
def cgroup_leaf() -> Iterator[Path]:
    """A cgroup2 leaf of our own, removed afterwards."""
    mounted = mount_point(MOUNTINFO.read_text())
    assert mounted is not None, "cgroup2 isn't mounted below /sys/fs/cgroup"
    parent = mounted / f"up-redirect-{os.getpid()}-{next(_numbers)}"
    leaf = parent / "data-plane"
    leaf.mkdir(parents=True)
    try:
        yield leaf
    finally:
        for folder in (leaf, parent):
            with suppress(FileNotFoundError):
                folder.rmdir()


@contextmanager
def inside(leaf: Path) -> Iterator[None]:
    """This process is a member of the cgroup meanwhile."""
    own = next(
        line.removeprefix("0::")
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::")
    )
    mounted = mount_point(MOUNTINFO.read_text())
    assert mounted is not None
    (leaf / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (mounted / own.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))


def mark(sock: socket.socket, value: int = DATA_PLANE_MARK) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, value)


def original_dst(sock: socket.socket) -> tuple[str, int]:
    if sock.family == socket.AF_INET:
        raw = sock.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        port, address = struct.unpack("!2xH4s8x", raw)
        return socket.inet_ntop(socket.AF_INET, address), port
    raw = sock.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
    port, address = struct.unpack("!2xH4x16s4x", raw)
    return socket.inet_ntop(socket.AF_INET6, address), port


def os_setns(fd: int) -> None:
    """`os.setns` came with Python 3.12."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _sweep() -> None:
    """Removes what runs that were killed left; names hold the pid of their run."""
    mounted = mount_point(MOUNTINFO.read_text())
    cgroups = mounted.glob("up-redirect-*") if mounted else ()
    for path in (*Path("/run/netns").glob("up-redirect-*"), *cgroups):
        owner = path.name.split("-")[2]
        if owner.isdigit() and not Path("/proc", owner).exists():
            if path.is_dir():
                for folder in (path / "data-plane", path):
                    with suppress(OSError):
                        folder.rmdir()
            else:
                subprocess.run(["ip", "netns", "del", path.name], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
