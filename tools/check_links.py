"""Checks that relative links, heading anchors and named source paths of Markdown pages hold."""

import re
import sys
from pathlib import Path

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A path of this tree in code style, such as `agent/pods/file.py`.
SOURCE = re.compile(r"`((?:agent|redirect|bpf|dataplane|proto|controlplane|tests|tools)/[^`\s*]+)`")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def main(arguments: list[str]) -> int:
    problems = []
    for page in pages(arguments):
        for target in LINK.findall(page.read_text()):
            if "://" in target or target.startswith("mailto:"):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page.resolve()
            if not file.exists():
                problems.append(f"{page}: {target}: no such file")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                problems.append(f"{page}: {target}: no such heading")
        for source in SOURCE.findall(page.read_text()):
            if not Path(source).exists():
                problems.append(f"{page}: {source}: no such file in the tree")
    print("\n".join(problems) or "links hold")
    return 1 if problems else 0


def pages(arguments: list[str]) -> list[Path]:
    found: list[Path] = []
    for argument in map(Path, arguments):
        found += sorted(argument.rglob("*.md")) if argument.is_dir() else [argument]
    return found


def anchors(file: Path) -> set[str]:
    """The anchors that common Markdown renderers make of headings."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in HEADING.findall(file.read_text())
    }


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
