"""Supplies the data plane with certificates of a SPIRE agent: a subscription for each identity.

SPIRE makes the keys and decides when to renew; what it pushes is checked, installed and wiped.
Without the SPIRE agent, whatever is valid goes on serving.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from agent.errors import AgentError
from agent.identity.answer import Issued, check_identity
from agent.identity.ca import CaError
from agent.identity.entry import ASK_AGAIN, RETRY, Entry, Priority
from agent.identity.spire_answer import check_svid, choose, roots_of, selectors_of
from agent.identity.spire_client import SpireAway, SpireClient, read_bundles
from agent.identity.spire_config import SpireConfig
from agent.identity.spire_wire import Svid, take_svids
from agent.identity.status import IdentityStatus
from agent.identity.supply import (
    IN_FLIGHT,
    ROTATION_SPREAD,
    KeyTarget,
    RootKeeper,
    SupplyTrouble,
)
from agent.secret import wipe_all
from agent.xds.backoff import Backoff
from proto.gen import control_pb2

# SPIRE renews at half of a life by default, with `availability_target` later; with so much of it
# gone something is wrong.
LATE = 0.9

log = logging.getLogger("underpass.identity")


@dataclass(eq=False)
class _Followed:
    """One identity. The task ends with the data plane it works for, or with the last pod."""

    entry: Entry
    task: asyncio.Task[None] | None = None
    # As the present data plane took it from us; None while that isn't known.
    installed: Issued | None = None

    def stop(self, now: float) -> None:
        if self.task is not None:
            self.task.cancel()
            self.task = None
        self.entry.interrupt(now)


class SpireIdentities:
    """State: `_followed`; `_roots` and `_trouble`, as the stream of bundles has them."""

    remedy = "check the registration entries of this identity at the SPIRE server"

    def __init__(
        self,
        config: SpireConfig,
        trust_domain: str,
        *,
        retry: Backoff = RETRY,
        roots: RootKeeper | None = None,
        spread: float = ROTATION_SPREAD,
    ) -> None:
        self.fetched = 0
        self.failed = 0
        self._config = config
        self._trust_domain = trust_domain
        self._retry = retry
        self._rng = random.Random()
        self._keeper = roots
        self._spread = spread
        self._client = SpireClient(config.socket)
        self._target: KeyTarget | None = None
        self._followed: dict[str, _Followed] = {}
        self._ended: set[asyncio.Task[None]] = set()
        self._roots: tuple[str, ...] = ()
        self._trouble: CaError | None = None
        # While the stream of bundles stands; subscriptions wait for it.
        self._connected = asyncio.Event()
        self._connects = 0
        # A connection waits for a certificate: no long pauses.
        self._hurry = asyncio.Event()
        self._installing = asyncio.Semaphore(IN_FLIGHT)

    def attach(
        self, target: KeyTarget, certificates: Sequence[control_pb2.CertificateStatus]
    ) -> None:
        """A (new) data plane and what it holds. As we keep no key, all are subscribed anew."""
        self.detach()
        self._target = target
        now = time.time()
        held = {entry.identity: entry for entry in certificates}
        for identity in held.keys() - self._followed.keys():
            self._followed[identity] = _Followed(Entry(identity, Priority.PREFETCH, now))
        for identity, one in self._followed.items():
            found = held.get(identity)
            if found is None or not found.not_after:
                one.entry.forget_certificate(now)
            else:
                one.entry.succeed(found.not_before, found.not_after, found.serial, now, self._rng)
            self._start(one)

    def detach(self) -> None:
        self._target = None
        for one in self._followed.values():
            self._stop(one)
            one.installed = None

    def wanted(self, identity: str, *, connection: bool) -> None:
        now = time.time()
        priority = Priority.CONNECTION if connection else Priority.PREFETCH
        one = self._followed.get(identity)
        if one is None:
            one = self._followed[identity] = _Followed(Entry(identity, priority, now))
            self._start(one)
            return
        due = one.entry.due
        one.entry.ask(priority, now)
        if one.entry.due < due:
            self._start(one)
        if connection:
            self._hurry.set()

    def forgotten(self, identity: str) -> None:
        one = self._followed.pop(identity, None)
        if one is not None:
            self._stop(one)

    def status(self) -> list[IdentityStatus]:
        now = time.time()
        return [self._followed[identity].entry.status(now) for identity in sorted(self._followed)]

    def trouble(self) -> SupplyTrouble | None:
        match self._trouble:
            case None:
                return None
            case SpireAway() as away:
                return SupplyTrouble("SPIRE", away.cause, away.remedy)
            case error:
                return SupplyTrouble("SPIRE", f"{self._config.socket}: {error}", "")

    async def run(self) -> None:
        """Follows the roots, for ever; identities are followed beside it. Ends by cancellation."""
        failures = 0
        try:
            while True:
                before = self._connects
                try:
                    await self._follow_roots()
                except CaError as error:
                    failures = failures + 1 if self._connects == before else 1
                    await self._away(error)
                await self._pause(self._retry.delay(failures).total_seconds())
        finally:
            self.detach()
            await asyncio.gather(*self._ended, return_exceptions=True)
            await self._client.close()

    # ---- the SPIRE agent as a whole

    async def _follow_roots(self) -> None:
        """Ends only by an exception. Raises CaError."""
        within: float | None = self._config.patience.total_seconds()
        async with self._client.bundles() as stream:
            while True:
                answer = await stream.next(within)
                if answer is None:
                    raise SpireAway(
                        f"SPIRE agent at {self._config.socket}: it told no roots in {within:g} s"
                    )
                await self._take_roots(roots_of(read_bundles(answer), self._trust_domain))
                within = None

    async def _take_roots(self, roots: tuple[str, ...]) -> None:
        """Before anything that they prove is installed. Others than before: all is put in anew."""
        changed = roots != self._roots
        if changed and self._keeper is not None:
            await self._keeper.answered(roots)
        self._roots = roots
        if self._trouble is not None:
            log.info("SPIRE agent is back", extra={"socket": self._config.socket})
            self._trouble = None
        if not self._connected.is_set():
            self._connects += 1
            self._connected.set()
        if changed:
            for one in self._followed.values():
                soon = one.installed is None
                self._start(one, 0.0 if soon else self._rng.uniform(0, self._spread))

    async def _away(self, error: CaError) -> None:
        """Who has no certificate hears why; the others need none just now."""
        self._connected.clear()
        if str(error) != str(self._trouble):
            log.warning("no certificates from SPIRE", extra={"error": error})
        self._trouble = error
        now = time.time()
        for one in list(self._followed.values()):
            if not one.entry.valid(now) and self._target is not None:
                await self._fail(self._target, one, error)

    async def _pause(self, seconds: float) -> None:
        """Shorter when a connection waits, but never short."""
        self._hurry.clear()
        await asyncio.sleep(min(seconds, ASK_AGAIN))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds - ASK_AGAIN)):
                await self._hurry.wait()

    # ---- one identity

    def _start(self, one: _Followed, delay: float = 0.0) -> None:
        """From the beginning, also where one is under way."""
        self._stop(one)
        if self._target is not None:
            name = f"SPIRE {one.entry.identity}"
            one.task = asyncio.create_task(self._follow(self._target, one, delay), name=name)

    def _stop(self, one: _Followed) -> None:
        if one.task is not None:
            self._ended.add(one.task)
            one.task.add_done_callback(self._ended.discard)
        one.stop(time.time())

    async def _follow(self, target: KeyTarget, one: _Followed, delay: float) -> None:
        await asyncio.sleep(delay)
        while True:
            one.entry.heed_clock(time.time())
            if one.entry.failures:
                await asyncio.sleep(max(0.0, one.entry.due - time.time()))
            await self._connected.wait()
            connect = self._connects
            try:
                await self._subscribe(target, one)
            except SpireAway as error:
                # All subscriptions end together; the stream of bundles tells for all of them.
                await asyncio.sleep(self._rng.uniform(0.5, 1.0) * ASK_AGAIN)
                if self._connected.is_set() and self._connects == connect:
                    await self._fail(target, one, error)
            except Exception as error:
                await self._fail(target, one, error)

    async def _subscribe(self, target: KeyTarget, one: _Followed) -> None:
        """Until the next answer is overdue. Raises SpireAway, and CaError for a silent one."""
        entry = one.entry
        check_identity(entry.identity, self._trust_domain)
        entry.start(time.time())
        within = self._config.patience.total_seconds()
        silence = f"{entry.identity}: the SPIRE agent didn't answer in {within:g} s"
        async with self._client.svids(selectors_of(entry.identity)) as stream:
            while (answer := await stream.next(within)) is not None:
                svids: list[Svid] = []
                try:
                    svids = take_svids(answer)
                    await self._take(target, one, svids)
                except AgentError as error:
                    # SPIRE tells when its entries change; beyond the back-off it is asked anew.
                    await self._fail(target, one, error)
                    within, silence = max(0.0, entry.due - time.time()), ""
                else:
                    within, silence = max(ASK_AGAIN, _late(entry) - time.time()), ""
                finally:
                    wipe_all(svid.key for svid in svids)
                    del answer, svids
        if silence:
            raise CaError(silence)

    async def _take(self, target: KeyTarget, one: _Followed, svids: Sequence[Svid]) -> None:
        """Raises CaError, or what the data plane raised; then it goes on with what it has."""
        entry = one.entry
        svid = choose(svids, entry.identity)
        now = datetime.fromtimestamp(time.time(), UTC)
        issued = check_svid(svid, entry.identity, self._roots, now)
        if issued == one.installed:
            if time.time() >= _late(entry):
                raise _not_renewed(entry)
            entry.succeed(entry.not_before, entry.not_after, entry.serial, time.time(), self._rng)
        else:
            async with self._installing:
                status = await target.install_certificate(
                    entry.identity, issued.chain, issued.roots, svid.key
                )
            if not status.not_after:
                raise CaError(f"{entry.identity}: the data plane didn't take the certificate")
            one.installed = issued
            self.fetched += 1
            entry.succeed(
                status.not_before, status.not_after, status.serial, time.time(), self._rng
            )
            log.info(
                "certificate installed",
                extra={"identity": entry.identity, "serial": status.serial},
            )

    async def _fail(self, target: KeyTarget, one: _Followed, error: Exception) -> None:
        """Those who wait in the data plane hear why. With a valid certificate nobody waits."""
        identity, now = one.entry.identity, time.time()
        text = str(error) or type(error).__name__
        self.failed += 1
        one.entry.fail(text, now, self._retry)
        log.warning("certificate failed", extra={"identity": identity, "error": text})
        if one.entry.valid(now):
            return
        try:
            await target.fail_certificate(identity, text)
        except Exception as lost:
            log.debug("failure not delivered", extra={"identity": identity, "error": lost})


def _not_renewed(entry: Entry) -> CaError:
    return CaError(
        f"{entry.identity}: SPIRE hasn't renewed the certificate, which is near its end; "
        "check that the SPIRE agent reaches its server"
    )


def _late(entry: Entry) -> float:
    return entry.not_before + LATE * (entry.not_after - entry.not_before)
