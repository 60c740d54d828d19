"""Connections older than their pod's capture: found as a pod is captured, looked at again with ever
longer pauses until none is left, and cut where that is wanted."""

import asyncio
import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TypeVar

from agent.errors import PodError
from agent.namespaces import NamespaceTable
from agent.pods.netns import NetnsId
from agent.pods.precapture_note import Note, Noted, Sockets
from agent.pods.source import Pod
from agent.status import PodView
from redirect import precapture
from redirect.base import CaptureConfig, RedirectError
from redirect.netns import NetnsThread, duplicate
from redirect.sockets import Connection

log = logging.getLogger("underpass.pods")

T = TypeVar("T")

# A look costs some microseconds for each connection that is left.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
# A person who asks gets a look of this age at most.
FRESH = 1.0
# Of one pod; beyond that, which are looked for anew each time until they are fewer.
KNOWN = 20_000
# `pods -o wide` names so many.
NAMED = 5
# Notes of pods that an earlier agent had, and this one never captured.
FORGET_FORMER = 600.0


class CutError(PodError):
    """Older connections can't be ended."""

    remedy = "restart the application, which ends them"


@dataclass(eq=False)
class _Watched:
    """A captured pod. `known` holds what is left, by the kernel's family and id of each socket."""

    pod: Pod
    netns: NetnsId
    # Ours; -1 once nothing is left to look at.
    fd: int
    known: dict[tuple[int, bytes], Connection] = field(default_factory=dict)
    # There were more than KNOWN.
    more: bool = False
    # False until a first look worked.
    seen: bool = False
    error: CutError | None = None
    looked_at: float = 0.0
    pause: float = FIRST_PAUSE
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class Precapture:
    """State: `_pods` by uid (by enrolled, forget, looks), `_former` (notes of an earlier agent)."""

    def __init__(
        self,
        config: CaptureConfig | None = None,
        note: Note | None = None,
        *,
        cut_all: bool = False,
        namespaces: NamespaceTable | None = None,
    ) -> None:
        """`cut_all`: of every pod as it is captured, unless its namespace says otherwise."""
        self._config = config or CaptureConfig()
        self._note = note or Note()
        self._cut_all = cut_all
        self._namespaces: NamespaceTable = namespaces or {}
        self._threads = NetnsThread()
        self._pods: dict[str, _Watched] = {}
        self._former: dict[str, Noted] = self._note.load()
        self._woken = asyncio.Event()
        # Connections cut since the agent started.
        self.cuts = 0

    def reconfigure(self, config: CaptureConfig) -> None:
        self._config = config

    # ---- pods come and go

    async def enrolled(self, pod: Pod, netns: NetnsId, netns_fd: int, *, anew: bool) -> None:
        """The pod is captured from now on; `anew`: it wasn't a moment ago. Never raises: a pod that
        can't be looked at is looked at again later, and counts as unknown until then."""
        entry = self._pods.get(pod.uid)
        if entry is not None and entry.netns == netns and not anew:
            return
        if entry is None or entry.netns != netns:
            self._drop(pod.uid)
            entry = self._pods[pod.uid] = _Watched(pod, netns, duplicate(netns_fd))
        elif entry.fd < 0:
            entry.fd = duplicate(netns_fd)
        former = self._former.get(pod.uid)
        also = former.sockets if former is not None and former.netns == netns else ()
        entry.seen = False
        entry.pause = FIRST_PAUSE
        await self._look(entry, also=also)
        if entry.seen:
            self._former.pop(pod.uid, None)
        if entry.known and self._cuts(pod):
            try:
                await self._cut(entry)
            except CutError as exc:
                entry.error = exc
                fields = {"pod": pod.key, "error": exc, "remedy": exc.remedy}
                log.error("older connections not cut", extra=fields)
        self._woken.set()

    def forget(self, uid: str) -> None:
        """It isn't captured any more."""
        self._former.pop(uid, None)
        if self._drop(uid):
            self._write()

    def _drop(self, uid: str) -> bool:
        entry = self._pods.pop(uid, None)
        if entry is not None:
            entry.close()
        return entry is not None and bool(entry.known)

    def _cuts(self, pod: Pod) -> bool:
        rules = self._namespaces.get(pod.namespace)
        own = None if rules is None else rules.cut_precapture
        return self._cut_all if own is None else own

    # ---- what is left

    async def run(self) -> None:
        """Ends only by cancellation."""
        forget = _now() + FORGET_FORMER
        while True:
            self._woken.clear()
            now = _now()
            if now >= forget:
                self._former.clear()
            waiting = [entry for entry in self._pods.values() if entry.fd >= 0]
            for entry in waiting:
                if now >= entry.looked_at + entry.pause:
                    entry.pause = min(entry.pause * 2, LONGEST_PAUSE)
                    await self._look(entry)
            until = min((e.looked_at + e.pause for e in waiting if e.fd >= 0), default=None)
            try:
                async with asyncio.timeout(None if until is None else max(until - _now(), 0.05)):
                    await self._woken.wait()
            except TimeoutError:
                continue

    async def refresh(self) -> None:
        """For somebody who asks now."""
        for entry in list(self._pods.values()):
            if entry.fd >= 0 and _now() >= entry.looked_at + FRESH:
                await self._look(entry)

    def seen(self, view: PodView) -> PodView:
        """With what is known of its older connections."""
        entry = self._pods.get(view.uid)
        if entry is None or not entry.seen or not view.captured:
            return view
        named = [str(one) for _, one in zip(range(NAMED), entry.known.values(), strict=False)]
        if entry.error is not None and entry.known and not view.problem:
            view = replace(view, problem=str(entry.error), remedy=entry.error.remedy)
        return replace(
            view,
            precapture_connections=len(entry.known),
            precapture_named=tuple(named),
            enforced=view.verified and not entry.known,
        )

    def listed(self) -> list[tuple[Pod, list[Connection]]]:
        return [(e.pod, list(e.known.values())) for e in self._pods.values() if e.known]

    @property
    def count(self) -> int:
        return sum(len(entry.known) for entry in self._pods.values())

    # ---- cutting

    async def cut(self, uids: Collection[str] | None = None) -> int:
        """Of these pods, or of all; how many were ended. Raises CutError."""
        await self.refresh()
        count = 0
        for uid, entry in list(self._pods.items()):
            if entry.known and (uids is None or uid in uids):
                count += await self._cut(entry)
        return count

    async def _cut(self, entry: _Watched) -> int:
        doomed = list(entry.known.values())
        try:
            async with entry.turn:
                count = await self._inside(entry, lambda: precapture.cut(doomed))
        except RedirectError as exc:
            raise CutError(f"{entry.pod.key}: {exc}") from exc
        self.cuts += count
        entry.error = None
        log.info("older connections cut", extra={"pod": entry.pod.key, "connections": count})
        await self._look(entry)
        return count

    # ---- looks

    async def _look(self, entry: _Watched, *, also: Sockets = ()) -> None:
        """At those that are known; for others too at first, and while there are too many."""
        config, anew = self._config, not entry.seen or entry.more
        async with entry.turn:
            known = [*entry.known, *also]

            def look() -> list[Connection]:
                found = precapture.confirmed(config) if anew else []
                return [*precapture.alive(known), *found]

            entry.looked_at = _now()
            try:
                found = await self._inside(entry, look)
            except RedirectError as exc:
                fields = {"pod": entry.pod.key, "error": exc}
                log.warning("older connections not looked at", extra=fields)
                return
            entry.looked_at = _now()
            self._take(entry, found)

    def _take(self, entry: _Watched, found: list[Connection]) -> None:
        if self._pods.get(entry.pod.uid) is not entry:
            # It left meanwhile.
            return
        before, first = set(entry.known), not entry.seen
        left = {(one.family, one.id): one for one in found}
        entry.more = len(left) > KNOWN
        entry.known = dict(list(left.items())[:KNOWN]) if entry.more else left
        entry.seen = True
        fields = {"pod": entry.pod.key, "connections": len(left)}
        if first and set(entry.known) - before:
            log.info("connections are older than the pod's capture", extra=fields)
        elif before and not entry.known:
            log.info("no connection is older than the pod's capture any more", extra=fields)
        if not entry.known:
            entry.error = None
            entry.close()
        # What ended since is harmless in a note: no other socket gets its id.
        if (first and entry.known) or bool(before) != bool(entry.known):
            self._write()

    async def _inside(self, entry: _Watched, job: Callable[[], T]) -> T:
        return await self._threads.run(entry.fd, job, subject=entry.pod.key)

    def _write(self) -> None:
        mine = {
            uid: Noted(entry.netns, tuple(entry.known))
            for uid, entry in self._pods.items()
            if entry.known
        }
        self._note.write(self._former | mine)

    async def close(self) -> None:
        """Notes stay, for the next agent."""
        for entry in self._pods.values():
            entry.close()
        await self._threads.close()


def _now() -> float:
    return asyncio.get_running_loop().time()
