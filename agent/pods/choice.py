"""Which source of pods is meant: `file:PATH`, `zds[:PATH]` or `self:NAMESPACE/NAME/ACCOUNT`."""

import re
from dataclasses import dataclass
from pathlib import Path

from agent.errors import Mistake

# facts ztunnel 14, INPOD_UDS
ZDS_SOCKET = Path("/var/run/ztunnel/ztunnel.sock")
WAYS = "write file:PATH, zds[:PATH] or self:NAMESPACE/NAME/ACCOUNT"

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


@dataclass(frozen=True)
class OwnWorkload:
    """The one workload whose network namespace is the agent's own (facts ztunnel 1.5)."""

    namespace: str
    name: str
    service_account: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}/{self.service_account}"


@dataclass(frozen=True)
class PodSourceChoice:
    """`path` of `file` and `zds`, `workload` of `self`."""

    kind: str
    path: Path = Path()
    workload: OwnWorkload | None = None

    @property
    def redirected_elsewhere(self) -> bool:
        """Somebody else leads traffic to the listeners, unless the operator says otherwise."""
        return self.kind != "file"


def pod_source(value: object) -> PodSourceChoice:
    """Raises Mistake."""
    kind, colon, argument = str(value).strip().partition(":")
    if kind == "zds":
        return PodSourceChoice(kind, Path(argument).absolute() if argument else ZDS_SOCKET)
    if kind not in ("file", "self"):
        raise Mistake(f"unknown pod source {kind!r}; {WAYS}")
    if not colon or not argument:
        raise Mistake(f"names no {'path' if kind == 'file' else 'workload'}; {WAYS}")
    if kind == "file":
        return PodSourceChoice(kind, Path(argument).absolute())
    return PodSourceChoice(kind, workload=own_workload(argument))


def own_workload(text: str) -> OwnWorkload:
    """`namespace/name/serviceaccount`, in upstream's order. Raises Mistake."""
    parts = text.split("/")
    if len(parts) != 3 or not all(map(_NAME.fullmatch, parts)):
        raise Mistake("not a workload; write NAMESPACE/NAME/ACCOUNT")
    return OwnWorkload(*parts)
