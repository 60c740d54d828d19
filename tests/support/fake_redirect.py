"""Capture without a kernel: remembers what would be installed where, and fails on demand."""

from collections import Counter

from redirect.base import CaptureConfig, Installed, InstalledRule, Probe, RedirectError, Target


class FakeRedirect:
    name = "fake"

    def __init__(self) -> None:
        self.config = CaptureConfig()
        # uid -> the configuration its rules were made from.
        self.installed: dict[str, CaptureConfig] = {}
        self.calls: Counter[str] = Counter()
        # uid -> errors for the next calls of install, first one first.
        self.install_faults: dict[str, list[RedirectError]] = {}
        # uids whose rules never read back as they should.
        self.unverifiable: set[str] = set()
        # Errors for the next calls of remove.
        self.remove_faults: list[RedirectError] = []

    async def probe(self) -> Probe:
        return Probe(usable=True)

    async def install(self, target: Target) -> None:
        self.calls["install"] += 1
        if faults := self.install_faults.get(target.uid):
            raise faults.pop(0)
        self.installed[target.uid] = self.config

    async def verify(self, target: Target) -> tuple[str, ...]:
        self.calls["verify"] += 1
        if target.uid in self.unverifiable:
            return ("a rule isn't there",)
        if self.installed.get(target.uid) != self.config:
            return ("the table is missing or stale",)
        return ()

    async def remove(self, target: Target) -> None:
        self.calls["remove"] += 1
        if self.remove_faults:
            raise self.remove_faults.pop(0)
        self.installed.pop(target.uid, None)

    async def list(self, target: Target) -> Installed:
        rules = (InstalledRule("output", "outbound", 0, 0),) if target.uid in self.installed else ()
        return Installed(rules=rules)

    def reconfigure(self, config: CaptureConfig) -> None:
        self.config = config

    async def close(self) -> None:
        pass
