"""Reads one mapping of a YAML document field by field; what is left over is a mistake."""

from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, TypeVar

from agent.errors import AgentError

_T = TypeVar("_T")
_MISSING = object()


class LocalFileError(AgentError):
    """The file doesn't say what it should; the text names file and field."""

    retryable = True
    remedy = "correct the file; it is read again by itself"


class Fields:
    """A mapping at `path`. Every read takes its key away; `end` complains about the rest."""

    def __init__(self, raw: object, path: str) -> None:
        if not isinstance(raw, Mapping):
            raise LocalFileError(f"{path}: a mapping is expected, not {_kind(raw)}")
        self.path = path
        self._left: dict[Any, object] = dict(raw)
        self._known: list[str] = []

    def end(self) -> None:
        if self._left:
            unknown = ", ".join(str(key) for key in self._left)
            known = ", ".join(sorted(self._known))
            raise LocalFileError(f"{self.path}: unknown key {unknown}; known are {known}")

    def has(self, key: str) -> bool:
        self._known.append(key)
        return self._left.get(key) is not None

    def text(self, key: str, default: str | None = "") -> str:
        """With `default=None` the key must be there."""
        value = self._take(key)
        if value is _MISSING or value is None:
            if default is None:
                raise LocalFileError(f"{self.path}.{key}: is missing")
            return default
        if not isinstance(value, str):
            raise LocalFileError(f"{self.path}.{key}: text is expected, not {_kind(value)}")
        return value

    def flag(self, key: str) -> bool:
        value = self._take(key)
        if value is _MISSING or value is None:
            return False
        if not isinstance(value, bool):
            raise LocalFileError(f"{self.path}.{key}: true or false is expected")
        return value

    def number(self, key: str, default: int, highest: int) -> int:
        value = self._take(key)
        if value is _MISSING or value is None:
            return default
        return whole(value, f"{self.path}.{key}", highest)

    def choice(self, key: str, choices: Mapping[str, _T], default: _T) -> _T:
        """One of the words, in any case."""
        value = self._take(key)
        if value is _MISSING or value is None:
            return default
        return one_of(value, choices, f"{self.path}.{key}")

    def items(self, key: str) -> Iterator[tuple[object, str]]:
        """Elements of a list with their paths."""
        value = self._take(key)
        if value is _MISSING or value is None:
            return
        if not isinstance(value, list):
            raise LocalFileError(f"{self.path}.{key}: a list is expected, not {_kind(value)}")
        for index, item in enumerate(value):
            yield item, f"{self.path}.{key}[{index}]"

    def texts(self, key: str) -> list[str]:
        found = []
        for item, path in self.items(key):
            if not isinstance(item, str):
                raise LocalFileError(f"{path}: text is expected, not {_kind(item)}")
            found.append(item)
        return found

    def entries(self, key: str) -> Iterator[tuple[str, object, str]]:
        """Keys and values of a mapping with their paths."""
        value = self._take(key)
        if value is _MISSING or value is None:
            return
        path = f"{self.path}.{key}"
        if not isinstance(value, Mapping):
            raise LocalFileError(f"{path}: a mapping is expected, not {_kind(value)}")
        for name, item in value.items():
            yield str(name), item, f"{path}.{name}"

    def inner(self, key: str) -> "Fields":
        return Fields(self._take(key), f"{self.path}.{key}")

    def _take(self, key: str) -> object:
        self._known.append(key)
        return self._left.pop(key, _MISSING)


def one_of(value: object, choices: Mapping[str, _T], path: str) -> _T:
    for word, meaning in choices.items():
        if isinstance(value, str) and value.lower() == word.lower():
            return meaning
    raise LocalFileError(f"{path}: {value!r} is none of {', '.join(choices)}")


def whole(value: object, path: str, highest: int) -> int:
    """A number, also as text (keys of a JSON dump are). Raises LocalFileError."""
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal() or int(text) > highest:
        raise LocalFileError(f"{path}: a number from 0 to {highest} is expected, not {value!r}")
    return int(text)


def address(text: object, path: str) -> IPv4Address | IPv6Address:
    try:
        return ip_address(str(text))
    except ValueError as error:
        raise LocalFileError(f"{path}: {text!r} is no IP address") from error


def network(text: object, path: str) -> tuple[bytes, int]:
    """Address bytes and prefix length; an address alone is a network of itself."""
    try:
        found = ip_network(str(text), strict=False)
    except ValueError as error:
        raise LocalFileError(f"{path}: {text!r} is no network, for example 10.0.0.0/8") from error
    return found.network_address.packed, found.prefixlen


def _kind(value: object) -> str:
    if value is _MISSING or value is None:
        return "nothing"
    return {str: "text", list: "a list", dict: "a mapping", bool: "true or false"}.get(
        type(value), f"{value!r}"
    )
