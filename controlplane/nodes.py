"""Who is connected, and the check that a caller is the node it says it is."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from controlplane.tokens import NodeToken, TokenError, TokenKey


class UnauthenticatedError(Exception):
    """The caller showed no usable token; the text is for its log."""


def authenticate(metadata: Iterable[tuple[str, str | bytes]] | None, key: TokenKey) -> NodeToken:
    """The token of a call's `authorization: Bearer …`. Raises UnauthenticatedError."""
    for name, value in metadata or ():
        if name.lower() != "authorization":
            continue
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        scheme, _, token = text.partition(" ")
        if scheme.lower() != "bearer":
            raise UnauthenticatedError("authorization must be `Bearer` and a node token")
        try:
            return key.verify(token)
        except TokenError as error:
            raise UnauthenticatedError(str(error)) from error
    raise UnauthenticatedError(
        "no node token: make one with `underpass controlplane token --node NODE` and give it to "
        "the agent"
    )


@dataclass
class Connected:
    """One stream of a node, as status shows it."""

    node: str
    peer: str
    since: float = field(default_factory=time.time)
    pushes: int = 0
    resources: int = 0
    acks: int = 0
    nacks: int = 0
    last_nack: str = ""


class Nodes:
    """The open streams. Changed by the streams themselves, each only its own entry."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self._open: dict[int, Connected] = {}
        self._changed = changed

    def opened(self, node: str, peer: str) -> Connected:
        entry = Connected(node, peer)
        self._open[id(entry)] = entry
        self._changed()
        return entry

    def closed(self, entry: Connected) -> None:
        self._open.pop(id(entry), None)
        self._changed()

    def touched(self) -> None:
        self._changed()

    def list(self) -> list[Connected]:
        return sorted(self._open.values(), key=lambda entry: (entry.node, entry.since))
