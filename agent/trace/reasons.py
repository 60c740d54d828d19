"""Our own reasons to drop or refuse packets of a pod, and how often each was met.

Every way of capture is a `ReasonSource`. nftables' are the rules that drop or reject, by name, in
each pod; a way that numbers its reasons and counts them for the whole node answers for `NODE`.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from agent.trace.pods import Traced
from redirect import nft
from redirect.base import RedirectError
from redirect.netns import NetnsThread
from redirect.ruleset import FAMILY, TABLE

# No pod's own: 0 is nobody's inode.
NODE = 0


@dataclass(frozen=True)
class Reason:
    # None where the rule's name is all there is.
    number: int | None
    name: str
    count: int


class ReasonSource(Protocol):
    async def counts(self, pods: Sequence[Traced]) -> dict[int, list[Reason]]:
        """Since capture began, by the pod's inode or for NODE; without those of which nothing can
        be read."""


class NftablesReasons:
    """Reads the counters of the pod's rules."""

    def __init__(self, visitor: NetnsThread) -> None:
        self._visitor = visitor

    async def counts(self, pods: Sequence[Traced]) -> dict[int, list[Reason]]:
        found = {pod.inode: await self._read(pod) for pod in pods}
        return {inode: reasons for inode, reasons in found.items() if reasons is not None}

    async def _read(self, pod: Traced) -> list[Reason] | None:
        fd = pod.open()
        if fd is None:
            return None
        try:
            objects = await self._visitor.run(fd, _read, subject=pod.key)
        except RedirectError:
            return None
        finally:
            os.close(fd)
        return list(refusing(objects or ()))


def refusing(objects: Iterable[dict[str, Any]]) -> Iterator[Reason]:
    """The rules of a table, as nft's JSON has them, that end a packet's way."""
    for item in objects:
        rule = item.get("rule")
        if rule is None:
            continue
        parts = {name: value for part in rule["expr"] for name, value in part.items()}
        if ("drop" in parts or "reject" in parts) and isinstance(parts.get("counter"), dict):
            yield Reason(None, rule.get("comment", rule["chain"]), parts["counter"]["packets"])


def growth(before: Iterable[Reason], after: Iterable[Reason]) -> Iterator[Reason]:
    """What was met since. Counters that began anew count from zero."""
    known = {(one.number, one.name): one.count for one in before}
    for one in after:
        was = known.get((one.number, one.name), 0)
        more = one.count - was if one.count >= was else one.count
        if more:
            yield replace(one, count=more)


def _read() -> list[dict[str, Any]] | None:
    return nft.read(FAMILY, TABLE, counters=True)
