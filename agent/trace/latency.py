"""How long connections took to be made: bounded counts of them, for percentiles and a picture."""

import math
from collections import Counter
from dataclasses import dataclass, field

# Four buckets to each doubling: a percentile is off by a fifth at most.
_STEPS = 4


@dataclass
class Latencies:
    """Of one kind of connections."""

    count: int = 0
    longest_us: int = 0
    _buckets: Counter[int] = field(default_factory=Counter)

    def add(self, microseconds: int) -> None:
        self.count += 1
        self.longest_us = max(self.longest_us, microseconds)
        self._buckets[_bucket(microseconds)] += 1

    def percentile(self, part: float) -> int:
        """Microseconds that this part of them didn't exceed; 0 when there are none."""
        wanted, seen = part * self.count, 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= wanted:
                return min(round(2 ** ((bucket + 1) / _STEPS)), self.longest_us)
        return self.longest_us

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, count) in doublings of a microsecond, empty ones between others too."""
        found: Counter[int] = Counter()
        for bucket, count in self._buckets.items():
            found[bucket // _STEPS] += count
        if not found:
            return []
        every = range(min(found), max(found) + 1)
        return [(2**step if step else 0, 2 ** (step + 1) - 1, found[step]) for step in every]


def _bucket(microseconds: int) -> int:
    return int(_STEPS * math.log2(max(1, microseconds)))
