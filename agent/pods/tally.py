"""What the mesh didn't carry of one pod, from counters that start anew with its capture."""

from dataclasses import dataclass, field

from redirect.base import Datagrams


@dataclass
class Tally:
    """State: `total`, since the pod's capture as far as it was seen; `_last` as it was read."""

    total: Datagrams = field(default_factory=Datagrams)
    _last: Datagrams | None = None

    def begin(self) -> None:
        """The counters start from zero now."""
        self._last = Datagrams()

    def read(self, found: Datagrams) -> Datagrams:
        """Takes what the counters say, and returns what came since this agent looks."""
        last = self._last
        grown = found if last is None else _grown(found, last)
        self.total = self.total + grown
        self._last = found
        # What an agent before this one counted isn't this one's.
        return Datagrams() if last is None else grown


def _grown(found: Datagrams, last: Datagrams) -> Datagrams:
    """A counter that fell was made anew."""
    return Datagrams(_more(found.refused, last.refused), _more(found.unprotected, last.unprotected))


def _more(found: int, last: int) -> int:
    return found - last if found >= last else found
