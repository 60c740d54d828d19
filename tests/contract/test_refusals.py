"""The tracer reads what the eBPF programs write, and their reasons are told alike in the header, in
the tracer and on the page."""

import re
import struct
from pathlib import Path

import pytest

from agent.trace.reasons import NUMBERED
from agent.trace.refusals import REFUSAL, TRACING

ROOT = Path(__file__).parents[2]
INCLUDE = ROOT / "bpf" / "include"
REASON = re.compile(r"\bREASON_([A-Z0-9_]+) = (\d+), /\* (.+) \*/")
FIELD = re.compile(r"^\t(__u16|__u32|__u64|struct address|char) (\w+)(?:\[(\d+)\])?;$", re.M)
CODES = {"__u16": "H", "__u32": "I", "__u64": "Q", "struct address": "16s"}
COMMENT = re.compile(r"/\*.*?\*/", re.S)
DEFINITION = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.M | re.S)


def in_header() -> dict[int, tuple[str, str]]:
    text = (INCLUDE / "reasons.h").read_text()
    return {int(number): (name.lower(), why) for name, number, why in REASON.findall(text)}


def layout(name: str) -> str:
    """Of a structure, as Python's `struct` writes it."""
    text = COMMENT.sub("", (INCLUDE / "refusals.h").read_text())
    found = dict(DEFINITION.findall(text))
    fields = FIELD.findall(found[name])
    assert len(fields) == found[name].count(";"), found[name]
    return "".join(f"{length}s" if kind == "char" else CODES[kind] for kind, _, length in fields)


@pytest.mark.parametrize(("name", "read"), [("refusal", REFUSAL), ("tracing", TRACING)])
def test_a_structure_is_read_as_it_is_written(name: str, read: struct.Struct) -> None:
    assert f"={layout(name)}" == read.format
    # Without holes, which the compiler would leave.
    assert struct.calcsize(f"@{layout(name)}0Q") == read.size


def test_the_tracer_names_every_reason_as_the_header_does() -> None:
    assert in_header() == NUMBERED


def test_the_page_lists_every_reason_with_its_text() -> None:
    page = (ROOT / "docs" / "tracing.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \|$", page, re.M)
    assert {int(number): (name, why) for number, name, why in rows} == in_header()


def test_every_text_says_first_what_happens() -> None:
    for name, text in in_header().values():
        assert text.split(": ")[0] in ("pass", "deny", "drop"), name
