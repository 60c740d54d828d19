"""Upstream's names one by one: what each becomes, or why it is ignored (facts ztunnel 14)."""

from collections.abc import Callable
from dataclasses import dataclass

from agent.dropin import values


@dataclass(frozen=True)
class Row:
    """`setting` is ours, "" when nothing follows from the name by itself."""

    name: str
    setting: str = ""
    convert: Callable[[str], object] = values.same
    # For the documentation; of an ignored one, the reason that its warning gives.
    note: str = ""
    ignored: bool = False
    # Read together with others, by `translate`.
    together: bool = False


ROWS: tuple[Row, ...] = (
    # Identity and mesh.
    Row("PROXY_MODE", "pods", together=True, note="shared: `zds`; dedicated: `self`"),
    Row("PROXY_WORKLOAD_INFO", "pods", together=True, note="of `self:`, the same text"),
    Row("INPOD_UDS", "pods", together=True, note="the path of `zds:`"),
    Row("NETWORK", "network"),
    Row("NODE_NAME", "node"),
    Row("CLUSTER_ID", "cluster-id", together=True, note="ISTIO_META_CLUSTER_ID wins"),
    Row("CLUSTER_DOMAIN", "dns.cluster-domain"),
    Row("TRUST_DOMAIN", "trust-domain"),
    Row("POD_NAME", "pod.name"),
    Row("POD_NAMESPACE", "pod.namespace"),
    Row(
        "SERVICE_ACCOUNT",
        "pod.service-account",
        note="with POD_NAME and POD_NAMESPACE: metrics over HBONE too (`stats.hbone`)",
    ),
    Row("INSTANCE_IP", "pod.address"),
    Row("ISTIO_META_*", "xds.metadata", together=True, note="the prefix goes"),
    Row("ISTIO_META_ISTIO_VERSION", "telemetry.istio-version", together=True),
    Row("ISTIO_METAJSON_*", "xds.metadata", together=True, note="JSON; bad JSON is skipped"),
    # Control plane.
    Row("XDS_ADDRESS", "xds.address", together=True, note="https alone"),
    Row("XDS_ROOT_CA", "xds.root"),
    Row("ALT_XDS_HOSTNAME", "xds.alt-hostname"),
    Row("XDS_HEADER_*", "xds.headers", together=True),
    Row("XDS_ON_DEMAND", "xds.on-demand"),
    Row("LOCAL_XDS_PATH", "xds.file"),
    Row("LOCAL_XDS", "xds.file", note="the YAML itself; not with LOCAL_XDS_PATH", together=True),
    Row("CA_ADDRESS", "ca.address", together=True, note="https alone"),
    Row("CA_ROOT_CA", "ca.root"),
    Row("ALT_CA_HOSTNAME", "ca.alt-hostname"),
    Row("CA_HEADER_*", "ca.headers", together=True),
    Row("AUTH_TOKEN", "xds.token", values.token, note="a path, or the token itself"),
    Row("SECRET_TTL", "ca.ttl"),
    Row("CRL_PATH", "trust.crl"),
    Row("COMPLIANCE_POLICY", "trust.compliance-policy"),
    Row(
        "FAKE_CA",
        convert=values.only(False, "only upstream's test builds have one"),
        note="true is a mistake: only upstream's test builds have one",
    ),
    # Features.
    Row(
        "ENABLE_PROXY",
        convert=values.only(True, "there is no agent without its proxy"),
        note="false is a mistake: there is no agent without its proxy",
    ),
    Row("ISTIO_META_DNS_CAPTURE", "dns.capture", together=True),
    Row("ISTIO_META_DNS_PROXY_ADDR", "ports.dns", together=True, note="its port; pods' loopback"),
    Row("PREFERED_SERVICE_NAMESPACE", "dns.preferred-namespace"),
    Row("UNSTABLE_ENABLE_SOCKS5", "socks5.port", values.socks5, note="true: 15080"),
    Row("ENABLE_ORIG_SRC", "original-source", values.original_source, note="must or never"),
    Row("LOCALHOST_APP_TUNNEL", "localhost-app-tunnel"),
    Row("ENABLE_RESPONSE_BAGGAGE", "response-baggage"),
    Row("IPV6_ENABLED", "ipv6"),
    Row("AUTHZ_POLICY_INFO_LOGGING", "log.policy-decisions"),
    Row("TLS12_ENABLED", ignored=True, note="peers speak TLS 1.3 alone"),
    # In the pods.
    Row(
        "INPOD_PORT_REUSE",
        ignored=True,
        note="listeners never share their ports: a process of the pod could join and take traffic",
    ),
    Row("PACKET_MARK", "mark"),
    # Tuning.
    Row("ZTUNNEL_WORKER_THREADS", "dataplane.workers", together=True, note="0: all CPUs"),
    Row("ZTUNNEL_CPU_LIMIT", "dataplane.workers", together=True, note="the CPUs that % means"),
    Row("ZTUNNEL_RESOURCE_CPU_LIMIT", "dataplane.workers", together=True),
    Row("ZTUNNEL_RESOURCE_CPU_REQUEST", "dataplane.workers", together=True),
    Row("POOL_MAX_STREAMS_PER_CONNECTION", "limits.pool-max-streams"),
    Row("POOL_UNUSED_RELEASE_TIMEOUT", "limits.pool-idle"),
    Row("HTTP2_STREAM_WINDOW_SIZE", "http2.stream-window"),
    Row("HTTP2_CONNECTION_WINDOW_SIZE", "http2.connection-window"),
    Row("HTTP2_FRAME_SIZE", "http2.frame-size"),
    Row("KEEPALIVE_TIME", "keepalive.time"),
    Row("KEEPALIVE_INTERVAL", "keepalive.interval"),
    Row("KEEPALIVE_RETRIES", "keepalive.retries"),
    Row("KEEPALIVE_ENABLED", "keepalive.enabled"),
    Row("USER_TIMEOUT_ENABLED", "keepalive.user-timeout"),
    Row("CONNECTION_TERMINATION_DEADLINE", "dataplane.drain-deadline", together=True),
    Row(
        "TERMINATION_GRACE_PERIOD_SECONDS",
        "dataplane.drain-deadline",
        together=True,
        note="5 s less, 1 s less below 11 s, never under 1 s",
    ),
    # Logging.
    Row("RUST_LOG", "log.filter", values.log_filter, note="`ztunnel…` targets become `underpass…`"),
    Row("LOG_FORMAT", "log.format", values.log_format, note="plain is our text"),
    # The rest.
    Row("PROXY_CONFIG", together=True, note="its keys below, under the names above"),
    Row("KUBERNETES_SERVICE_HOST", together=True, note="only picks istiod's default address"),
)

# Keys of ProxyConfig, in PROXY_CONFIG or `defaultConfig` of the mesh file.
PROXY_CONFIG_ROWS: tuple[Row, ...] = (
    Row("discoveryAddress", "xds.address", together=True, note="the authority's too"),
    Row("proxyAdminPort", "admin.address", together=True, note="on the loopback"),
    Row("statsPort", "stats.address", together=True, note="on all addresses"),
    Row("concurrency", "dataplane.workers", together=True, note="0: all CPUs"),
    Row("proxyMetadata", "xds.metadata", together=True, note="`ISTIO_META_` of its keys goes"),
)
