"""One pod between what is wanted and what is: the facts, and the next step that they ask for."""

import asyncio
import enum
import random
from dataclasses import dataclass, field
from datetime import datetime

from agent.errors import AgentError
from agent.pods.captures import Captures
from agent.pods.netns import NetnsId
from agent.pods.proof import Proof
from agent.pods.source import Outcome, Pod
from agent.pods.tally import Tally


class Step(enum.Enum):
    """What brings a pod nearer to what is wanted. Each can be repeated."""

    # Towards the mesh.
    OPEN = "open its network namespace"
    ADD = "make the data plane listen in it"
    CAPTURE = "redirect its traffic"
    VERIFY = "compare its rules"
    MOVE = "redirect its traffic another way"
    CHANGE = "change its settings"
    # Away from it: never bare ports that rules still point to.
    RELEASE = "let its new connections past"
    UNCAPTURE = "take its rules away"
    REMOVE = "take it from the data plane"
    CLOSE = "close its network namespace"
    ADOPT = "take over its new description"
    FORGET = "forget it"
    # Nothing to do now.
    REST = "rest"


@dataclass(frozen=True)
class Node:
    """What a step depends on besides the pod."""

    # Of the data plane that pods are to be added to; 0 while there is none.
    generation: int
    # The data plane processed a first response of every type.
    synced: bool
    # By what we redirect traffic, if at all.
    captures: Captures
    # Somebody else does.
    external: bool = False


@dataclass(eq=False)
class Enrolment:
    """`wanted` is set by the source; everything else only by the pod's own task."""

    pod: Pod
    wanted: Pod | None
    netns_fd: int = -1
    netns: NetnsId | None = None
    # The path names another namespace now.
    moved: bool = False
    # Generation of the data plane that listens for it; 0 none.
    added_to: int = 0
    # Somebody ended a listener of it there: whether all listen is to be asked.
    doubted: bool = False
    captured: bool = False
    # By what it is, or was until it was released.
    way: str = ""
    # By what it was captured before: what its open connections need may be there still.
    former_ways: tuple[str, ...] = ()
    # Loop time of the move.
    moved_at: float = 0.0
    # Of the capture only what its open connections need is left; new ones are plain.
    released: bool = False
    # Loop time by which they end, told or not; 0 while nobody waits for them.
    drained_by: float = 0.0
    # They may be of an earlier configuration.
    stale: bool = True
    # Loop time of the next comparison; 0 at once.
    verify_at: float = 0.0
    verified: datetime | None = None
    # By traffic; None while none was tried since it was captured, or by this data plane.
    proof: Proof | None = None
    # Loop time at which the next is due, with the comparison that follows.
    prove_at: float = 0.0
    # How often in a row it failed.
    disproofs: int = 0
    repairs: int = 0
    # UDP that the mesh didn't carry.
    datagrams: Tally = field(default_factory=Tally)
    # Sockets in it whose packets can't be captured, when it was last looked at.
    raw_sockets: int = 0
    # Likewise: interfaces by which others send through it, past the mesh.
    forwards: tuple[str, ...] = ()
    failures: int = 0
    error: AgentError | None = None
    # Loop time before which a failed step isn't tried again; infinite: not by itself.
    retry_at: float = 0.0
    # Generation in which adding was last tried, whatever came of it.
    tried_in: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    # Somebody waits to hear what came of what is wanted.
    outcome: Outcome | None = None

    def next(self, node: Node, now: float) -> Step:
        if self.wanted != self.pod or self.moved:
            return Step.CHANGE if self._changes_in_place() else self._leaving(node, now)
        if self.netns_fd < 0:
            return Step.OPEN
        if node.generation and (self.doubted or self.added_to != node.generation):
            return Step.ADD
        # Not before the proxy can serve it.
        ready = node.generation and node.synced
        wanted = node.captures.wanted(self.pod)
        if self.captured:
            if ready and wanted is not None and wanted.name != self.way:
                return Step.MOVE
            # Also while no data plane serves: until it is back, refused is better than bare.
            return Step.VERIFY if now >= self.verify_at else Step.REST
        return Step.CAPTURE if wanted is not None and ready else Step.REST

    def _leaving(self, node: Node, now: float) -> Step:
        # Without that data plane nothing can be told; KeepPods tells the next one.
        served = self.added_to != 0 and self.added_to == node.generation
        if self.captured:
            gently = served and (self.wanted is None or self._stays_in_its_place())
            return Step.RELEASE if gently else Step.UNCAPTURE
        if served:
            return Step.REMOVE
        if self.released:
            if self._stays_in_its_place():
                # Captured again in a moment, which brings back what is missing.
                return Step.ADOPT
            return Step.REST if now < self.drained_by else Step.UNCAPTURE
        if self.netns_fd >= 0:
            return Step.CLOSE
        return Step.FORGET if self.wanted is None else Step.ADOPT

    def _stays_in_its_place(self) -> bool:
        wanted = self.wanted
        return wanted is not None and not self.moved and wanted.netns == self.pod.netns

    def _changes_in_place(self) -> bool:
        wanted = self.wanted
        return wanted is not None and not self.moved and wanted.differs_only_in_settings(self.pod)

    def drained(self) -> None:
        """None of its connections is left, or nobody is left to wait for."""
        if self.drained_by:
            self.drained_by = 0.0
            self.try_again()

    @property
    def rests_until(self) -> float:
        """Loop time at which REST may turn into another step by itself."""
        return self.drained_by if self.drained_by else self.verify_at

    def succeeded(self) -> None:
        self.failures, self.error, self.retry_at = 0, None, 0.0

    def failed(self, error: AgentError, now: float) -> None:
        self.failures += 1
        self.error = error
        self.retry_at = now + retry_delay(self.failures) if error.retryable else float("inf")

    def answer(self, error: AgentError | None) -> None:
        outcome, self.outcome = self.outcome, None
        if outcome is not None and not outcome.done():
            outcome.set_result(error)

    def try_again(self) -> None:
        """Something changed: a failed step may work now."""
        self.retry_at = 0.0
        self.wake.set()


def retry_delay(failures: int) -> float:
    """Seconds. Quick at first, since namespaces and ports appear and go within moments; five
    seconds at most, so that a repaired pod list is noticed while its author looks on."""
    return min(0.1 * 2.0 ** min(failures - 1, 10), 5.0) * random.uniform(0.8, 1.2)
