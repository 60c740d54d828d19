"""Fields of a YAML document: typed access whose errors name line, field path and remedy."""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias

import yaml

Ip: TypeAlias = IPv4Address | IPv6Address
Cidr: TypeAlias = IPv4Network | IPv6Network

_TAG = "tag:yaml.org,2002:"
# YAML 1.1 reads an unquoted creationTimestamp as a date; Kubernetes means the text.
_TEXT_TAGS = (_TAG + "str", _TAG + "timestamp")
_NULL = _TAG + "null"


class FieldError(Exception):
    """A field that can't be used: `line` counts from 0 within its document."""

    def __init__(self, line: int, path: str, text: str) -> None:
        super().__init__(f"{path}: {text}")
        self.line = line
        self.path = path
        self.text = text


def is_digits(text: str) -> bool:
    """Plain digits: `isdigit` alone takes superscripts too, which `int` doesn't."""
    return text.isascii() and text.isdigit()


class Field:
    """One node of a document and the path that leads to it."""

    __slots__ = ("_children", "node", "path")

    def __init__(self, node: yaml.Node, path: str = "") -> None:
        self.node = node
        self.path = path
        self._children: dict[str, yaml.Node] | None = None

    @property
    def line(self) -> int:
        return int(self.node.start_mark.line)

    def fail(self, text: str) -> FieldError:
        return FieldError(self.line, self.path or "document", text)

    def fail_at(self, path: str, text: str) -> FieldError:
        """For a descendant that isn't there: the line is this field's."""
        return FieldError(self.line, f"{self.path}.{path}" if self.path else path, text)

    def get(self, name: str) -> "Field | None":
        """The child, or None where it is absent or null."""
        node = self._mapping().get(name)
        if node is None or node.tag == _NULL:
            return None
        return Field(node, f"{self.path}.{name}" if self.path else name)

    def require(self, name: str, remedy: str) -> "Field":
        found = self.get(name)
        if found is None:
            raise self.fail_at(name, f"is missing: {remedy}")
        return found

    def at(self, *names: str) -> "Field | None":
        """The descendant along `names`, or None where one of them is absent."""
        field: Field | None = self
        for name in names:
            if field is None:
                return None
            field = field.get(name)
        return field

    def only(self, *names: str) -> None:
        """Raises for a child of another name: where a typo would change who may connect."""
        for name, node in self._mapping().items():
            if name not in names:
                raise FieldError(
                    int(node.start_mark.line),
                    f"{self.path}.{name}" if self.path else name,
                    f"is not a field here: known are {', '.join(names)}",
                )

    def entries(self) -> Iterator[tuple[str, "Field"]]:
        for name, node in self._mapping().items():
            yield name, Field(node, f"{self.path}[{name}]")

    def items(self) -> list["Field"]:
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.fail("must be a list")
        return [Field(node, f"{self.path}[{i}]") for i, node in enumerate(self.node.value)]

    def text(self) -> str:
        if not isinstance(self.node, yaml.ScalarNode) or self.node.tag not in _TEXT_TAGS:
            raise self.fail("must be text: put it in quotes")
        value: str = self.node.value
        return value

    def filled(self) -> str:
        value = self.text()
        if not value.strip():
            raise self.fail("must not be empty")
        return value

    def choice(self, *values: str) -> str:
        value = self.text()
        if value not in values:
            raise self.fail(f"{value!r} is unknown: use one of {', '.join(values)}")
        return value

    def integer(self, low: int, high: int) -> int:
        if isinstance(self.node, yaml.ScalarNode) and self.node.tag == _TAG + "int":
            text: str = self.node.value
            # YAML 1.1 would read 0o17, 1_000 and 12:30 as integers too; Kubernetes doesn't.
            if is_digits(text.removeprefix("-")) and low <= int(text) <= high:
                return int(text)
        raise self.fail(f"must be a whole number from {low} to {high}")

    def port(self) -> int:
        return self.integer(1, 65535)

    def is_integer(self) -> bool:
        return self.node.tag == _TAG + "int"

    def boolean(self) -> bool:
        if isinstance(self.node, yaml.ScalarNode) and self.node.tag == _TAG + "bool":
            return str(self.node.value).lower() in ("true", "yes", "on")
        raise self.fail("must be true or false")

    def texts(self) -> tuple[str, ...]:
        return tuple(item.filled() for item in self.items())

    def labels(self) -> dict[str, str]:
        return {name: value.text() for name, value in self.entries()}

    def address(self) -> Ip:
        try:
            found = ip_address(self.text())
        except ValueError:
            raise self.fail(f"{self.node.value!r} is not an IP address") from None
        if isinstance(found, IPv6Address) and found.scope_id:
            raise self.fail(f"{found} has a zone: give the address without it")
        return found

    def cidr(self) -> Cidr:
        try:
            return ip_network(self.text(), strict=False)
        except ValueError:
            raise self.fail(
                f"{self.node.value!r} is neither an IP address nor a range such as 10.0.0.0/8"
            ) from None

    def _mapping(self) -> dict[str, yaml.Node]:
        if self._children is None:
            self._children = _children(self)
        return self._children


def _children(field: Field) -> dict[str, yaml.Node]:
    node = field.node
    if not isinstance(node, yaml.MappingNode):
        raise field.fail("must be a mapping")
    children: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise FieldError(
                int(key.start_mark.line), field.path or "document", "keys must be text"
            )
        if key.tag == _TAG + "merge":
            raise FieldError(
                int(key.start_mark.line),
                field.path or "document",
                "merge keys (<<) are not Kubernetes YAML: write the fields out",
            )
        if key.value in children:
            path = f"{field.path}.{key.value}" if field.path else str(key.value)
            raise FieldError(int(key.start_mark.line), path, "is given twice: keep one")
        children[key.value] = value
    return children
