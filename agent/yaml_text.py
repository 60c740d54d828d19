"""YAML from files that an operator writes: bounded, and with every failure of one kind."""

import yaml

# Our files nest a handful of levels. libyaml's Python side recurses on the C stack, so that fifty
# thousand brackets end the process (seen).
DEEPEST = 64
# The same language in C where PyYAML was built with it; ten times as fast.
LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class NotYaml(Exception):
    """The text can't be read; the message has the line and is one line itself."""


def load(text: str) -> object:
    """The first document. Raises NotYaml."""
    try:
        _refuse_depth(text)
        return yaml.load(text, Loader=LOADER)
    # ValueError: for example a date that no calendar has.
    except (yaml.YAMLError, ValueError) as exc:
        raise NotYaml(f"not YAML: {' '.join(str(exc).split())}") from exc


def _refuse_depth(text: str) -> None:
    """Events come without recursion."""
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                line = f"line {event.start_mark.line + 1}" if event.start_mark else "it"
                raise NotYaml(f"not usable: {line} is nested over {DEEPEST} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
