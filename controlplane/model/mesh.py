"""What the whole mesh shares, and small readings of labels that several translations need."""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address

from controlplane.sources.fields import Ip
from proto.gen import workload_pb2

NETWORK_LABEL = "topology.istio.io/network"
MODE_LABEL = "istio.io/dataplane-mode"
# The domain of service names; ztunnel has it hard-coded too (facts ztunnel 7.2).
DOMAIN = "cluster.local"

_DEFAULT_TRUST_DOMAIN = "cluster.local"


@dataclass(frozen=True)
class Mesh:
    trust_domain: str
    cluster_id: str
    network: str
    root_namespace: str

    @property
    def wire_trust_domain(self) -> str:
        """Empty means cluster.local (facts istio-ambient 6.4)."""
        return "" if self.trust_domain == _DEFAULT_TRUST_DOMAIN else self.trust_domain


def packed(ips: tuple[Ip, ...]) -> list[bytes]:
    return [ip.packed for ip in ips]


def canonical(labels: Mapping[str, str], fallback: str) -> tuple[str, str]:
    """(name, revision) of facts istio-ambient 6.4."""
    name = (
        labels.get("service.istio.io/canonical-name")
        or labels.get("app.kubernetes.io/name")
        or labels.get("app")
        or fallback
    )
    revision = (
        labels.get("service.istio.io/canonical-revision")
        or labels.get("app.kubernetes.io/version")
        or labels.get("version")
        or "latest"
    )
    return name, revision


def native_tunnel(labels: Mapping[str, str]) -> bool:
    """The workload speaks HBONE by itself."""
    return "http" in labels.get("networking.istio.io/tunnel", "").split(",")


def app_protocol(name: str, protocol: str) -> workload_pb2.AppProtocol:
    """By appProtocol, then by the port name's first part, as istiod reads both."""
    word = (protocol or name.split("-")[0]).lower()
    return _PROTOCOLS.get(word.removeprefix("kubernetes.io/"), workload_pb2.AppProtocol.UNKNOWN)


_PROTOCOLS = {
    "http": workload_pb2.AppProtocol.HTTP11,
    "http2": workload_pb2.AppProtocol.HTTP2,
    "h2c": workload_pb2.AppProtocol.HTTP2,
    "grpc": workload_pb2.AppProtocol.GRPC,
    "grpc-web": workload_pb2.AppProtocol.GRPC,
    "tcp": workload_pb2.AppProtocol.TCP,
    "tls": workload_pb2.AppProtocol.TLS,
    "https": workload_pb2.AppProtocol.TLS,
}


def family_of(ip: Ip) -> str:
    return "IPv4" if isinstance(ip, IPv4Address) else "IPv6"
