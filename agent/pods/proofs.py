"""Proof that pods are captured, by connections whose arrival the data plane reports: many pods at
once, few children at a time. What a failed proof leads to is decided by the pod's next step."""

import asyncio
import logging
import os
import random
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from agent.dataplane import DataplaneError
from agent.pods.enrolment import Enrolment
from agent.pods.proof import NOT_PROVED, PROVED, UNKNOWN, Proof
from agent.pods.prove_child import Leg, Met, ProofError
from agent.pods.turns import Turns
from proto.gen import control_pb2

log = logging.getLogger("underpass.pods")

# Pods in one child: it holds a descriptor and up to four sockets of each.
BATCH = 128
CHILDREN = 2
# Once the data plane or a child failed; the pod's fault it wasn't.
AGAIN = 1.0
# After failed proofs, the first repair comes at once; later ones mustn't rewrite rules for ever.
REPAIR_PAUSES = (0.0, 1.0, 5.0)
# A restarted node waits so long for proofs that fail.
PATIENCE = 30.0
REMEDY = (
    "it is repaired and proved again by itself; if that doesn't help, look for who else changes "
    "the pod's rules (`nft list ruleset` in its namespace) or attaches programs (`bpftool cgroup "
    "tree`), and move the pod away meanwhile"
)


class Maker(Protocol):
    async def make(self, legs: Sequence[tuple[int, Leg]]) -> Mapping[bytes, Met]:
        """Makes the connections, each from or to the pod of the descriptor. Raises ProofError."""

    def kill(self) -> None: ...


class Announced(Protocol):
    """The data plane, as the one who knows what arrived."""

    async def prove(self, ask: control_pb2.Prove) -> control_pb2.ProveReply: ...


@dataclass(frozen=True)
class Means:
    """How proofs are made. Without a maker, `why` says why none is."""

    maker: Maker | None
    interval: timedelta
    ipv6: bool = True
    why: str = ""


class Prover:
    """State: `_waiting`, `_working` and `_tasks` (by want, forget and the tasks), counts; of an
    enrolment its proof, and when the next is due."""

    def __init__(
        self,
        means: Means | None,
        turns: Turns,
        present: Callable[[], tuple[int, Announced] | None],
    ) -> None:
        """`present`: the data plane and the number that tells it from the one before."""
        self._means = means
        self._turns = turns
        self._present = present
        self._waiting: dict[Enrolment, bool] = {}
        # Tasks that look for more once they are done with what they have.
        self._working = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter({PROVED: 0, NOT_PROVED: 0, UNKNOWN: 0})

    @property
    def proves(self) -> bool:
        return self._means is not None and self._means.maker is not None

    def want(self, enrolment: Enrolment, *, ebpf: bool) -> None:
        """Of a pod that was captured; the proof is put there when it is known."""
        if self._means is None:
            return
        self._schedule(enrolment, self._pause())
        if self._means.maker is None:
            enrolment.proof = Proof(UNKNOWN, self._means.why, datetime.now(UTC))
            return
        self._waiting[enrolment] = ebpf
        if self._working < CHILDREN:
            self._working += 1
            task = asyncio.create_task(self._work(), name="prove")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def forget(self, enrolment: Enrolment) -> None:
        """It isn't captured any more, or by another data plane: what was proved is past."""
        self._waiting.pop(enrolment, None)
        enrolment.proof = None
        enrolment.prove_at = 0.0

    async def close(self) -> None:
        if self._means is not None and self._means.maker is not None:
            self._means.maker.kill()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self) -> None:
        while self._waiting:
            batch = {}
            for enrolment in list(self._waiting)[:BATCH]:
                batch[enrolment] = self._waiting.pop(enrolment)
            try:
                await self._prove(batch)
            except Exception:
                log.exception("proofs failed")
                self._postpone(batch)
        self._working -= 1

    async def _prove(self, batch: Mapping[Enrolment, bool]) -> None:
        node, means = self._present(), self._means
        assert means is not None  # want() takes none without
        assert means.maker is not None
        legs = {one: _legs(ipv6=means.ipv6) for one in batch if one.captured}
        if node is None or not legs:
            # With the next data plane each pod is looked at again.
            return
        # Ours: pods may go meanwhile.
        fds = {one: os.dup(one.netns_fd) for one in legs}
        try:
            await node[1].prove(control_pb2.Prove(expected=_expected(legs)))
            met = await means.maker.make([(fds[one], leg) for one in legs for leg in legs[one]])
            asked = control_pb2.Prove(arrived=[one.pod.uid for one in legs])
            reply = await node[1].prove(asked)
        except DataplaneError as exc:
            log.debug("proofs not made", extra={"error": exc})
            self._postpone(legs)
            return
        except ProofError as exc:
            proof = Proof(UNKNOWN, str(exc), datetime.now(UTC))
            for one in legs:
                self._conclude(one, proof)
            return
        finally:
            for fd in fds.values():
                os.close(fd)
        # During a hand-over of listeners a proof may arrive at the other data plane.
        async with self._turns.turn():
            steady = self._present() == node
        if not steady:
            self._postpone(legs)
            return
        arrived = {entry.uid: set(entry.nonces) for entry in reply.arrived}
        for one in legs:
            nonces = arrived.get(one.pod.uid, set())
            state, reason = judge(legs[one], met, nonces, ebpf=batch[one])
            self._conclude(one, Proof(state, reason, datetime.now(UTC)))

    def _conclude(self, enrolment: Enrolment, proof: Proof) -> None:
        if not enrolment.captured:
            return
        before, enrolment.proof = enrolment.proof, proof
        self.counts[proof.state] += 1
        fields = {"pod": enrolment.pod.key, "uid": enrolment.pod.uid}
        if proof.state != NOT_PROVED:
            if enrolment.disproofs:
                log.info("capture proved again", extra=fields)
            elif proof.state == UNKNOWN and (before is None or before.reason != proof.reason):
                log.info("capture can't be proved", extra=fields | {"why": proof.reason})
            enrolment.disproofs = 0
            return
        if before is None or before.reason != proof.reason:
            told = fields | {"why": proof.reason, "remedy": REMEDY}
            log.error("capture not proved", extra=told)
        failed = enrolment.disproofs
        enrolment.disproofs += 1
        pause = REPAIR_PAUSES[failed] if failed < len(REPAIR_PAUSES) else self._pause()
        self._due(enrolment, pause)

    def _postpone(self, several: Collection[Enrolment]) -> None:
        for enrolment in several:
            self._due(enrolment, AGAIN * random.uniform(0.8, 1.2))

    def _due(self, enrolment: Enrolment, pause: float) -> None:
        self._schedule(enrolment, pause)
        enrolment.wake.set()

    def _schedule(self, enrolment: Enrolment, pause: float) -> None:
        """A proof follows a comparison, whose own time may be later."""
        enrolment.prove_at = _now() + pause
        enrolment.verify_at = min(enrolment.verify_at, enrolment.prove_at)

    def _pause(self) -> float:
        """Spread, so that pods of one moment aren't proved in one moment for ever."""
        assert self._means is not None
        return self._means.interval.total_seconds() * random.uniform(0.9, 1.1)


def judge(
    legs: Sequence[Leg], met: Mapping[bytes, Met], arrived: Collection[bytes], *, ebpf: bool
) -> tuple[str, str]:
    """The state, and the reason where it isn't proved. One connection that goes past us is enough
    to disprove; without any that arrives, nothing is known of that way."""
    proved: set[bool] = set()
    wrong: list[str] = []
    unknown: dict[bool, str] = {}
    for leg in legs:
        it = met.get(leg.nonce, Met("error", "the child said nothing of it"))
        if leg.nonce in arrived:
            proved.add(leg.outwards)
        elif _tells_nothing(leg, it, ebpf=ebpf):
            unknown.setdefault(leg.outwards, it.text)
        elif leg.outwards:
            wrong.append(f"a connection out of the pod (IPv{leg.family}) went past us: {_how(it)}")
        else:
            wrong.append(f"a connection to the pod (IPv{leg.family}) went past us: {_how(it)}")
    if wrong:
        return NOT_PROVED, "; ".join(wrong)
    texts = []
    if True not in proved:
        texts.append(f"the pod can't send: {unknown.get(True, 'nothing was tried')}")
    if False not in proved and any(not leg.outwards for leg in legs):
        texts.append(f"the node can't reach the pod: {unknown.get(False, 'nothing was tried')}")
    return (UNKNOWN, "; ".join(texts)) if texts else (PROVED, "")


def _tells_nothing(leg: Leg, it: Met, *, ebpf: bool) -> bool:
    if it.word in ("absent", "error", "denied"):
        # Denied is refused by the kernel, which is no way past us (the pod is at its budget).
        return True
    if leg.outwards:
        # Captured by eBPF, it is led to loopback before any route is looked up.
        return it.word == "unreachable" and not (ebpf and leg.family == 4)
    # A port where nobody listens refuses; what doesn't answer is filtered, or not there.
    return it.word in ("unreachable", "silent")


def _how(it: Met) -> str:
    if it.word == "ended":
        return "somebody else took it"
    return it.text or it.word


def _legs(*, ipv6: bool) -> list[Leg]:
    families = (4, 6) if ipv6 else (4,)
    ways = (True, False)
    return [Leg(way, family, secrets.token_bytes(16)) for way in ways for family in families]


def _expected(legs: Mapping[Enrolment, Sequence[Leg]]) -> list[control_pb2.Prove.Expected]:
    return [
        control_pb2.Prove.Expected(
            uid=one.pod.uid,
            outbound=[leg.nonce for leg in all if leg.outwards],
            inbound=[leg.nonce for leg in all if not leg.outwards],
        )
        for one, all in legs.items()
    ]


def _now() -> float:
    return asyncio.get_running_loop().time()
