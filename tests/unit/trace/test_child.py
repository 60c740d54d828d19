"""What is missing on this machine is told in words, with what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.trace import btf, child, headers, tracer

if TYPE_CHECKING:
    from collections.abc import Callable


def no_type_information(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> btf.Btf:
        return btf.Btf(Path("/nonexistent/btf"))

    monkeypatch.setattr(child, "Btf", missing)


def no_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "find", lambda: None)


def no_bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "find", lambda: headers.Headers(Path("/nonexistent")))
    monkeypatch.setitem(sys.modules, "bcc", None)


@pytest.mark.parametrize(
    ("lacking", "told"),
    [
        (no_type_information, "CONFIG_DEBUG_INFO_BTF"),
        (no_headers, "apt-get install linux-headers-amd64"),
        (no_bcc, "apt-get install python3-bpfcc"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lacking: Callable[[pytest.MonkeyPatch], None],
    told: str,
) -> None:
    # A child that asks to end with its parent would be this very process.
    monkeypatch.setattr(child, "_end_with", lambda parent: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(child, "macros", lambda found: ())
    lacking(monkeypatch)
    assert child.main("tcp", os.getppid(), 15053) == 1
    line = capsys.readouterr().out
    assert line.startswith('{"error": ')
    assert told in line


def test_the_systems_python_serves_where_ours_has_no_bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracer, "find_spec", lambda name: None)
    assert tracer.interpreter() == "/usr/bin/python3"
    monkeypatch.setattr(tracer, "find_spec", lambda name: object())
    assert tracer.interpreter() == sys.executable


async def test_an_error_of_the_child_is_raised_with_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "fatal: no compiler" >&2\necho \'{"error": "no luck"}\'\n')
    script.chmod(0o755)
    monkeypatch.setattr(tracer, "interpreter", lambda: str(script))
    async with tracer.Tracer("tcp", 15053) as started:
        with pytest.raises(tracer.TraceError) as raised:
            await anext(started.records())
    assert str(raised.value) == "no luck\nfatal: no compiler"
