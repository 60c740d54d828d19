"""Keeps the data plane supplied with certificates for the identities of its pods.

One fetch is: CSR from the data plane, signature from the CA, check, install. Who is fetched when
is decided in `entry`.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol

from agent.identity.answer import check_answer, check_identity
from agent.identity.ca import CaClient, CaConfig, CaError
from agent.identity.entry import RETRY, Entry, Priority
from agent.identity.status import IdentityStatus
from agent.identity.supply import IN_FLIGHT, ROTATION_SPREAD, RootKeeper, SupplyTrouble
from agent.xds.backoff import Backoff
from proto.gen import control_pb2

# The clock may be set; due times are looked at again at least this often.
LOOK_AGAIN = 30.0

log = logging.getLogger("underpass.identity")


class CertificateTarget(Protocol):
    """The data plane, as the keeper of keys and certificates."""

    async def new_csr(self, identity: str) -> str: ...

    async def install_certificate(
        self, identity: str, chain: Sequence[str], roots: Sequence[str]
    ) -> control_pb2.CertificateStatus: ...

    async def fail_certificate(self, identity: str, text: str) -> None: ...


class IdentityManager:
    """Call `attach`, `detach`, `wanted` and `forgotten` from the loop that `run` runs in."""

    remedy = "check the certificate authority, its token, and what it may ask for"

    def __init__(
        self,
        config: CaConfig,
        trust_domain: str,
        *,
        retry: Backoff = RETRY,
        roots: RootKeeper | None = None,
        spread: float = ROTATION_SPREAD,
        aliases: Sequence[str] = (),
    ) -> None:
        self._aliases = aliases
        self._trust_domain = trust_domain
        self._roots = roots
        self._spread = spread
        # Attempts since the start, for metrics.
        self.fetched = 0
        self.failed = 0
        self._ca = CaClient(config)
        self._retry = retry
        self._rng = random.Random()
        self._target: CertificateTarget | None = None
        self._entries: dict[str, Entry] = {}
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    def attach(
        self, target: CertificateTarget, certificates: Sequence[control_pb2.CertificateStatus]
    ) -> None:
        """A (new) data plane and what it holds; whatever it lacks is fetched anew for it."""
        self.detach()
        self._target = target
        now = time.time()
        held = {entry.identity: entry for entry in certificates}
        for identity in held.keys() - self._entries.keys():
            self._entries[identity] = Entry(identity, Priority.PREFETCH, now)
        for identity, entry in self._entries.items():
            found = held.get(identity)
            if found is None or not found.not_after:
                entry.forget_certificate(now)
            elif found.serial != entry.serial:
                entry.succeed(found.not_before, found.not_after, found.serial, now, self._rng)
        self._changed.set()

    def detach(self) -> None:
        """The data plane is gone; attempts for it end, nothing new starts."""
        self._target = None
        for identity in list(self._fetches):
            self._interrupt(identity)

    def wanted(self, identity: str, *, connection: bool) -> None:
        """The data plane lacks this certificate; `connection` when somebody waits for it."""
        now = time.time()
        priority = Priority.CONNECTION if connection else Priority.PREFETCH
        if identity in self._entries:
            self._entries[identity].ask(priority, now)
        else:
            self._entries[identity] = Entry(identity, priority, now)
        self._changed.set()

    def forgotten(self, identity: str) -> None:
        """No pod here has this identity any more."""
        self._interrupt(identity)
        self._entries.pop(identity, None)

    def status(self) -> list[IdentityStatus]:
        now = time.time()
        return [self._entries[identity].status(now) for identity in sorted(self._entries)]

    def trouble(self) -> SupplyTrouble | None:
        """Each identity has its own: they are asked for one by one."""
        return None

    async def run(self) -> None:
        """Fetches what is due, for ever. Ends only by cancellation."""
        try:
            while True:
                self._changed.clear()
                self._start_due()
                # Not wait_for: before Python 3.12 it may swallow a cancellation.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._pause()):
                        await self._changed.wait()
        finally:
            running = list(self._fetches.values())
            self.detach()
            await asyncio.gather(*running, return_exceptions=True)
            await self._ca.close()

    def _start_due(self) -> None:
        if self._target is None:
            return
        now = time.time()
        for entry in self._entries.values():
            entry.heed_clock(now)
        due = [entry for entry in self._entries.values() if not entry.fetching and entry.due <= now]
        due.sort(key=lambda entry: (entry.priority, entry.due))
        for entry in due[: IN_FLIGHT - len(self._fetches)]:
            entry.start(now)
            task = asyncio.create_task(self._fetch(self._target, entry))
            self._fetches[entry.identity] = task

    def _pause(self) -> float:
        """Seconds until something is due; a finished fetch wakes the loop by itself."""
        if self._target is None or len(self._fetches) >= IN_FLIGHT:
            return LOOK_AGAIN
        now = time.time()
        waits = [entry.due - now for entry in self._entries.values() if not entry.fetching]
        return max(min([LOOK_AGAIN, *waits]), 0.0)

    def _interrupt(self, identity: str) -> None:
        task = self._fetches.pop(identity, None)
        if task is not None:
            task.cancel()
            self._entries[identity].interrupt(time.time())

    async def _fetch(self, target: CertificateTarget, entry: Entry) -> None:
        """One attempt, and what follows from its end."""
        identity = entry.identity
        try:
            installed = await self._obtain(target, identity)
        except Exception as error:
            if not self._ended(identity):
                return
            text = str(error) or type(error).__name__
            self.failed += 1
            entry.fail(text, time.time(), self._retry)
            log.warning("certificate failed", extra={"identity": identity, "error": text})
            await _tell(target, identity, text)
        else:
            if not self._ended(identity):
                return
            now = time.time()
            self.fetched += 1
            entry.succeed(
                installed.not_before, installed.not_after, installed.serial, now, self._rng
            )
            log.info(
                "certificate installed", extra={"identity": identity, "serial": installed.serial}
            )

    def _ended(self, identity: str) -> bool:
        """Takes the running attempt out of the fetches. False: it was interrupted meanwhile."""
        if self._fetches.get(identity) is not asyncio.current_task():
            return False
        del self._fetches[identity]
        self._changed.set()
        return True

    def _renew_others(self, identity: str) -> None:
        """Roots rotate: what was proved by old ones is proved anew, all of it and soon."""
        now = time.time()
        for entry in self._entries.values():
            if entry.identity != identity:
                entry.renew(now + self._rng.uniform(0, self._spread), now)
        self._changed.set()

    async def _obtain(
        self, target: CertificateTarget, identity: str
    ) -> control_pb2.CertificateStatus:
        """Raises CaError, or what the data plane raised."""
        check_identity(identity, self._trust_domain, self._aliases)
        csr = await target.new_csr(identity)
        answer = await self._ca.create(csr, identity)
        now = datetime.fromtimestamp(time.time(), UTC)
        issued = check_answer(answer, identity, now)
        if self._roots is not None and await self._roots.answered(issued.roots):
            self._renew_others(identity)
        status = await target.install_certificate(identity, issued.chain, issued.roots)
        if not status.not_after:
            raise CaError(f"{identity}: the data plane didn't take the certificate")
        return status


async def _tell(target: CertificateTarget, identity: str, text: str) -> None:
    """Wakes those who wait in the data plane; if it is gone, so are they."""
    try:
        await target.fail_certificate(identity, text)
    except Exception as error:
        log.debug("failure not delivered", extra={"identity": identity, "error": error})
