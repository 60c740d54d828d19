"""Roots that the CA's answers brought, and how long those count that newer answers leave out.

Decisions only, no I/O. All times are seconds since the epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# A CA that hands out more than this has a defect; the data plane takes no more either.
MOST = 64


@dataclass
class KnownRoots:
    """`retiring` maps a root (PEM) to when it ends; None while answers hold it."""

    overlap: float
    retiring: dict[str, float | None] = field(default_factory=dict)

    def answered(self, roots: Sequence[str], now: float) -> bool:
        """An answer's roots. True when they are others than before: a rotation is under way.

        CAs that don't agree yet may take turns: a root that comes back stays, and nothing is new.
        """
        first = not self.retiring
        changed = False
        for root in roots[:MOST]:
            changed |= root not in self.retiring
            self.retiring[root] = None
        for root, end in self.retiring.items():
            if end is None and root not in roots:
                self.retiring[root] = now + self.overlap
                changed = True
        self._forget_oldest()
        return changed and not first

    def expire(self, now: float) -> bool:
        """Forgets roots whose time is over. True when there were any.

        A clock that was set back doesn't prolong the overlap by as much.
        """
        for root, end in self.retiring.items():
            if end is not None:
                self.retiring[root] = min(end, now + self.overlap)
        over = [root for root, end in self.retiring.items() if end is not None and end <= now]
        for root in over:
            del self.retiring[root]
        return bool(over)

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(sorted(self.retiring))

    @property
    def next_end(self) -> float | None:
        return min((end for end in self.retiring.values() if end is not None), default=None)

    def load(self, saved: Mapping[object, object]) -> None:
        """What an agent before this one knew; what isn't of the right form is left out."""
        for root, end in saved.items():
            if isinstance(root, str) and (end is None or isinstance(end, int | float)):
                self.retiring[root] = end

    def _forget_oldest(self) -> None:
        old = [(end, root) for root, end in self.retiring.items() if end is not None]
        for _, root in sorted(old)[: max(0, len(self.retiring) - MOST)]:
            del self.retiring[root]
