"""The ways in which this agent can capture: which one a pod wants, and those that it may have been
captured by before."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from agent.pods.source import Pod
from redirect.base import CaptureConfig, Redirect


@dataclass(frozen=True)
class Captures:
    """Without a `default` nobody is captured by us."""

    default: Redirect | None = None
    # Beside it, for pods that ask for another way or come from one.
    others: tuple[Redirect, ...] = ()
    # Why a way that a pod may ask for can't be had, by its name.
    missing: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Redirect]:
        if self.default is not None:
            yield self.default
            yield from self.others

    def __bool__(self) -> bool:
        return self.default is not None

    def named(self, name: str) -> Redirect | None:
        return next((one for one in self if one.name == name), None)

    def wanted(self, pod: Pod) -> Redirect | None:
        """What can't be had is replaced by the default: bare would be worse."""
        if pod.only_ports:
            return None
        # No hook of sockets sees what others send through the pod (design section 4).
        way = "nftables" if pod.virtual_interfaces else pod.capture
        return self.named(way) or self.default

    def note(self, pod: Pod) -> str:
        """Why a pod isn't captured the way that it asks for; "" when it is."""
        way = "nftables" if pod.virtual_interfaces else pod.capture
        if not way or self.default is None or self.named(way) is not None:
            return ""
        why = self.missing.get(way, "it isn't set up on this node")
        text = f"captured by {self.default.name}, not {way}: {why}"
        if pod.virtual_interfaces:
            names = ", ".join(pod.virtual_interfaces)
            return f"what comes in by {names} goes past the mesh; {text}"
        return text

    def reconfigure(self, config: CaptureConfig) -> None:
        for redirect in self:
            redirect.reconfigure(config)
