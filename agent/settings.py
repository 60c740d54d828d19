"""The settings of `underpass agent` by name: where each may be set, how its text becomes a value.

One table feeds flags (`--xds-address`), environment (`UNDERPASS_XDS_ADDRESS`), the YAML file
(`xds: {address: …}`) and their documentation. It reads nothing itself; `config.load` does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from agent import values
from agent.namespaces import namespace_table
from agent.pods.choice import pod_source

ENV_PREFIX = "UNDERPASS_"


@dataclass(frozen=True)
class Setting:
    """One row: `name` is the key in the file, dots are levels there and dashes in the flag."""

    name: str
    parse: Callable[[object], object]
    default: object
    help: str
    # Too much of a structure for a flag or a variable.
    only_in_file: bool = False

    @property
    def option(self) -> str:
        """The keyword under which the CLI passes the flag's value."""
        return self.name.replace(".", "_").replace("-", "_")

    @property
    def flag(self) -> str:
        return "--" + self.option.replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.option.upper()


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "node",
        values.node_name,
        None,
        "Name of this node, as control plane and pods know it [host name]",
    ),
    Setting(
        "run-dir",
        values.path,
        Path("/run/underpass"),
        "Folder of sockets; a subfolder for each node",
    ),
    Setting("network", values.text, "", "Network id of this node's pods"),
    Setting("cluster-id", values.words, "Kubernetes", "Cluster id told to the control plane"),
    # facts ztunnel 7.2
    Setting(
        "pod.name", values.words, "underpass", "The agent's own pod, as the control plane is told"
    ),
    Setting("pod.namespace", values.words, "istio-system", "Its namespace"),
    Setting(
        "pod.service-account", values.text, "", "Its service account; checked against the token"
    ),
    Setting("pod.address", values.words, "1.1.1.1", "Its IP address"),
    Setting("trust-domain", values.trust_domain, "cluster.local", "Trust domain of the mesh"),
    Setting(
        "pods",
        pod_source,
        None,
        "Who names this node's pods: file:PATH; zds[:PATH], a CNI node agent's socket; or "
        "self:NAMESPACE/NAME/ACCOUNT, the one workload of the agent's own network namespace",
    ),
    Setting(
        "capture",
        values.one_of("auto", "ebpf", "nftables", "external", "none"),
        "auto",
        "How traffic is caught; external: by somebody else's rules [auto: external with zds and "
        "self; with file by eBPF where the node can, else by nftables]",
    ),
    Setting(
        "ebpf.folder",
        values.words,
        "/sys/fs/bpf/underpass",
        "Where the node's programs are pinned, in a folder of its name",
    ),
    # Far above what a pod opens before its listener accepts, far below what the maps hold.
    Setting(
        "ebpf.pod-max-pending",
        values.count(1, 65_536),
        16_384,
        "Captured connections of a pod that wait for being accepted",
    ),
    Setting(
        "mark",
        # The rules compare twelve bits (facts ztunnel 1.4).
        values.count(1, 0xFFF),
        0x539,
        "SO_MARK of the data plane's sockets, by which rules exempt it",
    ),
    Setting("ipv6", values.switch, True, "Listen for and catch IPv6 too"),
    # facts ztunnel 14: ENABLE_ORIG_SRC, LOCALHOST_APP_TUNNEL, ENABLE_RESPONSE_BAGGAGE
    Setting(
        "original-source",
        values.one_of("auto", "must", "never"),
        "auto",
        "Whether applications see the client's address; must: or the connection is refused",
    ),
    Setting("localhost-app-tunnel", values.switch, True, "Application tunnels end on the loopback"),
    Setting("response-baggage", values.switch, True, "Tell peers the workload's labels in answers"),
    Setting(
        "verify-interval",
        values.positive_duration,
        # Rules vanish when somebody flushes them; ten seconds bound how long a pod is bare.
        timedelta(seconds=10),
        "How often a pod's rules are compared with what they should be",
    ),
    Setting(
        "prove-interval",
        values.positive_duration_or_off,
        # Two or four short connections a pod and minute.
        timedelta(seconds=60),
        "How often a pod's capture is proved by connections of ours, or off",
    ),
    Setting(
        "cut-precapture",
        values.switch,
        False,
        "Cut connections older than a pod's capture as it is captured; a namespace may differ",
    ),
    Setting(
        "pods-cgroup",
        values.cgroup,
        None,
        "cgroup2 folder above all processes of all pods, for capture by eBPF [kubepods]",
    ),
    Setting(
        "kubelet-cgroup",
        values.cgroup,
        None,
        "cgroup2 folder of the kubelet, which reaches pods' probe ports under eBPF capture",
    ),
    Setting(
        "kubelet-probe-fallback",
        values.switch,
        # Every process of the node has its address, and whoever is masqueraded behind it.
        False,
        "Let plain TCP from the node's own addresses reach pods' probe ports, past policies",
    ),
    Setting("xds.address", values.https_address, None, "Control plane, https://host:port"),
    Setting("xds.root", values.roots, None, "Its root certificates: a path, PEM text, or SYSTEM"),
    Setting("xds.token", values.file, None, "File with the token for the control plane"),
    Setting(
        "xds.alt-hostname",
        values.words,
        None,
        "A further name the control plane's certificate may carry",
    ),
    Setting("xds.headers", values.headers, {}, "Further headers, name=value"),
    Setting("xds.metadata", values.metadata, {}, "Further metadata of the node, name=value"),
    Setting(
        "xds.on-demand",
        values.switch,
        False,
        "Ask for addresses one by one instead of for the mesh",
    ),
    Setting("xds.file", values.file, None, "Local configuration file instead of a control plane"),
    Setting("ca.address", values.https_address, None, "Certificate authority [xds.address]"),
    Setting("ca.root", values.roots, None, "Its root certificates [xds.root]"),
    Setting("ca.token", values.path, None, "File with the token for it [xds.token]"),
    Setting(
        "ca.alt-hostname",
        values.words,
        None,
        "A further name its certificate may carry [xds.alt-hostname]",
    ),
    Setting("ca.headers", values.headers, {}, "Further headers, name=value [xds.headers]"),
    # facts ztunnel 14, SECRET_TTL
    Setting(
        "ca.ttl", values.positive_duration, timedelta(hours=24), "Asked lifetime of certificates"
    ),
    Setting(
        "ca.spire-socket",
        values.socket_path,
        None,
        "Admin socket of a SPIRE agent that supplies certificates with their keys, instead of a CA",
    ),
    Setting(
        "trust.crl", values.path, None, "File with the CRL, PEM or DER, followed as it changes"
    ),
    Setting(
        "trust.aliases",
        values.trust_domains,
        (),
        "Trust domains that count as this mesh's own, joined by commas",
    ),
    Setting(
        "trust.compliance-policy",
        values.one_of("none", "pqc"),
        "none",
        "pqc: only the post-quantum key exchange",
    ),
    Setting(
        "trust.overlap",
        values.positive_duration,
        # Every identity of a node is renewed within a minute; the rest is for a CA that is slow.
        timedelta(minutes=10),
        "How long roots count that the CA's answers no longer hold",
    ),
    Setting(
        "dataplane.socket",
        values.path,
        None,
        "Control socket of a data plane that somebody else starts",
    ),
    Setting(
        "dataplane.bin", values.path, None, "The underpass-dataplane to start [beside python, PATH]"
    ),
    Setting(
        "dataplane.workers",
        values.count(0, 1024),
        0,
        "Worker threads of the data plane; 0: half the cores",
    ),
    Setting(
        "dataplane.cgroup-parent",
        values.words,
        "auto",
        "cgroup2 folder for its leaf, auto, or none",
    ),
    # facts ztunnel 11.4
    Setting(
        "dataplane.drain-deadline",
        values.positive_duration,
        timedelta(seconds=5),
        "Time for connections to end",
    ),
    Setting(
        "ports.outbound", values.port, 15001, "Listener for captured outbound traffic, in each pod"
    ),
    Setting("ports.inbound-plaintext", values.port, 15006, "Listener for captured inbound traffic"),
    Setting("ports.inbound-hbone", values.port, 15008, "Listener for HBONE"),
    Setting("ports.dns", values.port, 15053, "Listeners for captured DNS, on the pod's loopback"),
    # facts ztunnel 9.1
    Setting("dns.capture", values.switch, True, "Answer the DNS of pods; a pod may opt out"),
    Setting(
        "dns.cluster-domain", values.dns_domain, "cluster.local", "Domain of the cluster's services"
    ),
    Setting(
        "dns.nameservers",
        values.nameservers,
        (),
        "Asked for pods whose resolv.conf isn't known: ip or ip:port,… [the agent's own]",
    ),
    Setting(
        "dns.preferred-namespace",
        values.text,
        "",
        "Whose services go before those of other namespaces",
    ),
    Setting(
        "dns.forward-timeout",
        values.positive_duration,
        timedelta(seconds=5),
        "A nameserver's answer",
    ),
    Setting("dns.cache-entries", values.count(1, 1_000_000), 8192, "Nameservers' answers kept"),
    Setting(
        "dns.pod-max-pending",
        values.count(1, 100_000),
        1024,
        "Questions of one pod that wait for answers",
    ),
    Setting(
        "socks5.port",
        values.port_or_off,
        None,
        "SOCKS5 listener on 127.0.0.1 in each pod: a port (upstream's is 15080), or off [off]",
    ),
    # facts ztunnel 3.2; a frame's bounds are those of RFC 9113, 6.5.2
    Setting(
        "http2.stream-window", values.count(65_535, 2**31 - 1), 4 << 20, "HTTP/2 window, bytes"
    ),
    Setting(
        "http2.connection-window", values.count(65_535, 2**31 - 1), 16 << 20, "The same of a tunnel"
    ),
    Setting(
        "http2.frame-size", values.count(16_384, 2**24 - 1), 1 << 20, "Largest HTTP/2 frame, bytes"
    ),
    # facts ztunnel 1.2
    Setting("keepalive.enabled", values.switch, True, "TCP keepalive on every connection"),
    Setting(
        "keepalive.time", values.whole_seconds, timedelta(seconds=180), "Idle before the first"
    ),
    Setting(
        "keepalive.interval", values.whole_seconds, timedelta(seconds=180), "Between two of them"
    ),
    Setting("keepalive.retries", values.count(1, 127), 9, "Unanswered ones before the end"),
    Setting("keepalive.user-timeout", values.switch, False, "Unacknowledged data ends it as well"),
    Setting(
        "admin.address",
        values.loopback,
        values.Listen("localhost", 15000),
        "Dump and log levels, on the loopback: localhost:port, address:port, or off",
    ),
    Setting(
        "admin.allow-changes",
        values.switch,
        False,
        "That address also changes log levels and ends the agent, for every local process",
    ),
    Setting(
        "stats.address",
        values.listen,
        values.Listen("", 15020),
        "Metrics: host:port, :port, or off",
    ),
    # facts ztunnel 11.6
    Setting(
        "stats.hbone",
        values.switch,
        False,
        "Metrics over HBONE too: as the agent's own pod (pod.*), on its port for HBONE",
    ),
    Setting(
        "ready.address",
        values.listen,
        values.Listen("", 15021),
        "Readiness: host:port, :port, or off",
    ),
    Setting("log.format", values.one_of("text", "json"), "text", "Log format of both processes"),
    Setting("log.filter", values.words, "info", "Log filter, for example info,underpass=debug"),
    Setting("log.access", values.switch, True, "Access log lines of connections that ended well"),
    Setting(
        "log.sample",
        values.count(1, 1_000_000),
        1,
        "One in so many of these lines is written; those of failures all are",
    ),
    Setting(
        "log.omit-fields",
        values.access_fields,
        (),
        "Access log fields left out, for example src.addr",
    ),
    # facts ztunnel 12.5
    Setting(
        "log.queue",
        values.count(1, 10_000_000),
        10_000,
        "Lines of the data plane that may wait to be written; more are lost and counted",
    ),
    Setting(
        "log.policy-decisions", values.switch, False, "Policy decisions at info instead of debug"
    ),
    Setting(
        "telemetry.otlp-endpoint",
        values.http_address,
        None,
        "Collector for access log and spans by OTLP over gRPC, http://host:port",
    ),
    # Some scrapes, so that the last counts of a pod that went are seen.
    Setting(
        "telemetry.series-ttl",
        values.positive_duration,
        timedelta(minutes=15),
        "Metrics of workloads that are gone for so long are dropped",
    ),
    Setting("telemetry.istio-version", values.text, "", "Version shown by istio_build [unknown]"),
    Setting(
        "limits.connect-timeout", values.positive_duration, timedelta(seconds=10), "TCP connect"
    ),
    Setting(
        "limits.tls-handshake-timeout",
        values.positive_duration,
        timedelta(seconds=10),
        "TLS handshake",
    ),
    Setting(
        "limits.connect-answer-timeout",
        values.positive_duration,
        timedelta(seconds=10),
        "CONNECT to its answer",
    ),
    Setting(
        "limits.workload-wait",
        values.positive_duration,
        timedelta(seconds=5),
        "Own record or certificate missing",
    ),
    Setting(
        "limits.preface-timeout",
        values.positive_duration,
        timedelta(seconds=10),
        "From a finished TLS handshake to the HTTP/2 preface",
    ),
    Setting("limits.pool-max-streams", values.count(1, 1_000_000), 100, "Streams of one tunnel"),
    Setting("limits.pool-idle", values.positive_duration, timedelta(minutes=5), "Idle tunnel kept"),
    Setting(
        "limits.pool-max-tunnels", values.count(1, 1_000_000), 4096, "Tunnels kept for one pod"
    ),
    Setting(
        "limits.pod-max-connections",
        values.count(1, 10_000_000),
        16384,
        "Live connections of one pod",
    ),
    Setting(
        "limits.pod-max-handshakes",
        values.count(1, 1_000_000),
        1024,
        "TLS handshakes in flight at a pod",
    ),
    Setting(
        "namespaces",
        namespace_table,
        {},
        "Per namespace of pods: {registryOnly, waypointRequired: off | dry-run | on; "
        "cutPrecapture: true | false}",
        only_in_file=True,
    ),
)
