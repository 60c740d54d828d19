#!/usr/bin/python3
"""Makes docs/compatibility.md of docs/compatibility.toml; fails where a named test doesn't exist.

`--check` only compares, for tests and continuous integration.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "docs" / "compatibility.toml"
PAGE = ROOT / "docs" / "compatibility.md"

_PYTHON = re.compile(r"^\s*(?:async )?def test_(\w+)\(", re.MULTILINE)
# A test's attribute may be followed by others; a helper of the same name has none.
_RUST = re.compile(
    r"#\[(?:tokio::)?test(?:\([^)]*\))?\]\s*(?:#\[[^\]]*\]\s*)*(?:async )?fn (\w+)", re.MULTILINE
)
# Tests named in what is better stand in parentheses.
_IN_TEXT = re.compile(r"\((\w+_\w+)\)")
_HEAD = (
    "# {title}\n\n"
    "Upstream's node proxy is measured by its tests, and by what its peers expect of it. Each line "
    "names the tests of ours that cover it; `make docs` makes this page of "
    "`docs/compatibility.toml` and fails where a test doesn't exist. What isn't about behaviour "
    "(upstream's internal types) is left out.\n"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Fail if the page isn't up to date.")
    check = parser.parse_args().check
    content = tomllib.loads(SOURCE.read_text(encoding="utf-8"))
    known = tests(ROOT)
    if missing := unknown(content, known):
        print(f"{SOURCE.name} names tests that don't exist:", file=sys.stderr)
        for name in missing:
            print(f"  {name}", file=sys.stderr)
        return 1
    page = render(content, known)
    if not check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        print(f"{PAGE.name} isn't up to date: run make docs", file=sys.stderr)
        return 1
    return 0


def tests(root: Path) -> dict[str, Path]:
    """Names of all tests with their files; of two with one name the first by path."""
    found: dict[str, Path] = {}
    for folder, pattern, shape in (("tests", "test_*.py", _PYTHON), ("dataplane", "*.rs", _RUST)):
        for path in sorted((root / folder).rglob(pattern)):
            if "target" not in path.relative_to(root).parts:
                for name in shape.findall(path.read_text(encoding="utf-8")):
                    found.setdefault(name, path.relative_to(root))
    return found


def unknown(content: dict[str, Any], known: Iterable[str]) -> list[str]:
    named: list[str] = []
    for line in lines(content):
        named += [*line["tests"], *_IN_TEXT.findall(line.get("better", ""))]
    return [name for name in named if name not in known]


def lines(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for section in content["section"]:
        yield from section["line"]


def render(content: dict[str, Any], known: dict[str, Path]) -> str:
    parts = [_HEAD.format(title=content["title"])]
    for section in content["section"]:
        parts.append(f"## {section['name']}\n")
        parts.append("| upstream | our tests | beyond upstream, or missing |\n|---|---|---|")
        for line in section["line"]:
            named = "<br>".join(f"[{name}](../{known[name]})" for name in line["tests"]) or "none"
            gap = f"**missing:** {line['gap']}" if "gap" in line else ""
            more = "; ".join(filter(None, [line.get("better", ""), gap]))
            parts.append(f"| {line['what']} | {named} | {more} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
