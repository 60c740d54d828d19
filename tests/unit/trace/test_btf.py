"""Fields are found where the kernel says they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agent.trace.btf import Btf, UnknownType
from agent.trace.programs import PROGRAMS, macros
from tests.unit.trace.made_btf import UNION, MadeBtf

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def made(tmp_path: Path) -> Btf:
    """A sock with fields in an anonymous union, behind a typedef, and of single bits."""
    kernel = MadeBtf()
    u32 = kernel.integer("u32", 4)
    pointer = kernel.pointer(u32)
    net = kernel.struct("", ("net", pointer, 0))
    alias = kernel.typedef("net_t", net)
    ends = kernel.struct("", ("saddr", u32, 0), ("daddr", u32, 32))
    either = kernel.struct("", ("pair", u32, 0), ("", ends, 0), kind=UNION)
    common = kernel.struct("common", ("state", u32, 0), ("", either, 64), ("net", alias, 192))
    kernel.struct("sock", ("before", u32, 0), ("common", common, 64))
    kernel.struct("flagged", ("bit", u32, 1 << 24 | 33), ("whole", u32, 64), bits=True)
    kernel.enum("reason", NONE=0, NO_SOCKET=3)
    path = tmp_path / "vmlinux"
    path.write_bytes(kernel.image())
    return Btf(path)


def test_fields_are_found_through_anonymous_unions_and_typedefs(made: Btf) -> None:
    assert made.offset("sock", "before") == 0
    assert made.offset("sock", "common.state") == 8
    assert made.offset("sock", "common.daddr") == 8 + 8 + 4
    assert made.offset("sock", "common.net.net") == 8 + 24
    assert made.offset("flagged", "whole") == 8


@pytest.mark.parametrize(
    ("struct", "path"),
    [("sock", "mark"), ("socket", "state"), ("sock", "common.net.net.inum"), ("flagged", "bit")],
)
def test_what_is_not_there_is_said_and_never_guessed(made: Btf, struct: str, path: str) -> None:
    with pytest.raises(UnknownType):
        made.offset(struct, path)


def test_enums_are_read(made: Btf) -> None:
    assert made.enum("reason") == {0: "NONE", 3: "NO_SOCKET"}
    with pytest.raises(UnknownType):
        made.enum("reasons")


@pytest.mark.parametrize("content", [b"", b"\x7fELF" * 20])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(UnknownType):
        Btf(path)


def test_records_are_read_as_long_as_they_are_written() -> None:
    """A record's last bytes are padding that keeps the next one aligned."""
    for program in PROGRAMS.values():
        assert program.record.size % 8 == 0
        assert len(program.record.unpack(bytes(program.record.size))) == len(program.fields)


def test_a_kernel_without_a_field_is_not_traced(made: Btf) -> None:
    with pytest.raises(UnknownType):
        macros(made)
