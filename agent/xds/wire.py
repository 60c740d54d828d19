"""Reads the outermost fields of a delta response without decoding its resources.

The data plane decodes responses, once. The agent needs a nonce when that failed, and sometimes
names; a scan over field headers finds both, even where a resource inside is broken.
"""

from collections.abc import Iterator
from dataclasses import dataclass

# Field numbers of DeltaDiscoveryResponse and Resource (facts ztunnel 6.5).
_RESOURCES, _TYPE_URL, _NONCE, _REMOVED = 2, 4, 5, 6
_RESOURCE_NAME = 3


class MalformedError(ValueError):
    """Not a protobuf message, or cut short."""


@dataclass(frozen=True)
class Header:
    """What an answer to a response needs; empty where the message broke off before it."""

    type_url: str
    nonce: str


def header(response: bytes) -> Header:
    """Type and nonce as far as they can be read. Never raises."""
    type_url = nonce = ""
    try:
        for number, value in _fields(memoryview(response)):
            if number == _TYPE_URL:
                type_url = bytes(value).decode(errors="replace")
            elif number == _NONCE:
                nonce = bytes(value).decode(errors="replace")
    except MalformedError:
        pass
    return Header(type_url, nonce)


def names(response: bytes) -> tuple[set[str], set[str]]:
    """Names of the resources sent and of those removed. Raises MalformedError."""
    sent: set[str] = set()
    removed: set[str] = set()
    for number, value in _fields(memoryview(response)):
        if number == _RESOURCES:
            for inner, name in _fields(value):
                if inner == _RESOURCE_NAME:
                    sent.add(bytes(name).decode(errors="replace"))
        elif number == _REMOVED:
            removed.add(bytes(value).decode(errors="replace"))
    return sent, removed


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Length-delimited fields only; other wire types are stepped over."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        match tag & 7:
            case 0:
                _, at = _varint(message, at)
            case 1:
                at += 8
            case 2:
                size, at = _varint(message, at)
                if at + size > len(message):
                    raise MalformedError("a field is longer than the message")
                yield tag >> 3, message[at : at + size]
                at += size
            case 5:
                at += 4
            case other:
                raise MalformedError(f"wire type {other}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise MalformedError("a number is cut short")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
