"""Gathers what happens to a configuration source into its status."""

import logging
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from agent.xds import wire
from agent.xds.status import TypeStatus, XdsStatus
from agent.xds.types import TYPES
from proto.gen import control_pb2

log = logging.getLogger("underpass.xds")


class Progress:
    """The mutable side of XdsStatus; changed only by the source that owns it."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._connected = False
        self._since = datetime.now(UTC)
        self._error = ""
        self._last_push: datetime | None = None
        self._processed: set[str] = set()
        self._rejected: dict[str, dict[str, str]] = {name: {} for name in TYPES}
        self._messages: dict[str, tuple[int, int]] = {}
        self._terminations: Counter[str] = Counter()

    def snapshot(self, *, note: str = "") -> XdsStatus:
        """`note` is shown where there is no error."""
        types = {
            name: TypeStatus(name in self._processed, dict(rejected))
            for name, rejected in self._rejected.items()
        }
        return XdsStatus(
            source=self._source,
            connected=self._connected,
            since=self._since,
            last_error=self._error or note,
            last_push=self._last_push,
            types=types,
            messages=dict(self._messages),
            terminations=dict(self._terminations),
        )

    def connected(self) -> None:
        self._turn(True)
        self._error = ""

    def failed(self, text: str) -> bool:
        """Whether this is another failure than the one before."""
        news = text != self._error
        self._turn(False)
        self._error = text
        return news

    def received(self, type_url: str, size: int) -> None:
        """A message, taken or refused."""
        # Types that nobody asked for share a row: whoever sends must not make rows.
        name = type_url if type_url in TYPES else "other"
        messages, total = self._messages.get(name, (0, 0))
        self._messages[name] = (messages + 1, total + size)

    def terminated(self, reason: str) -> None:
        """A stream's end: ConnectionError, Error, Reconnect or Complete."""
        self._terminations[reason] += 1

    def troubled(self, text: str) -> None:
        """Something is wrong, though the source goes on."""
        self._error = text

    def restored(self, types: Sequence[control_pb2.TypeState]) -> None:
        """What a data plane holds replaces what was known of the one before."""
        self._processed = {entry.type_url for entry in types if entry.processed}
        self._rejected = {name: {} for name in TYPES}
        for entry in types:
            self._rejected[entry.type_url] = dict(entry.rejected)

    def applied(self, response: bytes, reply: control_pb2.ApplyReply) -> None:
        self._last_push = datetime.now(UTC)
        self._processed.add(reply.type_url)
        rejected = self._rejected.setdefault(reply.type_url, {})
        if rejected:
            # The reply names no accepted resource; this push may have brought good versions of
            # some that were rejected before. Rare, so the names are looked up only then.
            sent, removed = wire.names(response)
            for name in (sent | removed) & rejected.keys():
                del rejected[name]
        for entry in reply.rejected:
            if rejected.get(entry.name) != entry.reason:
                # "name" is taken in log records.
                fields = {"resource": entry.name, "reason": entry.reason}
                log.error("resource rejected", extra=fields)
            rejected[entry.name] = entry.reason

    def _turn(self, connected: bool) -> None:
        if connected != self._connected:
            self._connected = connected
            self._since = datetime.now(UTC)
