"""Brings every pod from what is to what is wanted: one task a pod, one step at a time.

Adding: namespace opened, then the data plane listens, then (once it knows the mesh) redirection,
then proof by reading back. Removing goes the other way. A step that fails leaves nothing behind
and is repeated when its error may pass.
"""

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Protocol

from agent.dataplane import DataplaneError
from agent.errors import AgentError, NetnsMissing, NetnsRefused, PodError
from agent.pods.enrolment import Enrolment, Node, Step
from agent.pods.netns import netns_id
from agent.pods.source import Pod, PodAdded, PodEvent, PodRemoved
from agent.status import PodView
from proto.gen import control_pb2
from redirect.base import CaptureConfig, Redirect, RedirectError, Target

log = logging.getLogger("underpass.pods")

# Steps that run at once; each costs the kernel some milliseconds, and a node may start with 250.
AT_ONCE = 8
# PodsSynced waits this long for pods that can't be added.
SYNC_PATIENCE = 30.0


class PodTarget(Protocol):
    """The data plane, as the one who listens in pods."""

    async def add_pod(
        self,
        pod: control_pb2.Pod,
        settings: control_pb2.PodSettings,
        netns_fd: int,
        *,
        prepare_only: bool = False,
    ) -> None: ...

    async def remove_pod(
        self, uid: str, *, drain: bool, deadline: timedelta | None = None
    ) -> None: ...

    async def keep_pods(self, uids: Iterable[str]) -> None: ...

    async def pods_synced(self) -> None: ...


class CaptureError(PodError):
    """A pod's traffic isn't redirected as it should be."""

    def __init__(self, text: str, *, retryable: bool = True) -> None:
        self.retryable = retryable
        super().__init__(text)

    remedy = "the agent goes on trying; see `nft list ruleset` in the pod's namespace"


class InternalError(AgentError):
    """A defect of the agent, met while it worked on a pod."""

    retryable = True
    remedy = "report it with the agent's log"


class Reconciler:
    """State: `_pods` (by the source and the pods' tasks), `_dataplane` and what goes with it (by
    attach, detach, switch), `_going` (by paused)."""

    def __init__(
        self,
        redirect: Redirect | None,
        *,
        verify_interval: timedelta,
        drain_deadline: timedelta | None = None,
    ) -> None:
        self._redirect = redirect
        self._verify_interval = verify_interval.total_seconds()
        self._drain_deadline = drain_deadline
        self._pods: dict[str, Enrolment] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._dataplane: PodTarget | None = None
        self._generation = 0
        self._synced = False
        self._listed = asyncio.Event()
        self._announcing: asyncio.Task[None] | None = None
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._busy = 0
        self._pauses = 0
        self._going = asyncio.Event()
        self._going.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._settled = asyncio.Event()
        # The present data plane has every pod of the list that can be added.
        self.announced = asyncio.Event()
        self.repairs = 0

    # ---- what is wanted

    async def follow(self, events: AsyncIterator[PodEvent]) -> None:
        """Takes the source's events, for ever. Ends only by cancellation; pods stay as they are."""
        async for event in events:
            if isinstance(event, PodAdded):
                self._want(event.pod.uid, event.pod)
            elif isinstance(event, PodRemoved):
                self._want(event.uid, None)
            else:
                self._listed.set()
                log.info("pods listed", extra={"pods": len(self._pods)})

    def _want(self, uid: str, pod: Pod | None) -> None:
        enrolment = self._pods.get(uid)
        if enrolment is None:
            if pod is None:
                return
            enrolment = self._pods[uid] = Enrolment(pod, pod)
            self._tasks[uid] = asyncio.create_task(self._drive(enrolment), name=f"pod {pod.key}")
        enrolment.wanted = pod
        enrolment.try_again()

    # ---- the data plane comes and goes

    def attach(self, dataplane: PodTarget, *, synced: bool) -> None:
        """Every pod is added (again, which is nothing for one that it has), then KeepPods."""
        self._next_generation(dataplane, synced=synced)
        self._wake_all()

    def switch(self, dataplane: PodTarget) -> None:
        """Like attach, for a successor that has the pods of `prepare` and their listeners."""
        before = self._generation
        self._next_generation(dataplane, synced=True)
        for enrolment in self._pods.values():
            if enrolment.added_to == before:
                enrolment.added_to = self._generation
        self._wake_all()

    def detach(self) -> None:
        """The data plane is gone. Rules stay: captured pods are refused, never let past."""
        self._stop_announcing()
        self._dataplane = None
        self._synced = False

    def dataplane_synced(self) -> None:
        """It knows the mesh: pods may be captured now."""
        self._synced = True
        self._wake_all()

    def listener_lost(self, uid: str) -> None:
        """The data plane stopped listening in a pod: add it again."""
        if (enrolment := self._pods.get(uid)) is not None:
            enrolment.added_to = 0
            enrolment.try_again()

    # ---- replacement of the data plane and changes of the rules, in this order of calls

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """No step runs inside; what the source says meanwhile is done afterwards. May be nested."""
        self._pauses += 1
        self._going.clear()
        try:
            await self._idle.wait()
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._going.set()

    async def prepare(self, successor: PodTarget) -> None:
        """While paused: tells a successor every pod that the present data plane has."""
        held = [entry for entry in self._pods.values() if entry.added_to == self._generation]
        await asyncio.gather(
            *(
                successor.add_pod(
                    _pod(entry.pod), self._settings(), entry.netns_fd, prepare_only=True
                )
                for entry in held
            )
        )

    async def reconfigure(self, config: CaptureConfig) -> None:
        """Changes the rules of all pods. Raises CaptureError naming the pods it failed for."""
        if self._redirect is None:
            return
        async with self.paused():
            self._redirect.reconfigure(config)
            captured = [entry for entry in self._pods.values() if entry.captured]
            for entry in captured:
                entry.stale = True
            failures = await asyncio.gather(*(self._reinstall(entry) for entry in captured))
        texts = [text for text in failures if text]
        if texts:
            raise CaptureError("; ".join(texts))

    async def _reinstall(self, enrolment: Enrolment) -> str:
        assert self._redirect is not None  # only called by reconfigure
        try:
            async with self._turns:
                await self._redirect.install(_target(enrolment))
        except RedirectError as exc:
            enrolment.verify_at = 0.0
            return f"{enrolment.pod.key}: {exc}"
        enrolment.stale = False
        return ""

    # ---- observation

    @property
    def listed(self) -> bool:
        return self._listed.is_set()

    @property
    def settled(self) -> bool:
        """The first list came, and each pod on it was verified or has failed once."""
        if (
            not self._settled.is_set()
            and self.listed
            and all(map(self._decided, self._pods.values()))
        ):
            self._settled.set()
        return self._settled.is_set()

    def views(self) -> list[PodView]:
        return [self._view(entry) for _, entry in sorted(self._pods.items())]

    async def close(self) -> None:
        """Ends the tasks. Pods stay captured and added."""
        self._stop_announcing()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for enrolment in self._pods.values():
            _close(enrolment)

    # ---- one pod's task

    async def _drive(self, enrolment: Enrolment) -> None:
        while True:
            now = _now()
            step = enrolment.next(self._node(), now)
            if step is Step.FORGET:
                if self._pods.get(enrolment.pod.uid) is enrolment:
                    del self._pods[enrolment.pod.uid]
                    del self._tasks[enrolment.pod.uid]
                return
            if step is Step.REST or now < enrolment.retry_at:
                until = enrolment.retry_at if step is not Step.REST else enrolment.verify_at
                await _wait(enrolment.wake, until - now)
                continue
            async with self._turn():
                await self._try(enrolment)

    async def _try(self, enrolment: Enrolment) -> None:
        """One step, decided now: the world may have changed while waiting for the turn."""
        step = enrolment.next(self._node(), _now())
        try:
            await self._do(step, enrolment)
        except AgentError as exc:
            self._failed(step, enrolment, exc)
        except RedirectError as exc:
            self._failed(step, enrolment, CaptureError(str(exc), retryable=exc.retryable))
        except Exception as exc:
            log.exception("pod step failed", extra={"pod": enrolment.pod.key, "step": step.name})
            self._failed(step, enrolment, InternalError(f"{type(exc).__name__}: {exc}"))
        else:
            enrolment.succeeded()

    def _failed(self, step: Step, enrolment: Enrolment, error: AgentError) -> None:
        if str(error) != str(enrolment.error):
            log.warning(
                "pod step failed",
                extra={"pod": enrolment.pod.key, "step": step.value, "error": error},
            )
        if step is Step.OPEN:
            enrolment.tried_in = self._generation
        enrolment.failed(error, _now())

    async def _do(self, step: Step, enrolment: Enrolment) -> None:
        match step:
            case Step.OPEN:
                self._open(enrolment)
            case Step.ADD:
                await self._add(enrolment)
            case Step.CAPTURE:
                await self._capture(enrolment)
            case Step.VERIFY:
                await self._verify(enrolment)
            case Step.UNCAPTURE:
                await self._uncapture(enrolment)
            case Step.REMOVE:
                await self._remove(enrolment)
            case Step.CLOSE:
                _close(enrolment)
            case Step.ADOPT:
                assert enrolment.wanted is not None  # ADOPT is never planned without it
                enrolment.pod = enrolment.wanted
                enrolment.moved = False
            case Step.REST | Step.FORGET:
                pass

    def _open(self, enrolment: Enrolment) -> None:
        pod = enrolment.pod
        fd = pod.netns.open()
        found = netns_id(fd)
        for other in self._pods.values():
            if other is not enrolment and other.netns == found:
                os.close(fd)
                raise NetnsRefused(f"{pod.netns}: already the network namespace of {other.pod.key}")
        enrolment.netns_fd, enrolment.netns = fd, found

    async def _add(self, enrolment: Enrolment) -> None:
        """Rules of an earlier life are brought up to date before the data plane listens: they
        may exempt only a data plane that is no more, and would lead this one back to itself."""
        dataplane, generation = self._present()
        try:
            if self._redirect is not None and enrolment.stale:
                await self._refresh(self._redirect, enrolment)
            await dataplane.add_pod(_pod(enrolment.pod), self._settings(), enrolment.netns_fd)
        finally:
            enrolment.tried_in = generation
        enrolment.added_to = generation
        log.info("pod added", extra=_fields(enrolment))

    async def _refresh(self, redirect: Redirect, enrolment: Enrolment) -> None:
        target = _target(enrolment)
        if not enrolment.captured and not (await redirect.list(target)).rules:
            return
        if await redirect.verify(target):
            await redirect.install(target)
        enrolment.captured = True
        enrolment.stale = False

    async def _capture(self, enrolment: Enrolment) -> None:
        redirect, target = self._capturing(), _target(enrolment)
        await redirect.install(target)
        problems = await redirect.verify(target)
        if problems:
            # Half a capture is worse than none: it looks like one.
            await redirect.remove(target)
            raise CaptureError(f"{target.name}: {'; '.join(problems)}")
        enrolment.captured = True
        self._proven(enrolment)
        log.info("pod captured", extra=_fields(enrolment))

    async def _verify(self, enrolment: Enrolment) -> None:
        redirect, target = self._capturing(), _target(enrolment)
        problems = await redirect.verify(target)
        if problems:
            enrolment.verified = None
            log.warning(
                "pod's rules were changed, repairing",
                extra=_fields(enrolment) | {"found": problems},
            )
            await redirect.install(target)
            if problems := await redirect.verify(target):
                raise CaptureError(f"{target.name}: {'; '.join(problems)}")
            enrolment.repairs += 1
            self.repairs += 1
        self._proven(enrolment)
        self._still_there(enrolment)

    def _proven(self, enrolment: Enrolment) -> None:
        enrolment.stale = False
        enrolment.verified = datetime.now(UTC)
        enrolment.verify_at = _now() + self._verify_interval * random.uniform(0.9, 1.1)

    def _still_there(self, enrolment: Enrolment) -> None:
        """The open descriptor keeps a dead pod's namespace alive, so its path is looked at."""
        netns = enrolment.pod.netns
        found = netns.identity()
        if found == enrolment.netns:
            return
        if found is not None and netns.follow:
            enrolment.moved = True
            return
        raise NetnsMissing(f"{netns}: the pod's network namespace isn't there any more")

    async def _uncapture(self, enrolment: Enrolment) -> None:
        try:
            await self._capturing().remove(_target(enrolment))
        except RedirectError as exc:
            # A namespace that can't be entered any more holds no rules that matter.
            if exc.retryable:
                raise
            log.info("pod's rules went with it", extra=_fields(enrolment) | {"why": exc})
        enrolment.captured = False
        enrolment.verified = None
        enrolment.verify_at = 0.0

    async def _remove(self, enrolment: Enrolment) -> None:
        """A pod that still runs leaves the mesh gently; one that is gone has nobody to wait for."""
        dataplane, _ = self._present()
        alive = not enrolment.moved and enrolment.pod.netns.identity() == enrolment.netns
        await dataplane.remove_pod(
            enrolment.pod.uid, drain=alive, deadline=self._drain_deadline if alive else None
        )
        enrolment.added_to = 0
        log.info("pod removed", extra=_fields(enrolment))

    # ---- helpers

    def _next_generation(self, dataplane: PodTarget, *, synced: bool) -> None:
        self._stop_announcing()
        self.announced.clear()
        self._generation += 1
        self._dataplane = dataplane
        self._synced = synced
        self._announcing = asyncio.create_task(self._announce(dataplane), name="announce pods")

    async def _announce(self, dataplane: PodTarget) -> None:
        """Pods that left while nobody looked end here, and only when the list is complete."""
        await self._listed.wait()
        try:
            await dataplane.keep_pods([uid for uid, entry in self._pods.items() if entry.wanted])
            patience = _now() + SYNC_PATIENCE
            while _now() < patience and not all(
                entry.wanted is None or entry.tried_in == self._generation
                for entry in self._pods.values()
            ):
                await asyncio.sleep(0.02)
            await dataplane.pods_synced()
            self.announced.set()
        except DataplaneError as exc:
            # The connection's end is handled where it is watched; the next attach announces anew.
            log.warning("pods not announced", extra={"error": exc})

    def _stop_announcing(self) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
            self._announcing = None

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        while True:
            await self._going.wait()
            await self._turns.acquire()
            if self._going.is_set():
                break
            # Paused meanwhile; what is done during a pause needs the turns.
            self._turns.release()
        self._busy += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._turns.release()
            self._busy -= 1
            if self._busy == 0:
                self._idle.set()

    def _wake_all(self) -> None:
        for enrolment in self._pods.values():
            enrolment.try_again()

    def _node(self) -> Node:
        generation = self._generation if self._dataplane is not None else 0
        return Node(generation, self._synced, self._redirect is not None)

    def _present(self) -> tuple[PodTarget, int]:
        if self._dataplane is None:
            raise CaptureError("the data plane went away")
        return self._dataplane, self._generation

    def _capturing(self) -> Redirect:
        assert self._redirect is not None  # no step that captures is planned without it
        return self._redirect

    def _settings(self) -> control_pb2.PodSettings:
        none = self._redirect is None
        kind = control_pb2.PodSettings.NONE if none else control_pb2.PodSettings.NFTABLES
        return control_pb2.PodSettings(capture=kind)

    def _decided(self, enrolment: Enrolment) -> bool:
        if enrolment.error is not None or enrolment.verified is not None:
            return True
        return self._redirect is None and enrolment.added_to != 0

    def _view(self, enrolment: Enrolment) -> PodView:
        pod = enrolment.pod
        return PodView(
            uid=pod.uid,
            name=pod.name,
            namespace=pod.namespace,
            service_account=pod.service_account,
            netns=str(pod.netns),
            state=self._state(enrolment),
            captured=enrolment.captured,
            verified=enrolment.verified is not None and enrolment.error is None,
            verified_at=enrolment.verified,
            repairs=enrolment.repairs,
            problem=str(enrolment.error or ""),
            remedy=enrolment.error.remedy if enrolment.error else "",
        )

    def _state(self, enrolment: Enrolment) -> str:
        node = self._node()
        if enrolment.wanted is None:
            return "removing"
        if enrolment.error is not None:
            return "failed"
        if not node.generation:
            return "waiting for data plane"
        if enrolment.added_to != node.generation:
            return "adding"
        if not node.capturing:
            return "not captured"
        if not enrolment.captured and not node.synced:
            return "waiting for control plane"
        return "captured" if enrolment.verified is not None else "capturing"


def _pod(pod: Pod) -> control_pb2.Pod:
    return control_pb2.Pod(
        uid=pod.uid, name=pod.name, namespace=pod.namespace, service_account=pod.service_account
    )


def _target(enrolment: Enrolment) -> Target:
    pod = enrolment.pod
    return Target(uid=pod.uid, name=pod.key, netns_fd=enrolment.netns_fd)


def _fields(enrolment: Enrolment) -> dict[str, object]:
    pod = enrolment.pod
    return {"pod": pod.key, "uid": pod.uid, "netns": str(pod.netns)}


def _close(enrolment: Enrolment) -> None:
    if enrolment.netns_fd >= 0:
        os.close(enrolment.netns_fd)
    enrolment.netns_fd, enrolment.netns = -1, None


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Until the event, which is cleared, or the time; infinite and past times mean the event."""
    try:
        async with asyncio.timeout(seconds if 0 < seconds < float("inf") else None):
            await event.wait()
    except TimeoutError:
        pass
    event.clear()
