"""The tracer's reading of the ring of refusals, from real pinned maps that the test writes to as
the programs would."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import subprocess
import time
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING

import pytest

from agent.trace.refusals import LEASE, REFUSAL, TRACING, Refusals, UnknownLayout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# bpf(2), linux/bpf.h
CALL = {"x86_64": 321, "aarch64": 280}[platform.machine()]
MAP_CREATE, OBJ_PIN = 0, 6
ARRAY, MMAPABLE = 2, 1 << 10
PLACES = 8


class Programs:
    """Two maps pinned in a folder, and their memory."""

    def __init__(self, folder: Path, *, size: int = REFUSAL.size) -> None:
        self.folder = folder
        pins = folder / "maps"
        pins.mkdir(parents=True)
        self._ring = pinned_map(pins / "refusals", size, PLACES)
        self._state = pinned_map(pins / "tracing", TRACING.size, 1)

    @property
    def until(self) -> int:
        return int(TRACING.unpack_from(self._state)[0])

    @property
    def told(self) -> int:
        return int(TRACING.unpack_from(self._state)[1])

    def tell(self, reason: int, *, finished: bool = True) -> None:
        number = self.told
        struct.pack_into("=8xQ", self._state, 0, number + 1)
        ends = [ip_address(text).packed for text in ("::ffff:192.0.2.1", "2001:db8::1")]
        fields = (time.monotonic_ns(), 5, reason, 77, 6, 1, 80, 4000, 0, *ends, b"curl\0rest")
        REFUSAL.pack_into(self._ring, number % PLACES * REFUSAL.size, 0, *fields)
        if finished:
            self.finish(number)

    def finish(self, number: int) -> None:
        struct.pack_into("=Q", self._ring, number % PLACES * REFUSAL.size, number + 1)

    def remove(self) -> None:
        for name in ("refusals", "tracing"):
            (self.folder / "maps" / name).unlink()
        (self.folder / "maps").rmdir()
        self.folder.rmdir()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """On a BPF file system of the test's own."""
    subprocess.run(["mount", "-t", "bpf", "bpf", tmp_path], check=True)
    try:
        yield tmp_path / "node"
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def reasons(refusals: Refusals) -> tuple[list[int], int]:
    found, lost = refusals.read()
    return [one.reason for one in found], lost


def test_what_was_told_before_is_nobodys_and_what_comes_is_told_once(folder: Path) -> None:
    programs = Programs(folder)
    programs.tell(1)
    refusals, beside = Refusals(folder), Refusals(folder)
    assert reasons(refusals) == ([], 0)
    assert reasons(beside) == ([], 0)
    programs.tell(33)
    (one,), lost = refusals.read()
    assert lost == 0
    assert (one.reason, one.pid, one.process, one.inbound, one.protocol) == (
        33,
        77,
        "curl",
        True,
        6,
    )
    assert one.local == (IPv4Address("192.0.2.1"), 80)
    assert one.remote == (IPv6Address("2001:db8::1"), 4000)
    programs.tell(34)
    assert reasons(refusals) == ([34], 0)
    assert reasons(beside) == ([33, 34], 0)


def test_a_reader_that_is_late_knows_how_many_it_lost(folder: Path) -> None:
    programs = Programs(folder)
    refusals = Refusals(folder)
    assert reasons(refusals) == ([], 0)
    for number in range(PLACES + 3):
        programs.tell(number)
    assert reasons(refusals) == (list(range(3, PLACES + 3)), 3)
    assert reasons(refusals) == ([], 0)


def test_what_is_still_being_written_is_read_later_and_once(folder: Path) -> None:
    programs = Programs(folder)
    refusals = Refusals(folder)
    assert reasons(refusals) == ([], 0)
    programs.tell(1)
    programs.tell(2, finished=False)
    programs.tell(3)
    assert reasons(refusals) == ([1], 0)
    programs.finish(1)
    assert reasons(refusals) == ([2, 3], 0)


def test_looking_asks_for_more_and_only_for_a_while(folder: Path) -> None:
    programs = Programs(folder)
    refusals = Refusals(folder)
    assert programs.until == 0
    refusals.read()
    first = programs.until
    assert 0 < first - time.monotonic_ns() <= LEASE * 1e9
    refusals.read()
    assert programs.until > first


def test_maps_may_come_later_and_be_made_anew(folder: Path) -> None:
    refusals = Refusals(folder)
    assert reasons(refusals) == ([], 0)
    programs = Programs(folder)
    assert reasons(refusals) == ([], 0)
    programs.tell(1)
    assert reasons(refusals) == ([1], 0)
    programs.remove()
    assert reasons(refusals) == ([], 0)
    again = Programs(folder)
    assert reasons(refusals) == ([], 0)
    again.tell(2)
    assert reasons(refusals) == ([2], 0)
    refusals.close()


def test_a_ring_of_another_version_is_told_as_such(folder: Path) -> None:
    Programs(folder, size=REFUSAL.size + 8)
    with pytest.raises(UnknownLayout, match="of this version"):
        Refusals(folder).read()


# ---- helpers


def pinned_map(path: Path, size: int, places: int) -> mmap.mmap:
    fd = bpf(MAP_CREATE, struct.pack("=5I", ARRAY, 4, size, places, MMAPABLE))
    try:
        name = ctypes.create_string_buffer(os.fsencode(path))
        bpf(OBJ_PIN, struct.pack("=QII", ctypes.addressof(name), fd, 0))
        whole = -(-size * places // mmap.PAGESIZE) * mmap.PAGESIZE
        return mmap.mmap(fd, whole)
    finally:
        os.close(fd)


def bpf(command: int, arguments: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = ctypes.create_string_buffer(arguments, len(arguments))
    result = libc.syscall(CALL, command, attributes, len(arguments))
    assert result >= 0, os.strerror(ctypes.get_errno())
    return int(result)
