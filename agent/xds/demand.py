"""The names that a data plane asked for, where not everything is sent (facts ztunnel 7.6).

Told to every stream anew, since a control plane forgets a stream's subscriptions with it. How many
names there can be is bounded by the data plane, for each pod.
"""

import asyncio
from collections.abc import Iterator
from itertools import islice

# Names of 300 bytes stay far below what istiod receives in one message (requests).
AT_ONCE = 2000


class Wanted:
    """Of one data plane, in the order in which they were asked for. Only ever added to."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._more = asyncio.Event()

    def add(self, name: str) -> None:
        self._names.setdefault(name)
        self._more.set()

    async def after(self, told: int) -> list[str]:
        """At most AT_ONCE of the names beyond the first `told`; waits while there are none."""
        while len(self._names) <= told:
            self._more.clear()
            await self._more.wait()
        return list(islice(self._names, told, told + AT_ONCE))


def batches(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), AT_ONCE):
        yield names[start : start + AT_ONCE]
