"""Starting a stream without telling the versions held, where telling them is impossible.

Names and versions of a large mesh exceed what istiod receives in one message. Then everything is
sent again, and what the data plane holds beyond that must go.
"""

from collections.abc import Iterable

from agent.xds import wire
from proto.gen import discovery_pb2


class Resync:
    """Per type, the names held before a stream that starts from nothing."""

    def __init__(self) -> None:
        self._held: dict[str, set[str]] = {}

    def expect(self, type_url: str, held: Iterable[str]) -> None:
        self._held[type_url] = set(held)

    def complete(self, response: bytes) -> bytes:
        """The first response of an expected type with removals of all that it doesn't name.

        istiod answers a wildcard subscription with one response that holds everything (facts
        istio-ambient 6.10). All other responses come back as they are.
        """
        if not self._held:
            return response
        try:
            held = self._held.pop(wire.header(response).type_url, set())
            sent, _ = wire.names(response) if held else (set(), set())
        except wire.MalformedError:
            return response
        stale = sorted(held - sent)
        # Concatenated messages are merged, so one Apply does both.
        return (
            response
            + discovery_pb2.DeltaDiscoveryResponse(removed_resources=stale).SerializeToString()
        )
