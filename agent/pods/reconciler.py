"""Brings every pod from what is to what is wanted: one task a pod, one step at a time.

Adding: namespace opened, then the data plane listens, then (once it knows the mesh) redirection,
then proof by reading back. Removing goes the other way; between, what a living pod has open may
end by itself. A step that fails leaves nothing behind and is repeated when its error may pass.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import timedelta

from agent.dataplane import DataplaneError, DataplaneLost, InUse
from agent.errors import AgentError
from agent.namespaces import NamespaceTable
from agent.pods.captures import Captures
from agent.pods.dns import DnsRules
from agent.pods.enrolment import Enrolment, Node, Step
from agent.pods.kept import kept_pod
from agent.pods.ledger import Held, Ledger
from agent.pods.precapture import Precapture
from agent.pods.proof import NOT_PROVED
from agent.pods.proofs import PATIENCE, REMEDY, Announced, Means, Prover
from agent.pods.source import Outcome, Pod, PodAdded, PodEvent, PodKept, PodRemoved
from agent.pods.steps import CaptureError, PodTarget, Steps
from agent.pods.turns import Turns
from agent.status import PodView
from redirect.base import CaptureConfig, Datagrams, Redirect, RedirectError

__all__ = ["CaptureError", "PodTarget", "Reconciler"]

log = logging.getLogger("underpass.pods")

# A pod whose sandbox was made anew is bare until this is noticed. A stat costs microseconds.
NAMESPACES_INTERVAL = 1.0
# PodsSynced waits this long for pods that can't be added.
SYNC_PATIENCE = 30.0
ANNOUNCE_AGAIN = 1.0
# How often ports that somebody else holds are tried, and for how many pods in that time: a failed
# try costs about a millisecond, and a node may have 250 pods.
PORTS_INTERVAL = 0.1
PORTS_AT_ONCE = 10


class InternalError(AgentError):
    """A defect of the agent, met while it worked on a pod."""

    retryable = True
    remedy = "report it with the agent's log"


class Reconciler:
    """State: `_pods` (by the source and the pods' tasks), and `_dataplane` with what goes with it
    (by attach, detach, switch)."""

    def __init__(
        self,
        redirect: Redirect | None,
        *,
        verify_interval: timedelta,
        drain_deadline: timedelta | None = None,
        ledger: Ledger | None = None,
        namespaces: NamespaceTable | None = None,
        external: bool = False,
        ports: Collection[int] = (),
        dns: DnsRules | None = None,
        precapture: Precapture | None = None,
        proofs: Means | None = None,
        others: Sequence[Redirect] = (),
        missing: Mapping[str, str] | None = None,
    ) -> None:
        """`others`: ways beside `redirect` that pods may ask for or come from; `missing`: why they
        can't, by the name of the way. `external`: somebody else redirects traffic to the data
        plane's listeners, which have these `ports` in each pod."""
        self._ledger = ledger or Ledger()
        self.precapture = precapture or Precapture()
        self._turns = Turns()
        self.prover = Prover(proofs, self._turns, self._announced_to)
        self._steps = Steps(
            Captures(redirect, tuple(others), missing or {}),
            verify_interval=verify_interval,
            drain_deadline=drain_deadline,
            ledger=self._ledger,
            namespaces=namespaces,
            external=external,
            ports=ports,
            dns=dns,
            precapture=self.precapture,
            prover=self.prover,
        )
        self._pods: dict[str, Enrolment] = {}
        # Pods of the data plane that exist, but whose namespaces nobody here has.
        self._kept: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._dataplane: PodTarget | None = None
        # Counts data planes, so that a pod can tell whether it was added to the present one.
        self._generation = 0
        self._synced = False
        self._listed = asyncio.Event()
        # Loop time from which failing proofs keep the node from being ready no longer.
        self._proofs_until: float | None = None
        # Set for good: a data plane knew the mesh once.
        self._mesh_known = asyncio.Event()
        self._settled = False
        self._announcing: asyncio.Task[None] | None = None
        # The present data plane has every pod of the list that can be added.
        self.announced = asyncio.Event()

    # ---- what is wanted

    async def follow(self, events: AsyncIterator[PodEvent], *, once_synced: bool = False) -> None:
        """Takes the source's events, for ever. Ends only by cancellation; pods stay as they are."""
        former = self._ledger.load()
        if once_synced:
            await self._mesh_known.wait()
        async for event in events:
            if isinstance(event, PodAdded):
                self._want(event.pod.uid, event.pod, event.outcome)
            elif isinstance(event, PodRemoved):
                await self._let_go(event.uid)
                self._want(event.uid, None, event.outcome)
            elif isinstance(event, PodKept):
                await self._keep(event.uid)
            else:
                log.info("pods listed", extra={"pods": len(self._pods)})
                self._see_off(former)
                former = []
                self._listed.set()

    async def watch_namespaces(self) -> None:
        """Looks at once at a captured pod whose path names another namespace now. Ends only by
        cancellation."""
        while True:
            await asyncio.sleep(NAMESPACES_INTERVAL)
            for entry in self._pods.values():
                if not entry.captured and not entry.drained_by:
                    continue
                if entry.pod.netns.identity() == entry.netns:
                    continue
                if entry.drained_by:
                    entry.drained_by = _now()
                    entry.wake.set()
                elif entry.error is None:
                    entry.verify_at = 0.0
                    entry.wake.set()

    def _want(self, uid: str, pod: Pod | None, outcome: Outcome | None = None) -> None:
        enrolment = self._pods.get(uid)
        if enrolment is None:
            if pod is None:
                if outcome is not None:
                    outcome.set_result(None)
                return
            enrolment = self._pods[uid] = Enrolment(pod, pod)
            self._tasks[uid] = asyncio.create_task(self._drive(enrolment), name=f"pod {pod.key}")
            self._kept.discard(uid)
        # Whoever asked before has stopped waiting: one event of a source is open at a time.
        enrolment.wanted, enrolment.outcome = pod, outcome
        enrolment.try_again()

    async def _keep(self, uid: str) -> None:
        """As a pod of the list where its namespace is found, else as the data plane has it."""
        self._kept.add(uid)
        dataplane = self._dataplane
        pod = await kept_pod(uid, dataplane) if dataplane is not None else None
        if pod is not None and uid not in self._pods:
            self._want(uid, pod)

    async def _let_go(self, uid: str) -> None:
        """A pod that only the data plane had."""
        if uid in self._kept:
            self._kept.discard(uid)
            if self._dataplane is not None:
                with contextlib.suppress(DataplaneError):
                    await self._dataplane.remove_pod(uid, drain=False)

    def _see_off(self, former: list[Held]) -> None:
        """Pods that left while no agent looked: rules would hold them for a proxy that is gone."""
        listed = {entry.pod.netns.identity() for entry in self._pods.values()}
        for held in former:
            uid = held.pod.uid
            fd = held.open() if self._steps.captures and held.netns not in listed else None
            if fd is None:
                # Gone, or a pod of the list has the namespace and brings the rules up to date.
                if uid not in self._pods:
                    self._ledger.discard(uid)
                continue
            # Its uid may be listed with another namespace.
            pod = held.pod if uid not in self._pods else replace(held.pod, uid=f"{uid} (former)")
            left = Enrolment(pod, None, netns_fd=fd, netns=held.netns, former_ways=held.ways)
            if held.drains_until is None:
                left.captured = True
            else:
                # A data plane may have its connections still; who else looks here, may have it.
                left.released = True
                left.drained_by = _now() + self._steps.still_drains(held.drains_until)
            self._pods[pod.uid] = left
            self._tasks[pod.uid] = asyncio.create_task(self._drive(left), name=f"pod {pod.key}")
            log.info("pod left while no agent ran", extra={"pod": pod.key, "uid": pod.uid})

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
                enrolment.added_to = enrolment.tried_in = self._generation
            self._prove_anew(enrolment)
        self._wake_all()

    def detach(self) -> None:
        """The data plane is gone. Rules stay: captured pods are refused, never let past."""
        self._stop_announcing()
        self._dataplane = None
        self._synced = False
        for enrolment in self._pods.values():
            enrolment.drained()
            self._prove_anew(enrolment)
        if self._kept:
            # They went with it, and can't be added without a namespace.
            log.warning("pods lost with their data plane", extra={"uids": sorted(self._kept)})
            self._kept.clear()

    def dataplane_synced(self) -> None:
        """It knows the mesh: pods may be captured now."""
        self._synced = True
        self._mesh_known.set()
        self._wake_all()

    def pod_drained(self, uid: str) -> None:
        """The data plane has no connection of it any more."""
        if (enrolment := self._pods.get(uid)) is not None:
            enrolment.drained()

    def listener_lost(self, uid: str) -> None:
        """Somebody ended a listener in a pod. Adding it again tells whether all listen."""
        if (enrolment := self._pods.get(uid)) is not None:
            enrolment.repairs += 1
            enrolment.doubted = True
            enrolment.try_again()

    # ---- replacement of the data plane, and changes of all rules

    def paused(self) -> AbstractAsyncContextManager[None]:
        """No step runs inside; what the source says meanwhile is done afterwards. May be nested."""
        return self._turns.paused()

    async def prepare(self, successor: PodTarget) -> None:
        """While paused: tells a successor every pod that the present data plane has."""
        held = [entry for entry in self._pods.values() if entry.added_to == self._generation]
        await asyncio.gather(*(self._steps.prepare(entry, successor) for entry in held))

    async def reconfigure(self, config: CaptureConfig) -> None:
        """Changes the rules of all pods. Raises CaptureError naming the pods it failed for."""
        async with self.paused():
            self._steps.reconfigure(config)
            captured = [entry for entry in self._pods.values() if entry.captured]
            for entry in captured:
                entry.stale = True
            failures = await asyncio.gather(*(self._reinstall(entry) for entry in captured))
        self._wake_all()
        texts = [text for text in failures if text]
        if texts:
            raise CaptureError("; ".join(texts))

    async def _reinstall(self, enrolment: Enrolment) -> str:
        try:
            async with self._turns.limited():
                await self._steps.reinstall(enrolment)
        except RedirectError as exc:
            return f"{enrolment.pod.key}: {exc}"
        return ""

    # ---- observation

    @property
    def repairs(self) -> int:
        """How often somebody's changes of rules were undone."""
        return self._steps.repairs

    @property
    def datagrams(self) -> Datagrams:
        """UDP that the mesh didn't carry, of all pods since the agent started."""
        return self._steps.datagrams

    @property
    def settled(self) -> bool:
        """The first list came, and each pod on it was verified or has failed once."""
        if not self._settled and self._listed.is_set():
            self._settled = all(map(self._decided, self._pods.values()))
        return self._settled

    def views(self) -> list[PodView]:
        node = self._node()
        found = (view(entry, node) for _, entry in sorted(self._pods.items()))
        return [self.precapture.seen(one) for one in found]

    def captured_namespaces(self) -> list[tuple[Pod, int]]:
        """Descriptors stay the reconciler's; good until it is awaited on."""
        return [(e.pod, e.netns_fd) for e in self._pods.values() if e.captured and e.netns_fd >= 0]

    async def close(self) -> None:
        """Ends the tasks. Pods stay captured and added."""
        self._stop_announcing()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for enrolment in self._pods.values():
            self._steps.close(enrolment)
        await self.prover.close()
        await self._steps.end()
        await self.precapture.close()

    # ---- one pod's task

    async def _drive(self, enrolment: Enrolment) -> None:
        while True:
            now = _now()
            step = enrolment.next(self._node(), now)
            if step is Step.FORGET:
                del self._pods[enrolment.pod.uid]
                del self._tasks[enrolment.pod.uid]
                enrolment.answer(None)
                return
            if step is Step.REST or now < enrolment.retry_at:
                self._tell_outcome(step, enrolment)
                until = enrolment.retry_at if step is not Step.REST else enrolment.rests_until
                await _wait(enrolment.wake, until - now)
                continue
            async with self._turns.turn():
                await self._try(enrolment)

    def _tell_outcome(self, step: Step, enrolment: Enrolment) -> None:
        """Nothing is told while it is neither done nor failed: without a data plane."""
        if step is not Step.REST:
            enrolment.answer(enrolment.error)
        elif enrolment.added_to and enrolment.added_to == self._node().generation:
            enrolment.answer(None)

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
            freed = step is Step.ADD and isinstance(enrolment.error, InUse)
            enrolment.succeeded()
            if freed:
                # Who held its ports has let go of the others' too.
                for other in self._waiting_for_ports():
                    other.try_again()

    def _proofs_overdue(self) -> bool:
        """One pod that can't be proved mustn't keep a restarted node out for ever."""
        if self._proofs_until is None:
            self._proofs_until = _now() + PATIENCE
        return _now() >= self._proofs_until

    def _waiting_for_ports(self) -> list[Enrolment]:
        return [entry for entry in self._pods.values() if isinstance(entry.error, InUse)]

    def _failed(self, step: Step, enrolment: Enrolment, error: AgentError) -> None:
        if str(error) != str(enrolment.error):
            fields = {"pod": enrolment.pod.key, "step": step.value, "error": error}
            log.warning("pod step failed", extra=fields)
        if step is Step.OPEN:
            enrolment.tried_in = self._generation
        enrolment.failed(error, _now())
        if isinstance(error, InUse):
            # A proxy that ends frees its ports at any moment, and nobody serves until we notice:
            # a tenth of a second, for the node as a whole when many pods wait (facts ztunnel 10).
            pause = PORTS_INTERVAL * max(1.0, len(self._waiting_for_ports()) / PORTS_AT_ONCE)
            enrolment.retry_at = _now() + pause * random.uniform(0.9, 1.1)

    async def _do(self, step: Step, enrolment: Enrolment) -> None:
        steps = self._steps
        match step:
            case Step.OPEN:
                steps.open(enrolment, self._pods.values())
            case Step.ADD:
                await self._add(enrolment)
            case Step.CAPTURE:
                await steps.capture(enrolment, self._serving())
            case Step.MOVE:
                await steps.move(enrolment, self._serving())
            case Step.VERIFY:
                present = enrolment.added_to == self._generation
                await steps.verify(enrolment, self._dataplane if present else None)
            case Step.CHANGE:
                present = enrolment.added_to == self._generation
                await steps.change(enrolment, self._dataplane if present else None)
            case Step.RELEASE:
                await steps.release(enrolment)
            case Step.UNCAPTURE:
                late = enrolment.drained_by != 0.0
                await steps.uncapture(enrolment, self._dataplane if late else None)
            case Step.REMOVE:
                await steps.remove(enrolment, self._serving())
            case Step.CLOSE:
                steps.close(enrolment)
            case Step.ADOPT:
                assert enrolment.wanted is not None  # ADOPT is never planned without it
                enrolment.pod = enrolment.wanted
                enrolment.moved = False
            case Step.REST | Step.FORGET:
                pass

    async def _add(self, enrolment: Enrolment) -> None:
        dataplane, generation = self._dataplane, self._generation
        assert dataplane is not None  # ADD is never planned without it
        # Before: another listener may be lost meanwhile.
        enrolment.doubted = False
        try:
            await self._steps.add(enrolment, dataplane)
        except BaseException:
            enrolment.doubted = True
            raise
        finally:
            enrolment.tried_in = generation
        enrolment.added_to = generation
        if enrolment.captured and enrolment.proof is None:
            enrolment.verify_at = 0.0

    # ---- helpers

    def _serving(self) -> PodTarget:
        # For steps that are planned only for a pod of the present generation.
        assert self._dataplane is not None
        return self._dataplane

    def _next_generation(self, dataplane: PodTarget, *, synced: bool) -> None:
        self._stop_announcing()
        self.announced.clear()
        self._generation += 1
        self._dataplane = dataplane
        self._synced = synced
        if synced:
            self._mesh_known.set()
        self._announcing = asyncio.create_task(self._announce(dataplane), name="announce pods")

    async def _announce(self, dataplane: PodTarget) -> None:
        """Pods that left while nobody looked end here, and only when the list is complete."""
        await self._listed.wait()
        while not self.announced.is_set():
            try:
                await self._tell_list(dataplane)
                self.announced.set()
            except DataplaneLost:
                # Met where the connection is watched; the next attach announces anew.
                return
            except DataplaneError as exc:
                log.warning("pods not announced", extra={"error": exc})
                await asyncio.sleep(ANNOUNCE_AGAIN)

    async def _tell_list(self, dataplane: PodTarget) -> None:
        wanted = {uid for uid, entry in self._pods.items() if entry.wanted}
        await dataplane.keep_pods(sorted(wanted | self._kept))
        patience = _now() + SYNC_PATIENCE
        while _now() < patience and not all(
            entry.wanted is None or entry.tried_in == self._generation
            for entry in self._pods.values()
        ):
            await asyncio.sleep(0.02)
        await dataplane.pods_synced()

    def _stop_announcing(self) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
            self._announcing = None

    def _wake_all(self) -> None:
        for enrolment in self._pods.values():
            enrolment.try_again()

    def _node(self) -> Node:
        generation = self._generation if self._dataplane is not None else 0
        return Node(generation, self._synced, self._steps.captures, self._steps.external)

    def _prove_anew(self, enrolment: Enrolment) -> None:
        """What another data plane received proves nothing of the next one."""
        self.prover.forget(enrolment)
        if enrolment.captured and self.prover.proves:
            enrolment.verify_at = 0.0

    def _announced_to(self) -> tuple[int, Announced] | None:
        return None if self._dataplane is None else (self._generation, self._dataplane)

    def _decided(self, enrolment: Enrolment) -> bool:
        if enrolment.error is not None:
            return True
        if enrolment.verified is not None or enrolment.proof is not None:
            proof = enrolment.proof
            proved = proof is not None and proof.state != NOT_PROVED
            return proved or not self.prover.proves or self._proofs_overdue()
        if enrolment.wanted is None:
            return True
        return self._steps.captures.wanted(enrolment.pod) is None and enrolment.added_to != 0


def view(enrolment: Enrolment, node: Node) -> PodView:
    pod, error, proof = enrolment.pod, enrolment.error, enrolment.proof
    problem, remedy = str(error or ""), error.remedy if error else ""
    disproved = proof is not None and proof.state == NOT_PROVED
    if proof is not None and disproved and error is None:
        problem, remedy = f"its capture isn't proved: {proof.reason}", REMEDY
    notes = [node.captures.note(pod)]
    if enrolment.captured and enrolment.forwards:
        names = ", ".join(enrolment.forwards)
        notes.append(
            f"partly captured: what others send through it by {names} goes past the mesh; name"
            " those interfaces in virtualInterfaces"
        )
    return PodView(
        uid=pod.uid,
        name=pod.name,
        namespace=pod.namespace,
        service_account=pod.service_account,
        netns=str(pod.netns),
        state=state(enrolment, node),
        captured=enrolment.captured,
        capture=enrolment.way if enrolment.captured else "",
        former_captures=enrolment.former_ways if enrolment.captured else (),
        notes=tuple(filter(None, notes)),
        verified=enrolment.verified is not None and error is None and not disproved,
        verified_at=enrolment.verified,
        repairs=enrolment.repairs,
        udp_refused=enrolment.datagrams.total.refused,
        udp_unprotected=enrolment.datagrams.total.unprotected,
        raw_sockets=enrolment.raw_sockets,
        forwards=enrolment.forwards if enrolment.captured else (),
        problem=problem,
        remedy=remedy,
        proof=proof.state if proof is not None else "",
        proof_reason=proof.reason if proof is not None else "",
        proof_at=proof.at if proof is not None else None,
    )


def state(enrolment: Enrolment, node: Node) -> str:
    """In words that need no manual."""
    if enrolment.wanted is None:
        return "draining" if enrolment.drained_by else "removing"
    if enrolment.error is not None:
        return "failed"
    if not node.generation:
        return "waiting for data plane"
    if enrolment.added_to != node.generation:
        return "adding"
    if enrolment.pod.only_ports:
        return "served"
    if not node.captures:
        return "served" if node.external else "not captured"
    if not enrolment.captured and not node.synced:
        return "waiting for control plane"
    return "captured" if enrolment.verified is not None else "capturing"


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Until the event, which is cleared, or the time; infinite and past times mean the event."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds if 0 < seconds < float("inf") else None):
            await event.wait()
    event.clear()
