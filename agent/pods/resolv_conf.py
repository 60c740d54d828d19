"""A pod's own resolv.conf: where it may be, and what it says, as far as it can be used."""

import os
import re
import stat
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path

NODE = Path("/etc/resolv.conf")
# systemd-resolved's own upstream servers: its 127.0.0.53 in NODE can't be reached from a pod.
BEHIND_A_STUB = Path("/run/systemd/resolve/resolv.conf")

# resolv.conf(5): more are ignored.
_MOST_SERVERS = 3
_MOST_DOMAINS = 32
# Real ones have a few hundred bytes; this one may be written by the pod.
_SIZE_LIMIT = 65536
_OF_PROCESS = re.compile(r"(/proc/[0-9]+/root)/(etc)/(resolv\.conf)")
_NAMED = re.compile(r"(?:/var)?/run/netns/([^/]+)")


@dataclass(frozen=True)
class ResolvConf:
    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    ndots: int = 1


class Unreadable(Exception):
    """The text names the file."""


def of_process(pid: int) -> Path:
    return Path(f"/proc/{pid}/root/etc/resolv.conf")


def of_netns(netns: Path) -> Path | None:
    """What `ip netns exec` would show; None for a namespace that isn't a named one."""
    named = _NAMED.fullmatch(str(netns))
    return Path("/etc/netns") / named[1] / "resolv.conf" if named else None


def read(path: Path) -> ResolvConf:
    """Raises Unreadable."""
    try:
        fd = _open(path)
    except OSError as exc:
        raise Unreadable(f"{path}: {exc.strerror}") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Unreadable(f"{path}: not a file")
    with open(fd, "rb") as file:
        content = file.read(_SIZE_LIMIT + 1)
    if len(content) > _SIZE_LIMIT:
        raise Unreadable(f"{path}: over {_SIZE_LIMIT} bytes, that is no resolv.conf")
    return parse(content.decode(errors="replace"))


def of_node() -> ResolvConf:
    """The agent's own; empty when there is none."""
    for path in (NODE, BEHIND_A_STUB):
        try:
            found = read(path)
        except Unreadable:
            continue
        if found.nameservers:
            return found
    return ResolvConf()


def parse(text: str) -> ResolvConf:
    """resolv.conf(5). Servers that can't be asked from a pod are left out: those on the loopback
    (a resolver in the pod would get its own questions back) and on one link only."""
    nameservers: list[str] = []
    search: list[str] = []
    ndots = 1
    for line in text.splitlines():
        words = line.partition("#")[0].partition(";")[0].split()
        match words:
            case ["nameserver", server, *_] if _can_be_asked(server):
                nameservers.append(server)
            case ["search" | "domain", *domains]:
                # The last one counts.
                search = domains
            case ["options", *options]:
                for option in options:
                    if found := re.fullmatch(r"ndots:(\d{1,2})", option):
                        ndots = min(int(found[1]), 15)
    names = tuple(name.rstrip(".").lower() for name in search[:_MOST_DOMAINS])
    return ResolvConf(tuple(nameservers[:_MOST_SERVERS]), tuple(filter(None, names)), ndots)


def _can_be_asked(server: str) -> bool:
    try:
        address = ip_address(server)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    address = mapped or address
    scoped = isinstance(address, IPv6Address) and address.scope_id is not None
    return not (address.is_loopback or address.is_unspecified or scoped)


def _open(path: Path) -> int:
    # O_NONBLOCK: a FIFO of that name must not hang the agent.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    inside = _OF_PROCESS.fullmatch(str(path))
    if inside is None:
        return os.open(path, flags)
    # Links are the pod's to make, and would lead into the node's files: none is followed.
    root = os.open(inside[1], os.O_PATH | os.O_CLOEXEC)
    try:
        folder = os.open(
            inside[2], os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root
        )
    finally:
        os.close(root)
    try:
        return os.open(inside[3], flags | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)
