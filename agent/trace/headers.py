"""Kernel headers for the compiler. Only their plain types are used, never a kernel structure's
layout (see btf.py), so those of another kernel serve too."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

MODULES = Path("/lib/modules")
# What bcc looks for to know a folder of headers.
_MARK = Path("include/linux/kconfig.h")
_GENERATED = Path("include/generated/autoconf.h")
_ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64", "s390x": "s390", "ppc64le": "powerpc"}


@dataclass(frozen=True)
class Headers:
    """`source` goes to bcc as BCC_KERNEL_SOURCE, `flags` to the compiler."""

    source: Path
    flags: tuple[str, ...] = ()


def find(modules: Path = MODULES, release: str | None = None) -> Headers | None:
    """Those of the running kernel, else the newest that are installed, else None."""
    own = release or os.uname().release
    folders = sorted(modules.iterdir(), key=_version, reverse=True) if modules.is_dir() else []
    for folder in sorted(folders, key=lambda folder: folder.name != own):
        if (found := _of(folder)) is not None:
            return found
    return None


def _of(folder: Path) -> Headers | None:
    """Debian keeps what a kernel's build generated apart from what it has in common with others."""
    build, source = folder / "build", folder / "source"
    if not (build / _GENERATED).is_file():
        return None
    if (build / _MARK).is_file():
        return Headers(build.resolve())
    if not (source / _MARK).is_file():
        return None
    machine = platform.machine()
    arch = build / "arch" / _ARCHITECTURES.get(machine, machine) / "include/generated"
    also = (arch, arch / "uapi", build / "include", build / "include/generated/uapi")
    return Headers(source.resolve(), tuple(f"-I{path.resolve()}" for path in also))


def _version(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder.name)]
