"""What the tracer needs of the node: its pods, the data plane's cgroups, ports."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from agent.trace.pods import Traced, traced
from redirect.base import Ports


@dataclass(frozen=True)
class Choice:
    """Which pods; both None: all of the node."""

    uid: str | None = None
    namespace: str | None = None


@dataclass
class Node:
    """State: what `refresh` found last, replaced whole by the one who calls it."""

    # The answer to /v1/<section>; raises ClickException.
    ask: Callable[[str], Any]
    choice: Choice
    pods: Mapping[int, Traced] = field(default_factory=dict)
    ports: Ports = field(default_factory=lambda: Ports(dns=15053))
    # What a socket connects to isn't what its application asked for: eBPF.
    rewrites: bool = False
    # Of capture by eBPF; None: there is none.
    pins: Path | None = None
    _cgroups: frozenset[int] = frozenset()

    def refresh(self) -> None:
        """Raises what `ask` raises. Not for the event loop's thread: it waits."""
        pods, status = self.ask("pods"), self.ask("status")
        self.pods = traced(pods, status.get("pid"), self.choice.uid, self.choice.namespace)
        capture = status.get("capture", {})
        self.rewrites = capture.get("mode") == "ebpf"
        self.pins = Path(capture["pins"]) if capture.get("pins") else None
        self._cgroups = frozenset(_cgroups(status["dataplane"]["cgroup"]))

    def learn_ports(self) -> None:
        """From the agent; without it the usual ones stay. Waits, like `refresh`."""
        try:
            config = self.ask("dump/config")
        except click.ClickException:
            return
        self.ports = _ports(config)

    def dialled(self) -> Mapping[tuple[str, int], str]:
        """What live connections of pods asked for, by uid and the client's port, where that is
        clear; {} when nobody tells. Waits, like `refresh`."""
        try:
            rows = self.ask("connections")
        except click.ClickException:
            return {}
        found: dict[tuple[str, int], set[str]] = {}
        for row in rows:
            if row["direction"] == "outbound" and row["original_dst"]:
                key = (row["pod_uid"], int(row["src"].rpartition(":")[2]))
                found.setdefault(key, set()).add(row["original_dst"])
        return {key: wanted.pop() for key, wanted in found.items() if len(wanted) == 1}

    def is_own(self, cgroup: int) -> bool:
        """The number of a cgroup of this node's data planes."""
        return cgroup in self._cgroups


def _cgroups(leaf: str) -> Iterator[int]:
    """A successor and those that drain have leaves side by side."""
    if not leaf:
        return
    try:
        yield os.stat(leaf).st_ino
        for folder in Path(leaf).parent.iterdir():
            if folder.is_dir():
                yield folder.stat().st_ino
    except OSError:
        return


def _ports(config: Mapping[str, Any]) -> Ports:
    def port(name: str) -> int:
        return int(str(config[name]).rpartition(":")[2])

    return Ports(
        port("outboundAddr"),
        port("inboundPlaintextAddr"),
        port("inboundAddr"),
        config["dnsProxyAddr"]["Localhost"][1],
    )
