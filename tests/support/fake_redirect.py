"""Capture without a kernel: remembers what would be installed where, and fails on demand."""

from collections import Counter
from typing import TYPE_CHECKING

from redirect.base import (
    CaptureConfig,
    Datagrams,
    Installed,
    InstalledRule,
    Probe,
    RedirectError,
    Target,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class FakeRedirect:
    exempts_by_rule = True

    def __init__(self, name: str = "fake") -> None:
        self.name = name
        # uids whose open connections need what was left.
        self.busy: set[str] = set()
        self.config = CaptureConfig()
        # uid -> the configuration its rules were made from.
        self.installed: dict[str, CaptureConfig] = {}
        # uid -> whether its DNS is redirected.
        self.dns: dict[str, bool] = {}
        # Told of every install.
        self.heard: Callable[[str], None] = lambda _: None
        self.calls: Counter[str] = Counter()
        # uid -> errors for the next calls of install, first one first.
        self.install_faults: dict[str, list[RedirectError]] = {}
        # uids whose rules never read back as they should.
        self.unverifiable: set[str] = set()
        # uids of pods whose open connections alone are served.
        self.released: set[str] = set()
        # uid -> what its counters say.
        self.counted: dict[str, Datagrams] = {}
        # Errors for the next calls of release and of remove.
        self.release_faults: list[RedirectError] = []
        self.remove_faults: list[RedirectError] = []

    async def probe(self) -> Probe:
        return Probe(usable=True)

    async def install(self, target: Target) -> None:
        self.calls["install"] += 1
        if faults := self.install_faults.get(target.uid):
            raise faults.pop(0)
        self.installed[target.uid] = self.config
        self.released.discard(target.uid)
        self.dns[target.uid] = target.dns
        self.heard("install")

    async def verify(self, target: Target) -> tuple[str, ...]:
        self.calls["verify"] += 1
        if target.uid in self.unverifiable:
            return ("a rule isn't there",)
        found = (self.installed.get(target.uid), self.dns.get(target.uid, True))
        if found != (self.config, target.dns):
            return ("the table is missing or stale",)
        return ()

    async def release(self, target: Target) -> None:
        self.calls["release"] += 1
        if self.release_faults:
            raise self.release_faults.pop(0)
        self.installed.pop(target.uid, None)
        self.released.add(target.uid)

    async def idle(self, target: Target) -> bool:
        return target.uid not in self.busy

    async def remove(self, target: Target) -> None:
        self.calls["remove"] += 1
        if self.remove_faults:
            raise self.remove_faults.pop(0)
        self.installed.pop(target.uid, None)
        self.released.discard(target.uid)

    async def list(self, target: Target) -> Installed:
        rules = (InstalledRule("output", "outbound", 0, 0),) if target.uid in self.installed else ()
        return Installed(rules=rules)

    async def datagrams(self, target: Target) -> Datagrams:
        return self.counted.get(target.uid, Datagrams())

    def reconfigure(self, config: CaptureConfig) -> None:
        self.config = config

    async def close(self) -> None:
        pass
