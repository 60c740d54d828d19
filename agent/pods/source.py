"""What every source of pods offers: who comes and goes, and what is wrong with its input."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from agent.errors import AgentError
from agent.pods.netns import PodNetns

# Of a source that must answer for each event: None once it is done, or why it isn't yet.
Outcome = asyncio.Future[AgentError | None]


@dataclass(frozen=True)
class Pod:
    """A pod of this node that belongs to the mesh."""

    uid: str
    name: str
    namespace: str
    service_account: str
    netns: PodNetns
    # Its DNS may be caught.
    dns_capture: bool = True
    # Where its own resolv.conf may be.
    resolv_conf: Path | None = None
    # Which the node's kubelet may reach past the mesh.
    probe_ports: tuple[int, ...] = ()
    # Of cgroup2, above its processes alone.
    cgroup: Path | None = None
    # ebpf or nftables; "": whatever the node takes.
    capture: str = ""
    # Interfaces of its namespace that others behind it send by: what comes in there is its own.
    virtual_interfaces: tuple[str, ...] = ()
    # Of the agent's own: what alone is reached there, over HBONE; nothing is redirected.
    only_ports: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """namespace/name, as people call it."""
        return f"{self.namespace}/{self.name}"

    def differs_only_in_settings(self, other: "Pod") -> bool:
        """Then one becomes the other without leaving the mesh."""
        same = replace(
            self,
            dns_capture=other.dns_capture,
            resolv_conf=other.resolv_conf,
            probe_ports=other.probe_ports,
            cgroup=other.cgroup,
            capture=other.capture,
            virtual_interfaces=other.virtual_interfaces,
        )
        return self != other and same == other


@dataclass(frozen=True)
class PodAdded:
    """New, or changed: the same uid with other contents replaces the former."""

    pod: Pod
    # Told when the data plane listens in it, or the first attempt failed.
    outcome: Outcome | None = field(default=None, compare=False)


@dataclass(frozen=True)
class PodRemoved:
    uid: str
    # Told when nothing of the pod is left.
    outcome: Outcome | None = field(default=None, compare=False)


@dataclass(frozen=True)
class PodKept:
    """It exists, but nobody has its namespace any more: what the data plane has of it stays."""

    uid: str


@dataclass(frozen=True)
class PodsSynced:
    """The first list is complete: pods that weren't named by now are gone."""


PodEvent = PodAdded | PodRemoved | PodKept | PodsSynced


class PodSource(Protocol):
    @property
    def name(self) -> str:
        """As in `--pods`, for example `file:/etc/pods.yaml`."""

    @property
    def after_sync(self) -> bool:
        """It is asked only once the data plane knows the mesh."""

    @property
    def connected(self) -> bool:
        """What it tells now is current."""

    @property
    def remedy(self) -> str:
        """What an operator does about `problems`."""

    def events(self) -> AsyncIterator[PodEvent]:
        """For one consumer, for ever. Failures of the source are `problems`, not the end."""

    def problems(self) -> tuple[str, ...]:
        """What an operator must repair in the source, now."""
