"""The table of compatibility is of the present tests, and its generator notices when not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load() -> Any:
    """A script beside the packages, not one of them."""
    path = ROOT / "tools" / "compatibility.py"
    spec = importlib.util.spec_from_file_location("compatibility", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compatibility = _load()


def test_page_is_up_to_date_and_names_only_tests_that_exist() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/compatibility.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("field", ["tests", "better"])
def test_a_test_that_does_not_exist_is_named(field: str) -> None:
    content: dict[str, Any] = tomllib.loads(compatibility.SOURCE.read_text())
    line = content["section"][0]["line"][0]
    line[field] = ["no_such_test"] if field == "tests" else "as shown (no_such_test)"
    assert compatibility.unknown(content, compatibility.tests(ROOT)) == ["no_such_test"]


def test_tests_of_both_languages_are_found_and_helpers_are_not(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "dataplane").mkdir()
    (tmp_path / "tests/test_a.py").write_text("async def test_one() -> None: ...\ndef two(): ...\n")
    (tmp_path / "dataplane/a.rs").write_text(
        "#[tokio::test(start_paused = true)]\nasync fn three() {}\nfn four() {}\n"
        '#[test]\n#[should_panic(expected = "x")]\nfn five() {}\n'
    )
    assert set(compatibility.tests(tmp_path)) == {"one", "three", "five"}
