"""What every source of pods offers: who comes and goes, and what is wrong with its input."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from agent.pods.netns import NetnsPath


@dataclass(frozen=True)
class Pod:
    """A pod of this node that belongs to the mesh."""

    uid: str
    name: str
    namespace: str
    service_account: str
    netns: NetnsPath

    @property
    def key(self) -> str:
        """namespace/name, as people call it."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class PodAdded:
    """New, or changed: the same uid with other contents replaces the former."""

    pod: Pod


@dataclass(frozen=True)
class PodRemoved:
    uid: str


@dataclass(frozen=True)
class PodsSynced:
    """The first list is complete: pods that weren't named by now are gone."""


PodEvent = PodAdded | PodRemoved | PodsSynced


class PodSource(Protocol):
    @property
    def name(self) -> str:
        """As in `--pods`, for example `file:/etc/pods.yaml`."""

    def events(self) -> AsyncIterator[PodEvent]:
        """For one consumer, for ever. Failures of the source are `problems`, not the end."""

    def problems(self) -> tuple[str, ...]:
        """What an operator must repair in the source, now."""
