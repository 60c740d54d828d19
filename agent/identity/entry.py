"""One identity and when it is to be fetched next: decisions only, no I/O.

All times are seconds since the epoch, as the caller's clock tells them.
"""

import enum
import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from agent.identity.status import IdentityState, IdentityStatus
from agent.xds.backoff import Backoff

# facts ztunnel 8.3, with the cap counting for a single wait
RETRY = Backoff(start=timedelta(seconds=1), cap=timedelta(seconds=150), factor=2.0, jitter=0.2)
# A connection that wants a certificate may shorten a wait, but no more often than this.
ASK_AGAIN = 1.0
# Certificates issued together are not to be renewed together.
RENEWAL_JITTER = 0.1


class Priority(enum.IntEnum):
    """Who goes first when more is due than may be in flight."""

    CONNECTION = 0
    PREFETCH = 1
    RENEWAL = 2


def renewal_time(not_before: float, not_after: float, rng: random.Random) -> float:
    """Half of the life time, give or take a tenth of that half."""
    half = (not_after - not_before) / 2
    return not_before + half * rng.uniform(1 - RENEWAL_JITTER, 1 + RENEWAL_JITTER)


@dataclass
class Entry:
    """Mutable; changed only by the manager, through these methods."""

    identity: str
    priority: Priority
    # When it may be tried next.
    due: float
    not_before: float = 0.0
    not_after: float = 0.0
    serial: str = ""
    error: str = ""
    failures: int = 0
    started: float = float("-inf")
    fetching: bool = False
    # A renewal was asked for while an attempt was under way, whose answer may be older.
    again: bool = False

    def ask(self, priority: Priority, now: float) -> None:
        """Somebody wants it. A connection may cut a back-off short; a prefetch may not.

        Who asks while there is a valid one asked before it was installed.
        """
        if self.fetching or self.valid(now):
            return
        if priority is Priority.CONNECTION:
            self.priority = priority
            self.due = min(self.due, max(now, self.started + ASK_AGAIN))
        elif not self.failures:
            self.priority = min(self.priority, priority)
            self.due = min(self.due, now)

    def renew(self, due: float, now: float) -> None:
        """Earlier than planned. One that fails backs off as before."""
        if self.fetching:
            self.again = True
        elif self.valid(now) and not self.failures:
            self.due = min(self.due, due)

    def start(self, now: float) -> None:
        self.started = now
        self.fetching = True

    def heed_clock(self, now: float) -> None:
        """A clock that was set back: what was put off by the old one would wait for as long."""
        if self.started > now + ASK_AGAIN:
            self.started = now
            if not self.fetching:
                self.due = now

    def interrupt(self, now: float) -> None:
        """The attempt's data plane is gone, and with it the key: try again, it was no failure."""
        if self.fetching:
            self.fetching = False
            self.due = now

    def forget_certificate(self, now: float) -> None:
        """The data plane that held it is gone."""
        self.not_before = self.not_after = 0.0
        self.serial = ""
        self.failures = 0
        if self.priority is Priority.RENEWAL:
            self.priority = Priority.PREFETCH
        self.due = now

    def succeed(
        self, not_before: float, not_after: float, serial: str, now: float, rng: random.Random
    ) -> None:
        """Installed, or found installed: renew at half life."""
        self.fetching = False
        self.not_before, self.not_after, self.serial = not_before, not_after, serial
        self.error = ""
        self.failures = 0
        self.priority = Priority.RENEWAL
        self.due = max(renewal_time(not_before, not_after, rng), self.started + ASK_AGAIN)
        if self.again:
            self.again = False
            self.due = now + ASK_AGAIN
        if not self.valid(now):
            self.priority = Priority.PREFETCH
            self.due = now

    def fail(self, text: str, now: float, retry: Backoff) -> None:
        """Back off, but try once more before a certificate that still serves runs out."""
        self.fetching = False
        self.error = text
        self.failures += 1
        self.due = now + retry.delay(self.failures).total_seconds()
        if self.valid(now):
            self.priority = Priority.RENEWAL
            self.due = max(min(self.due, self.not_after), now + ASK_AGAIN)
        else:
            self.priority = Priority.PREFETCH

    def valid(self, now: float) -> bool:
        return self.not_before <= now < self.not_after

    def status(self, now: float) -> IdentityStatus:
        if self.valid(now):
            state = IdentityState.AVAILABLE
        else:
            state = IdentityState.UNAVAILABLE if self.error else IdentityState.INITIALIZING
        return IdentityStatus(
            identity=self.identity,
            state=state,
            not_before=_moment(self.not_before),
            not_after=_moment(self.not_after),
            serial=self.serial,
            last_error=self.error,
            next_attempt=None if self.fetching else _moment(self.due),
        )


def _moment(seconds: float) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None
