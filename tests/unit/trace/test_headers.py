"""Which kernel headers the compiler gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.trace import headers

if TYPE_CHECKING:
    from pathlib import Path


def whole(folder: Path) -> None:
    """As a kernel's own build leaves them."""
    for name in ("include/linux/kconfig.h", "include/generated/autoconf.h"):
        path = folder / "build" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def split(folder: Path) -> None:
    """As Debian packages them."""
    for name in ("source/include/linux/kconfig.h", "build/include/generated/autoconf.h"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_those_of_the_running_kernel_go_before_newer_ones(tmp_path: Path) -> None:
    for release in ("6.1.0-9", "6.12.1", "6.2.0"):
        whole(tmp_path / release)
    found = headers.find(tmp_path, "6.2.0")
    assert found is not None
    assert (found.source, found.flags) == (tmp_path / "6.2.0/build", ())


def test_without_them_the_newest_serve(tmp_path: Path) -> None:
    for release in ("6.1.0-9-amd64", "6.1.0-10-amd64", "5.10.0"):
        split(tmp_path / release)
    # A kernel without its headers.
    (tmp_path / "6.18.0").mkdir()
    found = headers.find(tmp_path, "6.18.0")
    assert found is not None
    assert found.source == tmp_path / "6.1.0-10-amd64/source"
    build = tmp_path / "6.1.0-10-amd64/build"
    assert f"-I{build}/include" in found.flags


def test_without_any_there_are_none(tmp_path: Path) -> None:
    assert headers.find(tmp_path / "missing") is None
    (tmp_path / "6.1.0").mkdir()
    assert headers.find(tmp_path) is None
