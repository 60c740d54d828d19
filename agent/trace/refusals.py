"""Refusals by our eBPF programs, one by one: read in the memory of two pinned maps, whose layouts
are those of bpf/include/refusals.h (a test compares them).

The programs write while `tracing.until` lies ahead. Every tracer puts it off again and again and
reads the ring at its own pace, so that any number of them see all, and one that was killed leaves
nothing on for longer than LEASE.
"""

import contextlib
import ctypes
import mmap
import os
import struct
import time
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from agent.trace import pinned

# Some looks of a tracer, which may be late on a busy machine.
LEASE = 3.0
# number, time, slot, reason, pid, protocol, inbound, local_port, remote_port, pad, local, remote,
# comm
REFUSAL = struct.Struct("=QQIIIHHHHI16s16s16s")
# until, told
TRACING = struct.Struct("=QQ")


@dataclass(frozen=True)
class Refusal:
    # The kernel's monotonic nanoseconds.
    time: int
    # Inode of the pod's network namespace.
    netns: int
    reason: int
    inbound: bool
    protocol: int
    # The pod's end; port 0 where none is chosen yet.
    local: tuple[IPv4Address | IPv6Address, int]
    remote: tuple[IPv4Address | IPv6Address, int]
    # "" and 0 where no process called.
    process: str
    pid: int


class UnknownLayout(Exception):
    """The maps are of a data plane that isn't of this version."""


class Refusals:
    """State: `_maps`, those pinned as of the last `read`; `_namespaces`, as last seen by slot."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: _Maps | None = None
        self._namespaces: dict[int, int] = {}

    def read(self) -> tuple[list[Refusal], int]:
        """Those since the last call, the first time none, and how many more were lost: they were
        overwritten before this call. Keeps the programs telling. None where nothing is pinned.
        Raises UnknownLayout, OSError."""
        self._follow()
        if self._maps is None:
            return [], 0
        raw, lost = self._maps.read()
        slots = {fields[2] for fields in raw}
        for slot in slots:
            # A pod that has just gone was the last one here.
            with contextlib.suppress(OSError):
                self._namespaces[slot] = pinned.linked_netns(self._folder / "pods" / str(slot))
        return [_refusal(fields, self._namespaces.get(fields[2], 0)) for fields in raw], lost

    def close(self) -> None:
        if self._maps is not None:
            self._maps.close()
        self._maps = None

    def _follow(self) -> None:
        """What is pinned may come later, and be made anew."""
        pins = self._folder / "maps"
        try:
            identity = (pins / "refusals").stat().st_ino
        except (FileNotFoundError, NotADirectoryError):
            self.close()
            return
        if self._maps is None or self._maps.identity != identity:
            self.close()
            self._maps = _Maps(pins, identity)


class _Maps:
    def __init__(self, pins: Path, identity: int) -> None:
        self.identity = identity
        self._ring, self._places = _mapped(pins / "refusals", REFUSAL.size)
        self._state, _ = _mapped(pins / "tracing", TRACING.size)
        # The kernel reads it while it is written: one store, which packing bytes isn't.
        self._until = ctypes.c_uint64.from_buffer(self._state, 0)
        self._put_off()
        self._next = self._told()

    def read(self) -> tuple[list[tuple[Any, ...]], int]:
        self._put_off()
        told, found = self._told(), []
        lost = max(told - self._next - self._places, 0)
        self._next += lost
        while self._next < told:
            at = (self._next % self._places) * REFUSAL.size
            (before,) = struct.unpack_from("=Q", self._ring, at)
            fields = REFUSAL.unpack_from(self._ring, at)
            (after,) = struct.unpack_from("=Q", self._ring, at)
            self._next += 1
            if before == after == self._next:
                found.append(fields)
            elif max(before, after) > self._next:
                lost += 1
            else:
                # Still being written; the next look takes it.
                self._next -= 1
                break
        return found, lost

    def close(self) -> None:
        del self._until
        self._state.close()
        self._ring.close()

    def _put_off(self) -> None:
        self._until.value = time.monotonic_ns() + int(LEASE * 1e9)

    def _told(self) -> int:
        (told,) = struct.unpack_from("=8xQ", self._state)
        return int(told)


def _mapped(pin: Path, size: int) -> tuple[mmap.mmap, int]:
    """The map's memory, and how many values are in it."""
    fd = pinned.opened(pin)
    try:
        info = pinned.map_info(fd)
        if info.value_size != size:
            raise UnknownLayout(
                "refusals by our own programs aren't told: the data plane that loaded them isn't of"
                " this version (SIGHUP to the agent starts one that is)"
            )
        whole = -(-info.value_size * info.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
        return mmap.mmap(fd, whole), info.max_entries
    finally:
        os.close(fd)


def _refusal(fields: tuple[Any, ...], netns: int) -> Refusal:
    _, moment, _, reason, pid, protocol, inbound, local_port, remote_port, _, *rest = fields
    local, remote, comm = rest
    return Refusal(
        moment,
        netns,
        reason,
        bool(inbound),
        protocol,
        (_address(local), local_port),
        (_address(remote), remote_port),
        comm.partition(b"\0")[0].decode(errors="replace"),
        pid,
    )


def _address(word: bytes) -> IPv4Address | IPv6Address:
    plain = IPv6Address(word)
    return plain.ipv4_mapped or plain
