"""Names of cgroup2 leaves as nft and the kernel want them."""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from redirect.base import NotRetryable, RedirectError

# libnftables opens cgroup paths below this folder, whatever is mounted where.
NFT_ROOT = Path("/sys/fs/cgroup")
MOUNTINFO = Path("/proc/self/mountinfo")

# open_by_handle_at(2): a handle of kernfs is the id alone (linux/exportfs.h, FILEID_KERNFS).
_HANDLE = struct.Struct("=IiQ")
_KERNFS = 0xFE
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class CgroupMatch:
    """What stands in a rule: `socket cgroupv2 level <level> "<path>"`."""

    level: int
    # Relative to NFT_ROOT: "unified/…" on hosts that mount both versions.
    path: str


def mount_point(mountinfo: str) -> Path | None:
    """Where cgroup2 is mounted below NFT_ROOT; None when nft couldn't name a leaf of it."""
    for line in mountinfo.splitlines():
        # mountinfo(5): id parent major:minor root mount-point options optional… - type source …
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or not after.startswith("cgroup2 ") or len(fields) < 5:
            continue
        mounted = Path(fields[4])
        if mounted == NFT_ROOT or NFT_ROOT in mounted.parents:
            return mounted
    return None


class Mount:
    """Where cgroup2 is mounted below NFT_ROOT, read once: the kernel's list has lines for each pod,
    so that looking for it at each would cost a node with N pods N² of them (seen: a third of all
    that capture costs at 700 pods).

    State: `_found` (by `point`).
    """

    def __init__(self) -> None:
        # And the device of that file system, another one when it isn't mounted there any more.
        self._found: tuple[Path, int] | None = None

    def point(self) -> Path | None:
        """As `mount_point` of the calling process."""
        if self._found is not None and _device(self._found[0]) == self._found[1]:
            return self._found[0]
        mounted = mount_point(MOUNTINFO.read_text())
        device = None if mounted is None else _device(mounted)
        self._found = None if mounted is None or device is None else (mounted, device)
        return mounted


def match(leaf: Path, mounted: Path) -> CgroupMatch:
    """Raises NotRetryable for a path that isn't a leaf of this mount or can't be written in nft."""
    try:
        level = len(leaf.relative_to(mounted).parts)
    except ValueError as exc:
        raise NotRetryable(f"cgroup {leaf} isn't below the cgroup2 mount {mounted}") from exc
    if level == 0:
        raise NotRetryable(f"cgroup {leaf} is the root: exempting it would exempt every process")
    if '"' in str(leaf) or "\n" in str(leaf) or ".." in leaf.parts:
        raise NotRetryable(f"cgroup {leaf}: the path can't be written in an nftables rule")
    return CgroupMatch(level, str(leaf.relative_to(NFT_ROOT)))


def identify(leaf: Path) -> int:
    """The kernel's id of the leaf, another one after it was deleted and made again."""
    try:
        return leaf.stat().st_ino
    except OSError as exc:
        raise RedirectError(
            f"cgroup {leaf} of the data plane can't be read ({exc.strerror}):"
            " is the data plane running?"
        ) from exc


def inhabited(cgroup: int) -> bool:
    """Whether processes live in the cgroup of this id, or below; False also where that can't be
    told."""
    mounted = mount_point(MOUNTINFO.read_text())
    if mounted is None:
        return False
    mount = os.open(mounted, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = _libc.open_by_handle_at(mount, _HANDLE.pack(8, _KERNFS, cgroup), flags)
    finally:
        os.close(mount)
    if fd < 0:
        return False
    try:
        events = os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=fd)
        with open(events) as file:
            return "populated 1" in file.read()
    except FileNotFoundError:
        # The root has no such file, and never is empty.
        return True
    except OSError:
        # Deleted meanwhile.
        return False
    finally:
        os.close(fd)


def _device(mounted: Path) -> int | None:
    try:
        return mounted.stat().st_dev
    except OSError:
        return None
