"""What a capture back end offers to the agent. Says nothing about how packets are caught."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from pathlib import Path

# Sources that a host-level rule of upstream's node agent gives to kubelet probes
# (facts istio-ambient 3.1). Links of the node only; never routed.
PROBE_ADDRESS_V4 = IPv4Address("169.254.7.127")
PROBE_ADDRESS_V6 = IPv6Address("fd16:9254:7127:1337:ffff:ffff:ffff:ffff")


# Of an interface that rules name: fifteen bytes, no quote, blank, slash, nor nft's wildcard.
INTERFACE = re.compile(r'[^\s"/*]{1,15}')


class RedirectError(Exception):
    """Capture couldn't be read or changed; the text names the pod and the remedy."""

    retryable: ClassVar[bool] = True


class NotRetryable(RedirectError):
    """Trying again changes nothing until a person or the pod's description does."""

    retryable: ClassVar[bool] = False


class NetnsGone(NotRetryable):
    """The pod's network namespace can't be entered: the pod is gone, or it never was one."""


@dataclass(frozen=True)
class Ports:
    """Listeners of the data plane in each pod (facts ztunnel 1.1)."""

    outbound: int = 15001
    inbound_plaintext: int = 15006
    inbound_hbone: int = 15008
    # None while nothing listens for DNS: then DNS isn't captured, whatever the pod asks for.
    dns: int | None = None


@dataclass(frozen=True)
class CaptureConfig:
    """What holds for every pod of the node."""

    ports: Ports = field(default_factory=Ports)
    # Low twelve bits of SO_MARK on the data plane's sockets (facts istio-ambient 3.1).
    mark: int = 0x539
    # Off: the data plane listens on IPv4 only, so TCP over IPv6 is refused instead of let past.
    ipv6: bool = True
    # cgroup2 leaves of the data plane (two during an upgrade), absolute. Empty: the mark alone
    # exempts, which any process with NET_RAW can set.
    exempt_cgroups: tuple[Path, ...] = ()
    # Connections from and to these addresses aren't captured. Empty: none are.
    probe_addresses: tuple[IPv4Address | IPv6Address, ...] = (PROBE_ADDRESS_V4, PROBE_ADDRESS_V6)


@dataclass(frozen=True)
class Target:
    """One pod, as far as capture needs to know it."""

    uid: str
    # namespace/name, for messages.
    name: str
    # Stays the caller's; only needs to be open until the call that got it returns.
    netns_fd: int
    bypass_inbound: bool = False
    # Interfaces whose forwarded TCP is outbound traffic of this pod (virtual machines).
    virtual_interfaces: tuple[str, ...] = ()
    dns: bool = False
    # UDP other than DNS, UDP-Lite, SCTP and DCCP are refused.
    udp_deny: bool = False
    # Another way captures the pod as well, while it moves: what is open by that one must not break,
    # and the routing that both need stays.
    shared: bool = False


@dataclass(frozen=True)
class Datagrams:
    """UDP and the like that the mesh doesn't carry, since the pod's capture was installed."""

    # Attempts: connects and datagrams.
    refused: int = 0
    # Flows.
    unprotected: int = 0

    def __add__(self, other: Datagrams) -> Datagrams:
        return Datagrams(self.refused + other.refused, self.unprotected + other.unprotected)


@dataclass(frozen=True)
class Probe:
    """Whether this node can capture this way; `reason` holds the remedy when it can't."""

    usable: bool
    reason: str = ""
    # What works less well than it could, in sentences.
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class InstalledRule:
    chain: str
    # Our name of the rule: its comment.
    name: str
    packets: int
    bytes: int


@dataclass(frozen=True)
class Installed:
    """What was found in a pod's namespace; empty when the pod isn't captured."""

    rules: tuple[InstalledRule, ...] = ()
    routing: tuple[str, ...] = ()


class Redirect(Protocol):
    """A way to catch traffic. Calls for one pod mustn't overlap; those for several pods may."""

    @property
    def name(self) -> str: ...

    @property
    def exempts_by_rule(self) -> bool:
        """Rules name the data planes that they exempt, so they are brought up to date before a new
        one opens a socket in a pod."""

    async def probe(self) -> Probe:
        """Never raises, and touches nothing that another process can see."""

    async def install(self, target: Target) -> None:
        """Captures the pod as described, whatever is there; safe to repeat. On failure nothing
        that this call added stays behind. Raises RedirectError."""

    async def verify(self, target: Target) -> tuple[str, ...]:
        """Problems in words; () when everything is as `install` would leave it. Raises
        RedirectError when the namespace can't be read."""

    async def release(self, target: Target) -> None:
        """For a pod that leaves the mesh: its new connections aren't captured any more, those that
        were go on as they are until `remove`. Safe to repeat, and ended by `install`, too. On
        failure the pod is captured as before. Raises RedirectError."""

    async def idle(self, target: Target) -> bool:
        """After `release`: no open connection needs what it left. Raises RedirectError."""

    async def remove(self, target: Target) -> None:
        """Leaves nothing of ours in the namespace but what another way shares; safe to repeat."""

    async def list(self, target: Target) -> Installed: ...

    async def datagrams(self, target: Target) -> Datagrams:
        """Of a pod that is captured. Raises RedirectError."""

    def reconfigure(self, config: CaptureConfig) -> None:
        """Takes effect at the next `install` of each pod, which is the caller's to do."""

    async def close(self) -> None:
        """Ends threads and frees descriptors; pods stay captured."""
