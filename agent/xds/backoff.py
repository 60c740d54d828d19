"""Waiting times between attempts: exponential, capped, spread by jitter."""

import random
from dataclasses import dataclass, field
from datetime import timedelta


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """How long to wait after the n-th failure in a row. Holds no state itself."""

    # First wait of facts ztunnel 7.7: short, because most losses are a control plane's restart
    # behind a load balancer that has another instance ready.
    start: timedelta = timedelta(milliseconds=20)
    cap: timedelta = timedelta(seconds=15)
    factor: float = 2.0
    # Upstream has none; without it all nodes come back in the same millisecond.
    jitter: float = 0.2
    rng: random.Random = field(default_factory=random.Random, compare=False, repr=False)

    def delay(self, failures: int) -> timedelta:
        """The wait after `failures` (1, 2, …) failures in a row, never above the cap."""
        # In floats and with a bound on the exponent: an agent may fail for months.
        cap = self.cap.total_seconds()
        plain = self.start.total_seconds() * self.factor ** min(max(failures, 1) - 1, 64)
        spread = min(plain, cap) * self.rng.uniform(1 - self.jitter, 1 + self.jitter)
        return timedelta(seconds=min(spread, cap))
