"""What each step does to one pod: through its namespace, the data plane and the redirection.

A step either changes the enrolment's facts to what is now true, or raises with nothing changed.
"""

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Collection, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Protocol

from agent.dataplane import DataplaneError, InUse
from agent.errors import NetnsMissing, NetnsTaken, PodError
from agent.namespaces import NamespaceTable
from agent.pods.captures import Captures
from agent.pods.dns import DnsRules
from agent.pods.enrolment import Enrolment
from agent.pods.ledger import Ledger
from agent.pods.netns import namespaces_of, netns_id
from agent.pods.precapture import Precapture
from agent.pods.proof import NOT_PROVED
from agent.pods.proofs import Prover
from agent.pods.source import Pod
from proto.gen import control_pb2
from redirect import forwarding, lingering, raw_sockets
from redirect.base import CaptureConfig, Datagrams, NetnsGone, Redirect, RedirectError, Target
from redirect.netns import NetnsThread

log = logging.getLogger("underpass.pods")

_ENFORCEMENT = {
    "off": control_pb2.ENFORCEMENT_OFF,
    "dry-run": control_pb2.ENFORCEMENT_DRY_RUN,
    "on": control_pb2.ENFORCEMENT_ON,
}


# The data plane's own, where none is configured (control.proto, Limits).
DRAIN_DEADLINE = timedelta(seconds=5)
# Beyond the deadline, for what a data plane does at it and for its word to arrive.
DRAIN_GRACE = timedelta(seconds=2)
# Seconds. A connection of the data plane whose mark was chosen as the former way wants it is opened
# within moments, though a loaded machine may take its time.
SETTLING = 1.0


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

    async def update_pod(self, uid: str, settings: control_pb2.PodSettings) -> None: ...

    async def remove_pod(
        self, uid: str, *, drain: bool, deadline: timedelta | None = None
    ) -> None: ...

    async def keep_pods(self, uids: Iterable[str]) -> None: ...

    async def pods_synced(self) -> None: ...

    async def list_pods(self) -> list[control_pb2.PodStatus]: ...

    async def prove(self, ask: control_pb2.Prove) -> control_pb2.ProveReply: ...


class CaptureError(PodError):
    """A pod's traffic isn't redirected as it should be."""

    remedy = "the agent goes on trying; see `nft list ruleset` in the pod's namespace"

    def __init__(self, text: str, *, retryable: bool = True) -> None:
        self.retryable = retryable
        if not retryable:
            self.remedy = "repair it, then start the agent anew (SIGUSR2 ends it alone)"
        super().__init__(text)


class ProcessesElsewhere(CaptureError):
    """What is captured isn't what the pod's processes use."""

    remedy = "correct netns or cgroup in the pod list"


class Steps:
    """Of state it holds only the counts of repairs and datagrams. Raises AgentError,
    RedirectError."""

    def __init__(
        self,
        captures: Captures,
        *,
        verify_interval: timedelta,
        drain_deadline: timedelta | None,
        ledger: Ledger,
        namespaces: NamespaceTable | None = None,
        external: bool = False,
        ports: Collection[int] = (),
        dns: DnsRules | None = None,
        precapture: Precapture,
        prover: Prover,
    ) -> None:
        """`ports`: of the data plane's listeners in each pod."""
        self._ports = ports
        self._threads = NetnsThread()
        self.captures = captures
        self.external = external
        self._dns = dns or DnsRules()
        self._namespaces: NamespaceTable = namespaces or {}
        self._ledger = ledger
        self._precapture = precapture
        self._prover = prover
        self._verify_interval = verify_interval.total_seconds()
        self._drain_deadline = drain_deadline
        self.repairs = 0
        # Of all pods, since this agent started.
        self.datagrams = Datagrams()

    def reconfigure(self, config: CaptureConfig) -> None:
        self._precapture.reconfigure(config)
        self.captures.reconfigure(config)

    # ---- towards the mesh

    def open(self, enrolment: Enrolment, others: Iterable[Enrolment]) -> None:
        pod = enrolment.pod
        fd = pod.netns.open()
        found = netns_id(fd)
        enrolment.way, enrolment.former_ways = "", self._ledger.ways(pod.uid, found)
        for other in others:
            if other is enrolment or other.netns != found:
                continue
            if not (other.released and other.drained_by):
                os.close(fd)
                raise NetnsTaken(f"{pod.netns}: already the network namespace of {other.pod.key}")
            # What it left there is from now on this pod's, whose rules will take its place.
            enrolment.former_ways = _ways(other)
            self._ledger.add(pod, found, ways=enrolment.former_ways)
            self._ledger.discard(other.pod.uid)
            enrolment.released, other.released = True, False
            other.drained()
        enrolment.netns_fd, enrolment.netns = fd, found

    async def add(self, enrolment: Enrolment, dataplane: PodTarget) -> None:
        """Rules of an earlier life are brought up to date before the data plane listens: they
        may exempt only a data plane that is no more, and would lead this one back to itself. Those
        of ways that the pod came from capture nothing new: they are left as they are."""
        pod = enrolment.pod
        wanted, stale = self.captures.wanted(pod), enrolment.stale and not enrolment.released
        if wanted is not None and stale:
            known = _ways(enrolment)[:1]
            for redirect in self.captures:
                ours = redirect.name in known or (redirect is wanted and not enrolment.captured)
                if redirect.exempts_by_rule and ours:
                    await self._refresh(redirect, enrolment)
            # What a data plane adopts of an earlier one is looked at as soon as it serves.
            enrolment.verify_at = 0.0
        try:
            await dataplane.add_pod(message(pod), self._settings(enrolment), enrolment.netns_fd)
        except InUse:
            # In the agent's own namespace connections of others have such ports, too.
            if pod.only_ports or not await self._freed(enrolment):
                raise
            await dataplane.add_pod(message(pod), self._settings(enrolment), enrolment.netns_fd)
        log.info("pod added", extra=_fields(enrolment))

    async def _freed(self, enrolment: Enrolment) -> bool:
        """Whether only ended connections of a former proxy held the pod's ports."""
        key = enrolment.pod.key
        try:
            count = await lingering.free(
                self._threads, enrolment.netns_fd, self._ports, subject=key
            )
        except RedirectError as exc:
            log.debug("pod's ports not freed", extra=_fields(enrolment) | {"why": exc})
            return False
        if count:
            log.info("pod's ports freed", extra=_fields(enrolment) | {"ended_connections": count})
        return count > 0

    async def prepare(self, enrolment: Enrolment, successor: PodTarget) -> None:
        pod = enrolment.pod
        await successor.add_pod(
            message(pod), self._settings(enrolment), enrolment.netns_fd, prepare_only=True
        )

    async def capture(self, enrolment: Enrolment, dataplane: PodTarget) -> None:
        """By the way that is wanted. Another one that the pod has captures beside it until this one
        is verified; then that one's open connections keep what they need."""
        redirect = self.captures.wanted(enrolment.pod)
        assert redirect is not None  # no step that captures is planned without it
        known = _ways(enrolment)
        before = tuple(name for name in known if name != redirect.name)
        target = self._target(enrolment, shared=bool(before))
        self._note(enrolment, ways=known if redirect.name in known else (*known, redirect.name))
        if before:
            await dataplane.update_pod(enrolment.pod.uid, self._settings(enrolment))
        await redirect.install(target)
        if problems := await redirect.verify(target):
            # Half a capture is worse than none: it looks like one.
            await redirect.remove(target)
            if before:
                self._note(enrolment, ways=before)
            else:
                self._ledger.discard(enrolment.pod.uid)
                enrolment.released = False
            raise CaptureError(f"{target.name}: {'; '.join(problems)}")
        enrolment.captured, enrolment.released, enrolment.drained_by = True, False, 0.0
        enrolment.way, enrolment.former_ways = redirect.name, before
        enrolment.moved_at = asyncio.get_running_loop().time()
        enrolment.datagrams.begin()
        self._proven(enrolment)
        self._prover.want(enrolment, ebpf=redirect.name == "ebpf")
        log.info("pod captured", extra=_fields(enrolment) | {"way": redirect.name})
        await self._look_for_older(enrolment, anew=not before)
        await self._leave_former(enrolment, dataplane)

    async def move(self, enrolment: Enrolment, dataplane: PodTarget) -> None:
        """To the way that is wanted; the one that it has is looked after when that fails."""
        try:
            await self.capture(enrolment, dataplane)
        except (RedirectError, CaptureError) as exc:
            if enrolment.way == self._way_wanted(enrolment.pod):
                raise
            await self.verify(enrolment, dataplane)
            raise CaptureError(f"{exc}; it stays captured by {enrolment.way}") from exc

    async def _leave_former(self, enrolment: Enrolment, dataplane: PodTarget | None) -> None:
        """Ways that the pod came from catch nothing new, and go when nothing open needs them."""
        # Until it is done, it is tried again with the next comparison.
        enrolment.verify_at, pause = 0.0, enrolment.verify_at
        target = self._target(enrolment, shared=True)
        now = asyncio.get_running_loop().time()
        # Moved by an agent before this one: since when isn't known.
        enrolment.moved_at = enrolment.moved_at or now
        settled = now >= enrolment.moved_at + SETTLING
        for former in map(self.captures.named, enrolment.former_ways):
            if former is not None:
                await former.release(target)
        # Only now, for an agent after this one leaves alone what isn't named first.
        self._note(enrolment)
        left = []
        for name in enrolment.former_ways:
            former = self.captures.named(name)
            if former is None:
                # Not of this agent: the next one that has it takes it away.
                left.append(name)
            elif settled and await former.idle(target):
                await former.remove(target)
                log.info("pod left its former capture", extra=_fields(enrolment) | {"way": name})
            else:
                left.append(name)
        if not left:
            enrolment.moved_at = 0.0
        if tuple(left) != enrolment.former_ways:
            enrolment.former_ways = tuple(left)
            self._note(enrolment)
            if dataplane is not None:
                await dataplane.update_pod(enrolment.pod.uid, self._settings(enrolment))
        enrolment.verify_at = pause

    async def verify(self, enrolment: Enrolment, dataplane: PodTarget | None) -> None:
        """Repairs what somebody changed, then looks whether the pod's namespace is still it, and
        what is left of former ways."""
        redirect, target = self._present(enrolment), self._target(enrolment)
        repairs = enrolment.repairs
        due = asyncio.get_running_loop().time() >= enrolment.prove_at
        problems = await redirect.verify(target)
        if not problems and due and (proof := enrolment.proof) and proof.state == NOT_PROVED:
            # It reads well, and traffic goes another way.
            problems = (proof.reason,)
        if problems:
            enrolment.verified = None
            found = _fields(enrolment) | {"found": "; ".join(problems)}
            log.warning("pod's rules were changed, repairing", extra=found)
            await redirect.install(target)
            if problems := await redirect.verify(target):
                raise CaptureError(f"{target.name}: {'; '.join(problems)}")
            enrolment.repairs += 1
            self.repairs += 1
        self._proven(enrolment)
        self.datagrams += enrolment.datagrams.read(await redirect.datagrams(target))
        _still_there(enrolment)
        _processes_there(enrolment)
        # Shown only: it says nothing against the pod's capture.
        with contextlib.suppress(RedirectError):
            enrolment.raw_sockets = await self._threads.run(
                enrolment.netns_fd, raw_sockets.count, subject=target.name
            )
            caught = target.virtual_interfaces if redirect.name == "nftables" else ()
            enrolment.forwards = await self._threads.run(
                enrolment.netns_fd, partial(forwarding.undeclared, caught), subject=target.name
            )
        if due or enrolment.repairs > repairs:
            self._prover.want(enrolment, ebpf=redirect.name == "ebpf")
        # While the rules weren't whole, connections may have got past them.
        await self._look_for_older(enrolment, anew=enrolment.repairs > repairs)
        if enrolment.former_ways:
            await self._leave_former(enrolment, dataplane)

    async def change(self, enrolment: Enrolment, dataplane: PodTarget | None) -> None:
        """Of its settings, while it serves: never rules without somebody who listens. Without the
        data plane that has it, what comes next brings both up to date."""
        wanted = enrolment.wanted
        assert wanted is not None  # CHANGE is never planned without it
        # What else there is to change is the data plane's to do, or asks for a move.
        was, is_captured = enrolment.pod, enrolment.captured
        dns = is_captured and wanted.dns_capture != was.dns_capture
        behind = is_captured and wanted.virtual_interfaces != was.virtual_interfaces
        target = self._target(enrolment, wanted)
        if dns and not wanted.dns_capture:
            await self._present(enrolment).install(target)
        if dataplane is not None:
            await dataplane.update_pod(wanted.uid, self._settings(enrolment, wanted))
        else:
            enrolment.stale = True
        if (dns and wanted.dns_capture) or behind:
            await self._present(enrolment).install(target)
            # Who sends past the mesh is looked at anew.
            enrolment.verify_at = 0.0
        enrolment.pod = wanted
        settings = {"dns": wanted.dns_capture, "probe_ports": list(wanted.probe_ports)}
        log.info("pod's settings changed", extra=_fields(enrolment) | settings)

    async def reinstall(self, enrolment: Enrolment) -> None:
        """After `reconfigure`; a failure leaves it stale, and verified at once."""
        enrolment.verify_at = 0.0
        await self._present(enrolment).install(self._target(enrolment))
        enrolment.stale = False

    async def _refresh(self, redirect: Redirect, enrolment: Enrolment) -> None:
        target = self._target(enrolment)
        if not enrolment.captured and not (await redirect.list(target)).rules:
            return
        former = tuple(name for name in _ways(enrolment) if name != redirect.name)
        self._note(enrolment, ways=(redirect.name, *former))
        target = replace(target, shared=bool(former))
        if await redirect.verify(target):
            await redirect.install(target)
        enrolment.captured, enrolment.way, enrolment.former_ways = True, redirect.name, former
        enrolment.stale = False

    def _proven(self, enrolment: Enrolment) -> None:
        enrolment.stale = False
        enrolment.verified = datetime.now(UTC)
        # Spread, so that pods of one moment aren't looked at in one moment for ever.
        pause = self._verify_interval * random.uniform(0.9, 1.1)
        now = asyncio.get_running_loop().time()
        enrolment.verify_at = now + pause
        if enrolment.prove_at > now:
            enrolment.verify_at = min(enrolment.verify_at, enrolment.prove_at)

    # ---- away from it

    async def release(self, enrolment: Enrolment) -> None:
        """New connections go past the mesh at once, before their listeners go. Those of a pod that
        is gone have nobody to go on for: its rules are taken away as a whole."""
        if not _alive(enrolment):
            await self.uncapture(enrolment, None)
            return
        try:
            for redirect in self._holding(enrolment):
                await redirect.release(self._target(enrolment))
        except NetnsGone:
            await self.uncapture(enrolment, None)
            return
        self._note(enrolment, drains_until=datetime.now(UTC) + self._patience)
        enrolment.captured, enrolment.released = False, True
        enrolment.verified = None
        self._prover.forget(enrolment)
        enrolment.verify_at = 0.0
        log.info("pod released", extra=_fields(enrolment))

    async def uncapture(self, enrolment: Enrolment, dataplane: PodTarget | None) -> None:
        """The data plane is given for a pod that didn't drain in time: what is left is cut first,
        while its packets still go where those before went."""
        enrolment.drained_by = 0.0
        if dataplane is not None:
            with contextlib.suppress(DataplaneError):
                await dataplane.remove_pod(enrolment.pod.uid, drain=False)
        try:
            for redirect in self._holding(enrolment):
                await redirect.remove(self._target(enrolment, shared=False))
        except NetnsGone as exc:
            # A namespace that can't be entered any more holds no rules that matter. Any other
            # failure leaves them there, and the pod without a proxy: it stays, with its error.
            log.info("pod's rules went with it", extra=_fields(enrolment) | {"why": exc})
        self._ledger.discard(enrolment.pod.uid)
        self._precapture.forget(enrolment.pod.uid)
        enrolment.captured = enrolment.released = False
        enrolment.way, enrolment.former_ways = "", ()
        enrolment.verified = None
        self._prover.forget(enrolment)
        enrolment.verify_at = 0.0

    async def remove(self, enrolment: Enrolment, dataplane: PodTarget) -> None:
        """A pod that still runs leaves the mesh gently; one that is gone has nobody to wait for.
        A namespace by descriptor can't tell the two apart, so it is cut (facts ztunnel 11.2)."""
        alive = _alive(enrolment)
        if alive and enrolment.released:
            now = asyncio.get_running_loop().time()
            enrolment.drained_by = now + self._patience.total_seconds()
        await dataplane.remove_pod(
            enrolment.pod.uid, drain=alive, deadline=self._drain_deadline if alive else None
        )
        enrolment.added_to = 0
        log.info("pod removed", extra=_fields(enrolment))

    def close(self, enrolment: Enrolment) -> None:
        if enrolment.netns_fd >= 0:
            os.close(enrolment.netns_fd)
        enrolment.netns_fd, enrolment.netns = -1, None
        # The next namespace may hold rules of an earlier life.
        enrolment.stale = True

    # ---- helpers

    async def end(self) -> None:
        await self._threads.close()

    async def _look_for_older(self, enrolment: Enrolment, *, anew: bool) -> None:
        assert enrolment.netns is not None  # open, or it couldn't be captured
        await self._precapture.enrolled(
            enrolment.pod, enrolment.netns, enrolment.netns_fd, anew=anew
        )

    def _note(
        self,
        enrolment: Enrolment,
        *,
        drains_until: datetime | None = None,
        ways: tuple[str, ...] | None = None,
    ) -> None:
        assert enrolment.netns is not None  # open, or there would be nowhere to put rules
        ways = _ways(enrolment) if ways is None else ways
        self._ledger.add(enrolment.pod, enrolment.netns, drains_until, ways)

    def still_drains(self, until: datetime) -> float:
        """Seconds, by a note that another clock may have written."""
        left = min(until - datetime.now(UTC), self._patience)
        return max(left.total_seconds(), 0.0)

    @property
    def _patience(self) -> timedelta:
        """For the word that a pod is drained."""
        return (self._drain_deadline or DRAIN_DEADLINE) + DRAIN_GRACE

    def _present(self, enrolment: Enrolment) -> Redirect:
        """By what it is captured."""
        redirect = self.captures.named(enrolment.way)
        assert redirect is not None  # it was captured by one of these
        return redirect

    def _denies_udp(self, pod: Pod) -> bool:
        rules = self._namespaces.get(pod.namespace)
        return rules is not None and rules.udp_deny

    def _target(
        self, enrolment: Enrolment, pod: Pod | None = None, *, shared: bool | None = None
    ) -> Target:
        """Of `pod`, where it isn't the enrolment's yet. `shared`: known better by who moves it."""
        pod = pod or enrolment.pod
        return Target(
            uid=pod.uid,
            name=pod.key,
            netns_fd=enrolment.netns_fd,
            virtual_interfaces=pod.virtual_interfaces,
            dns=pod.dns_capture,
            udp_deny=self._denies_udp(pod),
            shared=len(_ways(enrolment)) > 1 if shared is None else shared,
        )

    def _holding(self, enrolment: Enrolment) -> list[Redirect]:
        """Who may have something in its namespace: of a pod from an older list, anybody."""
        known = _ways(enrolment)
        return [one for one in self.captures if not known or one.name in known]

    def _way_wanted(self, pod: Pod) -> str:
        wanted = self.captures.wanted(pod)
        return wanted.name if wanted is not None else ""

    def _settings(self, enrolment: Enrolment, pod: Pod | None = None) -> control_pb2.PodSettings:
        """Of `pod`, where it isn't the enrolment's yet. The data plane looks after what is captured
        by eBPF for as long as any of it is there."""
        pod = pod or enrolment.pod
        if pod.only_ports:
            none = control_pb2.PodSettings.NONE
            return control_pb2.PodSettings(capture=none, only_ports=pod.only_ports)
        kind = control_pb2.PodSettings.NFTABLES
        if "ebpf" in (self._way_wanted(pod), *_ways(enrolment)) and self.captures.named("ebpf"):
            kind = control_pb2.PodSettings.EBPF
        if not self.captures:
            external = control_pb2.PodSettings.EXTERNAL
            kind = external if self.external else control_pb2.PodSettings.NONE
        settings = control_pb2.PodSettings(
            capture=kind,
            probe_ports=pod.probe_ports,
            cgroup=str(pod.cgroup or ""),
            virtual_interfaces=pod.virtual_interfaces,
        )
        if (rules := self._namespaces.get(pod.namespace)) is not None:
            settings.registry_only = _ENFORCEMENT[rules.registry_only]
            settings.waypoint_required = _ENFORCEMENT[rules.waypoint_required]
            settings.udp_deny = rules.udp_deny
        self._dns.apply(pod, settings)
        return settings


def message(pod: Pod) -> control_pb2.Pod:
    return control_pb2.Pod(
        uid=pod.uid, name=pod.name, namespace=pod.namespace, service_account=pod.service_account
    )


def _alive(enrolment: Enrolment) -> bool:
    """Its namespace is still that of a pod, as far as can be told."""
    netns = enrolment.pod.netns
    return not netns.lasting and not enrolment.moved and netns.identity() == enrolment.netns


def _still_there(enrolment: Enrolment) -> None:
    """The open descriptor keeps a dead pod's namespace alive, so its path is looked at."""
    netns = enrolment.pod.netns
    found = netns.identity()
    if found == enrolment.netns:
        return
    if found is not None and netns.follow:
        enrolment.moved = True
        return
    raise NetnsMissing(f"{netns}: the pod's network namespace isn't there any more")


def _processes_there(enrolment: Enrolment) -> None:
    """Of a pod whose cgroup is known, some process lives in the namespace that we capture."""
    if enrolment.pod.cgroup is None:
        return
    found = namespaces_of(enrolment.pod.cgroup)
    if found and enrolment.netns not in found:
        raise ProcessesElsewhere(
            f"{enrolment.pod.cgroup}: none of its processes lives in {enrolment.pod.netns}"
        )


def _ways(enrolment: Enrolment) -> tuple[str, ...]:
    """By what it is and was captured, as far as anything of it may be there."""
    present = (enrolment.way,) if enrolment.way else ()
    return (*present, *(name for name in enrolment.former_ways if name != enrolment.way))


def _fields(enrolment: Enrolment) -> dict[str, object]:
    pod = enrolment.pod
    return {"pod": pod.key, "uid": pod.uid, "netns": str(pod.netns)}
