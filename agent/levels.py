"""Log levels of both processes, changed while they run. Nothing of it outlives the agent."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from agent import logs
from agent.errors import BadLogFilter
from agent.slices import Log
from agent.supervisor import Supervisor


@dataclass(frozen=True)
class LevelsView:
    # Directives in force: `LEVEL` or `target=LEVEL`, comma-separated.
    filter: str
    # What `reset` returns to.
    configured: str
    # False: none serves now; the next one will start with these levels.
    dataplane: bool


class Levels:
    """State: `_filter`, the directives in force."""

    def __init__(self, config: Log, supervisor: Supervisor) -> None:
        self._config = config
        self._supervisor = supervisor
        self._filter = config.filter

    def view(self) -> LevelsView:
        return LevelsView(self._filter, self._config.filter, self._supervisor.serving)

    async def change(self, directives: str) -> LevelsView:
        """Adds to what is in force; a directive replaces the former one of its target. Raises
        BadLogFilter and DataplaneError, and then nothing has changed in either process."""
        return await self._take(merged(self._filter, directives))

    async def reset(self, directives: str = "") -> LevelsView:
        """Back to the configured levels, plus these directives if any. Raises as `change`."""
        wanted = self._config.filter
        return await self._take(merged(wanted, directives) if directives else wanted)

    async def _take(self, wanted: str) -> LevelsView:
        # It may refuse; we don't.
        await self._supervisor.set_log_filter(wanted)
        logs.setup(dataclasses.replace(self._config, filter=wanted))
        self._filter = wanted
        return self.view()


def merged(before: str, directives: str) -> str:
    """Raises BadLogFilter naming the directive that can't be read."""
    added = _split(directives, strict=True)
    if not added:
        raise BadLogFilter("no directive; write LEVEL or target=LEVEL")
    # A filter of the configuration may hold what only the data plane understands.
    found = {**_split(before, strict=False), **added}
    return ",".join(f"{target}={level}" if target else level for target, level in found.items())


def _split(text: str, *, strict: bool) -> Mapping[str, str]:
    """Level by target; "" stands for everything."""
    found = {}
    for directive in filter(None, (piece.strip() for piece in text.split(","))):
        target, equals, level = directive.rpartition("=")
        if strict and (level.lower() not in logs.LEVELS or bool(target) != bool(equals)):
            raise BadLogFilter(
                f"{directive!r} is no directive; write LEVEL or target=LEVEL, with one of"
                f" {', '.join(logs.LEVELS)}"
            )
        found[target.strip()] = level.lower() if level.lower() in logs.LEVELS else level
    return found
