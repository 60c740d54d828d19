"""The configuration as values: one frozen slice for each part, units in the types."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from agent.literal import Literal
from agent.namespaces import NamespaceTable
from agent.pods.choice import OwnWorkload, PodSourceChoice
from agent.values import Listen


@dataclass(frozen=True)
class Node:
    name: str
    network: str = ""
    cluster_id: str = "Kubernetes"
    trust_domain: str = "cluster.local"
    # Of the agent itself, as a control plane is told (facts ztunnel 7.2).
    pod_name: str = "underpass"
    pod_namespace: str = "istio-system"
    service_account: str = ""
    address: str = "1.1.1.1"


@dataclass(frozen=True)
class RunPaths:
    """Files of one node; several nodes share a machine by different names or folders."""

    root: Path

    @property
    def admin_socket(self) -> Path:
        return self.root / "admin.sock"

    @property
    def pid_file(self) -> Path:
        return self.root / "agent.pid"

    @property
    def captured_pods(self) -> Path:
        """Namespaces that hold our rules; outlives the agent as they do."""
        return self.root / "captured.json"

    @property
    def precapture_note(self) -> Path:
        """Connections older than their pod's capture; outlives the agent as they do."""
        return self.root / "precapture.json"

    @property
    def dataplane_link(self) -> Path:
        """Symbolic link to the control socket of the data plane that serves now."""
        return self.root / "dataplane.sock"

    def dataplane_socket(self, number: int) -> Path:
        return self.root / f"dataplane-{number}.sock"


@dataclass(frozen=True)
class Ports:
    """facts ztunnel 1.1"""

    outbound: int = 15001
    inbound_plaintext: int = 15006
    inbound_hbone: int = 15008
    dns: int = 15053
    # In each pod on 127.0.0.1; None: off.
    socks5: int | None = None


@dataclass(frozen=True)
class Dns:
    """facts ztunnel 9, control.proto Dns"""

    capture: bool = True
    cluster_domain: str = "cluster.local"
    # `ip` or `ip:port`. Empty: the agent's own, read when a pod is added.
    nameservers: tuple[str, ...] = ()
    preferred_namespace: str = ""
    forward_timeout: timedelta = timedelta(seconds=5)
    cache_entries: int = 8192
    pod_max_pending: int = 1024


@dataclass(frozen=True)
class Ebpf:
    """control.proto Ebpf"""

    pods_cgroup: Path
    folder: Path
    pod_max_pending: int = 16_384


@dataclass(frozen=True)
class Capture:
    # auto, ebpf and nftables by us, external by somebody else, none.
    mode: str = "auto"
    ipv6: bool = True
    ports: Ports = field(default_factory=Ports)
    mark: int = 0x539
    verify_interval: timedelta = timedelta(seconds=10)
    # Between proofs by traffic of one pod.
    prove_interval: timedelta | None = timedelta(seconds=60)
    # Of every pod as it is captured, unless its namespace says otherwise.
    cut_precapture: bool = False
    # Whose sockets reach probe ports under capture by eBPF.
    kubelet_cgroup: Path | None = None
    # The node's own address is taken for the kubelet there, too.
    kubelet_probe_fallback: bool = False
    # None: no pod is captured by eBPF.
    ebpf: Ebpf | None = None
    # Why not, where that is known before the kernel is asked.
    no_ebpf: str = ""


@dataclass(frozen=True)
class ControlPlane:
    """A TLS endpoint: of configuration or of certificates."""

    address: str
    # A path, PEM text, or SYSTEM.
    root: str
    token: Path | Literal | None = None
    alt_hostname: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where configuration comes from: exactly one is set."""

    control_plane: ControlPlane | None = None
    file: Path | Literal | None = None
    on_demand: bool = False
    # Of the node, beyond what follows from its slice.
    metadata: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Authority:
    endpoint: ControlPlane
    ttl: timedelta = timedelta(hours=24)


@dataclass(frozen=True)
class Spire:
    """A SPIRE agent's admin socket."""

    socket: Path


@dataclass(frozen=True)
class Trust:
    """How peers are judged beyond their own chain."""

    crl: Path | None = None
    aliases: tuple[str, ...] = ()
    # none or pqc.
    compliance_policy: str = "none"
    overlap: timedelta = timedelta(minutes=10)


@dataclass(frozen=True)
class Log:
    format: str = "text"
    filter: str = "info"
    access: bool = True
    sample: int = 1
    omit_fields: tuple[str, ...] = ()
    queue: int = 10_000
    policy_decisions: bool = False


@dataclass(frozen=True)
class Telemetry:
    otlp_endpoint: str | None = None
    series_ttl: timedelta = timedelta(minutes=15)
    istio_version: str = ""


@dataclass(frozen=True)
class Http2:
    """Bytes; facts ztunnel 3.2."""

    stream_window: int = 4 << 20
    connection_window: int = 16 << 20
    frame_size: int = 1 << 20


@dataclass(frozen=True)
class Keepalive:
    """facts ztunnel 1.2"""

    enabled: bool = True
    time: timedelta = timedelta(seconds=180)
    interval: timedelta = timedelta(seconds=180)
    retries: int = 9
    user_timeout: bool = False


@dataclass(frozen=True)
class Wire:
    """How connections are made and what they tell (facts ztunnel 14)."""

    original_source: str = "auto"
    localhost_app_tunnel: bool = True
    response_baggage: bool = True
    http2: Http2 = field(default_factory=Http2)
    keepalive: Keepalive = field(default_factory=Keepalive)


@dataclass(frozen=True)
class Limits:
    """control.proto, Limits; without drain_deadline, which is the data plane's slice."""

    connect_timeout: timedelta = timedelta(seconds=10)
    tls_handshake_timeout: timedelta = timedelta(seconds=10)
    connect_answer_timeout: timedelta = timedelta(seconds=10)
    workload_wait: timedelta = timedelta(seconds=5)
    preface_timeout: timedelta = timedelta(seconds=10)
    pool_max_streams: int = 100
    pool_idle: timedelta = timedelta(minutes=5)
    pool_max_tunnels: int = 4096
    pod_max_connections: int = 16384
    pod_max_handshakes: int = 1024


@dataclass(frozen=True)
class DataplaneProcess:
    """Exactly one of `socket` (somebody else starts it) and `binary` (we do) is set."""

    socket: Path | None = None
    binary: Path | None = None
    # Makes the connections that prove capture: `binary`, or what is found where somebody else
    # starts the data plane; None: none is here.
    prover: Path | None = None
    workers: int = 0
    # None: it stays in the agent's cgroup and only its mark exempts it.
    cgroup_parent: Path | None = None
    drain_deadline: timedelta = timedelta(seconds=5)


@dataclass(frozen=True)
class Servers:
    """None: not served."""

    stats: Listen | None
    ready: Listen | None
    admin: Listen | None = None
    # Of `admin`: not only reads.
    allow_changes: bool = False
    # `stats` over HBONE too, as this workload.
    hbone: OwnWorkload | None = None


@dataclass(frozen=True)
class Config:
    node: Node
    paths: RunPaths
    pods: PodSourceChoice
    capture: Capture
    source: Source
    # None: no certificate can be had; only what needs none works.
    authority: Authority | None
    dataplane: DataplaneProcess
    servers: Servers
    log: Log
    limits: Limits
    dns: Dns = field(default_factory=Dns)
    wire: Wire = field(default_factory=Wire)
    namespaces: NamespaceTable = field(default_factory=dict)
    telemetry: Telemetry = field(default_factory=Telemetry)
    trust: Trust = field(default_factory=Trust)
    # Instead of an authority.
    spire: Spire | None = None
    # What is odd but no mistake; logged at start.
    warnings: tuple[str, ...] = ()
