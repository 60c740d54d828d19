"""What the agent tells about itself, as plain values: for the admin socket, and so for the CLI."""

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """For the operator at three in the morning."""

    what: str
    why: str
    remedy: str = ""


@dataclass(frozen=True)
class PodView:
    uid: str
    name: str
    namespace: str
    service_account: str
    netns: str
    # captured, capturing, served (by rules of somebody else), adding, waiting for …, not captured,
    # failed, draining, removing.
    state: str
    # Our rules are in its namespace.
    captured: bool
    # They were read back and are as they should be.
    verified: bool
    verified_at: datetime | None = None
    # By what: ebpf or nftables; "" while it isn't.
    capture: str = ""
    # By what it was before, whose open connections go on.
    former_captures: tuple[str, ...] = ()
    # What to know of it that is no problem.
    notes: tuple[str, ...] = ()
    # How often somebody had changed them, or ended a listener.
    repairs: int = 0
    # UDP that the mesh doesn't carry, as it was when last verified: attempts that were refused, and
    # flows that passed.
    udp_refused: int = 0
    udp_unprotected: int = 0
    # Raw and packet sockets, whose packets can't be captured.
    raw_sockets: int = 0
    # Likewise: interfaces by which others send through it, past the mesh.
    forwards: tuple[str, ...] = ()
    # By traffic: proved, not proved, unknown; "" while none was tried, or it isn't ours to prove.
    proof: str = ""
    # Why it isn't proved.
    proof_reason: str = ""
    proof_at: datetime | None = None
    problem: str = ""
    remedy: str = ""
    # From the data plane; "" until the pod's own record arrived.
    identity: str = ""
    workload_uid: str = ""
    inbound_connections: int = 0
    outbound_connections: int = 0
    # Older than its capture, and still there; None while that isn't known, or isn't ours to know.
    precapture_connections: int | None = None
    # Some of them.
    precapture_named: tuple[str, ...] = ()
    # Verified, and nothing is older than that.
    enforced: bool = False


@dataclass(frozen=True)
class CaptureView:
    # ebpf, nftables, external or none.
    mode: str
    # Why this one, or why not the other.
    reason: str = ""
    # What works less well than it could.
    notes: tuple[str, ...] = ()
    # Where programs and maps are pinned, as far as there are any; "" where eBPF isn't configured.
    pins: str = ""


@dataclass(frozen=True)
class DataplaneView:
    # serving, away, starting, replacing.
    state: str
    socket: str = ""
    pid: int = 0
    instance_id: str = ""
    build: str = ""
    cgroup: str = ""
    since: datetime | None = None
    # Started by this agent or one before it, as opposed to given by its socket.
    owned: bool = True
    restarts: int = 0
    seconds_without_service: float = 0.0
    # Former ones that still let connections end.
    draining: tuple[int, ...] = ()
    error: str = ""
    # Beyond what holds for every absence.
    remedy: str = ""


@dataclass(frozen=True)
class TypeView:
    processed: bool
    # Resource name -> why its newest version was rejected.
    rejected: Mapping[str, str]


@dataclass(frozen=True)
class ControlPlaneView:
    source: str
    connected: bool
    since: datetime | None = None
    last_error: str = ""
    last_push: datetime | None = None
    types: Mapping[str, TypeView] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class CertificateView:
    identity: str
    # Initializing, Available, Unavailable.
    state: str
    not_before: datetime | None = None
    not_after: datetime | None = None
    serial: str = ""
    last_error: str = ""
    next_attempt: datetime | None = None


@dataclass(frozen=True)
class CertificateSummary:
    available: int
    total: int
    # The first to expire of those that serve.
    next_expiry: datetime | None = None


@dataclass(frozen=True)
class PodSummary:
    total: int
    captured: int
    verified: int
    failed: int
    source: str
    # By rules of somebody else, which aren't ours to verify.
    served: int = 0
    # Verified, and without connections that are older than the capture.
    enforced: int = 0
    # Such connections.
    precapture_connections: int = 0
    # Their capture was proved by traffic.
    proved: int = 0
    not_proved: int = 0


@dataclass(frozen=True)
class ConnectionSummary:
    inbound: int
    outbound: int


@dataclass(frozen=True)
class NodeStatus:
    """One screen: what is, what is wrong, what to do."""

    node: str
    version: str
    pid: int
    started: datetime
    ready: bool
    # Names of what readiness waits for.
    pending: tuple[str, ...]
    capture: CaptureView
    dataplane: DataplaneView
    control_plane: ControlPlaneView
    certificates: CertificateSummary
    pods: PodSummary
    connections: ConnectionSummary
    problems: tuple[Problem, ...]


def plain(value: object) -> object:
    """Values as JSON has them: times in ISO 8601, everything else by its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, enum.Enum):
        return plain(value.value)
    return str(value) if isinstance(value, Path) else value
