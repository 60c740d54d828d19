"""Waits between attempts."""

import random
from datetime import timedelta

from agent.xds.backoff import Backoff


def test_waits_double_up_to_the_cap() -> None:
    plain = Backoff(jitter=0)
    milliseconds = [plain.delay(n) / timedelta(milliseconds=1) for n in (1, 2, 3, 10, 11, 10_000)]
    assert milliseconds == [20, 40, 80, 10_240, 15_000, 15_000]


def test_jitter_spreads_but_never_beyond_its_share_or_the_cap() -> None:
    spread = Backoff(rng=random.Random(1))
    waits = {spread.delay(1) for _ in range(200)}
    assert len(waits) > 100
    assert min(waits) >= timedelta(milliseconds=16)
    assert max(waits) <= timedelta(milliseconds=24)
    assert max(spread.delay(50) for _ in range(200)) <= timedelta(seconds=15)
