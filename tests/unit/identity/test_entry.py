"""When a certificate is fetched next."""

import random
from datetime import timedelta

from agent.identity.entry import Entry, Priority, renewal_time
from agent.identity.status import IdentityState
from agent.xds.backoff import Backoff

PLAIN = Backoff(start=timedelta(seconds=1), cap=timedelta(seconds=150), jitter=0)
HOUR = 3600.0


def installed(now: float = 0.0, life: float = HOUR) -> Entry:
    entry = Entry("spiffe://a/ns/b/sa/c", Priority.PREFETCH, now)
    entry.start(now)
    entry.succeed(now, now + life, "1", now, random.Random(1))
    return entry


def test_renewal_lies_around_half_life() -> None:
    rng = random.Random(7)
    times = [renewal_time(1000, 1000 + 86400, rng) for _ in range(500)]
    assert min(times) >= 1000 + 0.45 * 86400
    assert max(times) <= 1000 + 0.55 * 86400
    assert max(times) - min(times) > 0.08 * 86400


def test_failures_without_a_certificate_back_off() -> None:
    entry = Entry("x", Priority.PREFETCH, 0)
    waits = []
    for _ in range(10):
        now = entry.due
        entry.start(now)
        entry.fail("no", now, PLAIN)
        waits.append(entry.due - now)
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 150, 150]
    assert entry.status(entry.due).state is IdentityState.UNAVAILABLE


def test_failed_renewal_is_tried_again_before_expiry_at_the_latest() -> None:
    entry = installed()
    entry.failures = 9
    now = HOUR - 60
    entry.start(now)
    entry.fail("no", now, PLAIN)
    assert entry.due == HOUR
    assert entry.priority is Priority.RENEWAL
    assert entry.status(now).state is IdentityState.AVAILABLE
    assert entry.status(HOUR).state is IdentityState.UNAVAILABLE


def test_prefetch_does_not_shorten_a_back_off_but_a_connection_does() -> None:
    entry = Entry("x", Priority.PREFETCH, 0)
    entry.start(100)
    entry.fail("no", 100.1, Backoff(start=timedelta(seconds=60), jitter=0, cap=timedelta(hours=1)))
    entry.ask(Priority.PREFETCH, 100.2)
    assert entry.due == 160.1
    entry.ask(Priority.CONNECTION, 100.2)
    assert entry.due == 101
    assert entry.priority is Priority.CONNECTION


def test_priority_only_rises_while_it_waits() -> None:
    entry = Entry("x", Priority.CONNECTION, 0)
    entry.ask(Priority.PREFETCH, 1)
    assert entry.priority is Priority.CONNECTION


def test_asking_for_what_is_installed_changes_nothing() -> None:
    entry = installed()
    due = entry.due
    entry.ask(Priority.CONNECTION, 10)
    assert (entry.due, entry.priority) == (due, Priority.RENEWAL)


def test_expired_certificate_is_asked_for_at_once() -> None:
    entry = installed()
    entry.ask(Priority.CONNECTION, HOUR + 10)
    assert entry.due <= HOUR + 10


def test_success_clears_failures() -> None:
    entry = Entry("x", Priority.PREFETCH, 0)
    entry.start(0)
    entry.fail("no", 0, PLAIN)
    entry.start(1)
    entry.succeed(0, HOUR, "2", 1, random.Random(1))
    assert (entry.error, entry.failures) == ("", 0)
    assert 0.45 * HOUR <= entry.due <= 0.55 * HOUR


def test_certificate_lost_with_its_data_plane_is_due_at_once() -> None:
    entry = installed()
    entry.forget_certificate(50)
    assert entry.due == 50
    assert entry.priority is Priority.PREFETCH
    assert entry.status(50).state is IdentityState.INITIALIZING
    assert entry.status(50).serial == ""


def test_what_a_wrong_clock_put_off_is_due_when_it_was_set_back() -> None:
    entry = installed()
    month = 30 * 24 * HOUR
    entry.start(month)
    entry.fail("expired", month, PLAIN)
    entry.heed_clock(month + 1)
    assert entry.due > month
    entry.heed_clock(60)
    assert entry.due == 60
    well = installed(now=100)
    due = well.due
    # As time servers do all the time.
    well.heed_clock(99.9)
    assert well.due == due
