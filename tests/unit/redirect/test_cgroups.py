from __future__ import annotations

from pathlib import Path

import pytest

from redirect import NotRetryable, RedirectError, cgroups
from redirect.cgroups import CgroupMatch, Mount, identify, match, mount_point

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:7 - cgroup2 cgroup2 rw
"""
UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
ELSEWHERE = "30 23 0:26 / /mnt/cgroup2 rw - cgroup2 cgroup2 rw\n"


def test_the_mount_is_found_on_hybrid_and_unified_hosts() -> None:
    assert mount_point(HYBRID) == Path("/sys/fs/cgroup/unified")
    assert mount_point(UNIFIED) == Path("/sys/fs/cgroup")


def test_a_mount_that_nft_cannot_name_counts_as_none() -> None:
    assert mount_point(ELSEWHERE) is None
    assert mount_point("") is None
    assert mount_point(ELSEWHERE + UNIFIED) == Path("/sys/fs/cgroup")


def test_the_list_of_mounts_is_read_again_only_when_the_mount_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, listed = tmp_path / "first", tmp_path / "second", tmp_path / "mountinfo"
    monkeypatch.setattr(cgroups, "MOUNTINFO", listed)
    monkeypatch.setattr(cgroups, "NFT_ROOT", tmp_path)
    for folder in (first, second):
        folder.mkdir()
    listed.write_text(f"31 30 0:26 / {first} rw - cgroup2 cgroup2 rw\n")
    mount = Mount()
    assert mount.point() == first
    listed.write_text(f"32 30 0:27 / {second} rw - cgroup2 cgroup2 rw\n")
    assert mount.point() == first
    first.rmdir()
    assert mount.point() == second


def test_the_path_is_relative_to_nfts_root_and_the_level_to_the_mount() -> None:
    hybrid = match(Path("/sys/fs/cgroup/unified/underpass/a"), Path("/sys/fs/cgroup/unified"))
    assert hybrid == CgroupMatch(2, "unified/underpass/a")
    unified = match(Path("/sys/fs/cgroup/underpass/a"), Path("/sys/fs/cgroup"))
    assert unified == CgroupMatch(2, "underpass/a")


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        ("/sys/fs/cgroup", "every process"),
        ("/run/leaf", "isn't below"),
        ('/sys/fs/cgroup/a" accept', "can't be written"),
        ("/sys/fs/cgroup/a/../..", "can't be written"),
    ],
)
def test_what_is_no_leaf_is_refused(leaf: str, text: str) -> None:
    with pytest.raises(NotRetryable, match=text):
        match(Path(leaf), Path("/sys/fs/cgroup"))


def test_a_leaf_that_is_gone_is_named(tmp_path: Path) -> None:
    assert identify(tmp_path) == tmp_path.stat().st_ino
    with pytest.raises(RedirectError, match="gone"):
        identify(tmp_path / "gone")
