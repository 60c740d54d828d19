"""Texts cut into YAML documents, so that a change re-reads only the documents it touches."""

import re
from dataclasses import dataclass

import yaml

from controlplane.sources.fields import Field, FieldError

# libyaml's scanner reads ten thousand pods in seconds, the Python one in a minute.
_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# libyaml's composer recurses without a limit of its own: a deep document ends the process.
_MAX_DEPTH = 200
_DEEP_BLOCK = re.compile(r"^[ \t?-]{1000,}", re.MULTILINE)
_BRACKET = re.compile(r"[\[\]{}]")


@dataclass(frozen=True)
class Chunk:
    """The text of some whole documents; `line` is where it starts in the file, from 0."""

    line: int
    text: str


def split(text: str) -> list[Chunk]:
    """Cuts at `---` lines. With YAML directives, which belong to what follows, nothing is cut."""
    lines = text.splitlines(keepends=True)
    if any(line.startswith("%") for line in lines):
        return [Chunk(0, text)]
    chunks: list[Chunk] = []
    start = 0
    for number, line in enumerate(lines):
        if line.startswith("---") and line[3:4] in ("", " ", "\t", "\n", "\r"):
            chunks.append(Chunk(start, "".join(lines[start:number])))
            # A bare separator is nobody's text: a document that moves stays what it was.
            start = number + 1 if line.strip() == "---" else number
    chunks.append(Chunk(start, "".join(lines[start:])))
    return chunks


def compose(text: str) -> list[Field]:
    """The documents of a chunk, Kubernetes lists taken apart. Raises FieldError."""
    _refuse_depth(text)
    try:
        nodes = [node for node in yaml.compose_all(text, Loader=_Loader) if node is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise FieldError(
            mark.line if mark else 0, "document", f"not YAML: {error.problem}"
        ) from error
    except yaml.YAMLError as error:
        raise FieldError(0, "document", f"not YAML: {error}") from error
    found: list[Field] = []
    for node in nodes:
        if node.tag == "tag:yaml.org,2002:null":
            continue
        document = Field(node)
        kind = document.get("kind")
        items = document.get("items")
        if kind is not None and items is not None and kind.text().endswith("List"):
            # Paths start anew: what an operator edits is the item.
            found.extend(Field(item.node) for item in items.items())
        else:
            found.append(document)
    return found


def _refuse_depth(text: str) -> None:
    """Bounds nesting from above: block nesting by what stands before a line's first word."""
    deep = _DEEP_BLOCK.search(text) is not None
    depth = 0
    if text.count("[") + text.count("{") > _MAX_DEPTH:
        for found in _BRACKET.finditer(text):
            depth += 1 if found[0] in "[{" else -1
            deep = deep or depth > _MAX_DEPTH
    if deep:
        raise FieldError(0, "document", "is nested too deeply to be a manifest")
