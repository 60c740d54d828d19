"""The settings of `underpass agent` by name: where each may be set, how its text becomes a value.

One table feeds flags (`--xds-address`), environment (`UNDERPASS_XDS_ADDRESS`), the YAML file
(`xds: {address: …}`) and their documentation. It reads nothing itself; `config.load` does.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

from agent.errors import Mistake
from agent.literal import Literal
from agent.namespaces import namespace_table
from agent.pods.choice import pod_source

__all__ = ["SETTINGS", "Listen", "Mistake", "Setting"]

ENV_PREFIX = "UNDERPASS_"

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NODE = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
# sun_path holds 108 bytes with its NUL.
SOCKET_PATH_LIMIT = 107


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


# ---- from text to value; each raises Mistake and says what would be right


def text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Mistake("a text is wanted")
    return str(value)


def words(value: object) -> str:
    found = text(value).strip()
    if not found:
        raise Mistake("is empty; leave it out instead")
    return found


def node_name(value: object) -> str:
    found = text(value)
    if not _NODE.fullmatch(found):
        raise Mistake("not a node name: lower-case letters, digits, '-' and '.', as Kubernetes has")
    return found


def trust_domain(value: object) -> str:
    found = text(value)
    if not _TRUST_DOMAIN.fullmatch(found):
        raise Mistake("not a trust domain: lower-case letters, digits, '.', '-' and '_'")
    return found


def trust_domains(value: object) -> tuple[str, ...]:
    """A list in the file, joined by commas elsewhere."""
    pieces = value if isinstance(value, list | tuple) else text(value).split(",")
    names = (str(piece).strip() for piece in pieces)
    return tuple(dict.fromkeys(trust_domain(name) for name in names if name))


def switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    known = {"true": True, "on": True, "yes": True, "1": True}
    known |= {"false": False, "off": False, "no": False, "0": False}
    try:
        return known[str(value).lower()]
    except KeyError:
        raise Mistake("write true or false") from None


def duration(value: object) -> timedelta:
    found = str(value).strip()
    pieces = _DURATION.findall(found)
    if not pieces or "".join(number + unit for number, unit in pieces) != found:
        raise Mistake("not a duration; write a number with ms, s, m, h or d, for example 5s")
    return timedelta(seconds=sum(float(number) * _UNITS[unit] for number, unit in pieces))


def positive_duration(value: object) -> timedelta:
    found = duration(value)
    if found <= timedelta(0):
        raise Mistake("must be longer than nothing")
    return found


def whole_seconds(value: object) -> timedelta:
    """The kernel knows no smaller ones; 32767 s are its limit (tcp(7), TCP_KEEPIDLE)."""
    found = duration(value)
    if found % timedelta(seconds=1) or not 1 <= found.total_seconds() <= 32767:
        raise Mistake("must be whole seconds, from 1s to 32767s")
    return found


def count(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        try:
            found = int(str(value))
        except ValueError:
            raise Mistake("not a whole number") from None
        if isinstance(value, bool) or not low <= found <= high:
            raise Mistake(f"must be from {low} to {high}")
        return found

    return parse


port = count(1, 65535)


@dataclass(frozen=True)
class Listen:
    """An address of one of the agent's own servers; "" as host means all of IPv4 and IPv6."""

    host: str
    port: int


def listen(value: object) -> Listen | None:
    """`host:port`, `[v6]:port`, `:port`, or `off`."""
    found = "off" if value is False else text(value).strip()
    if found == "off":
        return None
    host, colon, number = found.rpartition(":")
    if not colon or ((":" in host) != (host.startswith("[") and host.endswith("]"))):
        raise Mistake("not an address; write host:port, [v6]:port, :port or off")
    return Listen(host.strip("[]"), count(0, 65535)(number))


def one_of(*known: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        # YAML reads a bare `off` as False.
        found = "off" if value is False else str(value)
        if found not in known:
            raise Mistake(f"unknown; write one of {', '.join(known)}")
        return found

    return parse


def port_or_off(value: object) -> int | None:
    return None if value is False or value == "off" else port(value)


def path(value: object) -> Path:
    return Path(words(value)).absolute()


def socket_path(value: object) -> Path:
    found = path(value)
    if len(str(found)) > SOCKET_PATH_LIMIT:
        raise Mistake(f"too long for a socket: at most {SOCKET_PATH_LIMIT} characters")
    return found


def file(value: object) -> Path | Literal:
    """A path; upstream's environment may hold the content itself."""
    return value if isinstance(value, Literal) else path(value)


def cgroup(value: object) -> Path:
    found = Path(words(value))
    if not found.is_absolute() or ".." in found.parts:
        raise Mistake("not an absolute path, for example /sys/fs/cgroup/kubepods.slice")
    return found


def https_address(value: object) -> str:
    """`https://host:port` or `host:port`; tokens are never sent in clear."""
    found = words(value)
    scheme, separator, rest = found.partition("://")
    if separator and scheme != "https":
        raise Mistake("only https is possible, tokens are never sent in clear")
    host, colon, number = (rest if separator else found).rpartition(":")
    if not separator and not colon:
        return found
    if colon and not number.endswith("]"):
        port(number)
    if (colon and not host) or "/" in found.removeprefix("https://"):
        raise Mistake("not an address; write https://host:port")
    return found


def roots(value: object) -> str:
    """A path, PEM text, or SYSTEM."""
    found = words(value)
    if found == "SYSTEM" or "-----BEGIN" in found:
        return found
    return str(Path(found).absolute())


def nameservers(value: object) -> tuple[str, ...]:
    """`ip` or `ip:port`, a list in the file, else joined by commas."""
    pieces = value if isinstance(value, list | tuple) else text(value).split(",")
    return tuple(_nameserver(text(piece).strip()) for piece in pieces)


def _nameserver(found: str) -> str:
    host, colon, number = found.rpartition(":")
    if found.count(":") == 1 or found.startswith("["):
        port(number)
    else:
        host, colon = found, ""
    try:
        address = ip_address(host.strip("[]") if colon else host)
    except ValueError:
        raise Mistake(f"{found!r} is no address; write ip or ip:port") from None
    if address.is_loopback:
        # Asked from inside the pod, where nobody is but the pod itself.
        raise Mistake(f"{found}: can't be asked from a pod; write an address the pods can reach")
    return found


def dns_domain(value: object) -> str:
    found = words(value).rstrip(".").lower()
    if not _DOMAIN.fullmatch(found):
        raise Mistake("not a domain, for example cluster.local")
    return found


def headers(value: object) -> dict[str, str]:
    """A mapping in the file, `name=value` in flags, those joined by commas in the environment."""
    if isinstance(value, Mapping):
        found = {str(name): text(content) for name, content in value.items()}
    else:
        pieces = value if isinstance(value, list | tuple) else text(value).split(",")
        found = {}
        for piece in pieces:
            name, equals, content = str(piece).partition("=")
            if not equals:
                raise Mistake(f"{piece!r} is no header; write name=value")
            found[name.strip()] = content.strip()
    for name in found:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise Mistake(f"{name!r} is no header name")
    return found


def metadata(value: object) -> dict[str, object]:
    """Like headers, but names are free and values in the file may be of any kind."""
    if isinstance(value, Mapping):
        return {str(name): content for name, content in value.items()}
    pieces = value if isinstance(value, list | tuple) else text(value).split(",")
    found: dict[str, object] = {}
    for piece in pieces:
        name, equals, content = str(piece).partition("=")
        if not equals or not name.strip():
            raise Mistake(f"{piece!r} is no metadata; write name=value")
        found[name.strip()] = content.strip()
    return found


def loopback(value: object) -> Listen | None:
    """`localhost:port` for both families, an address of the loopback with a port, or `off`."""
    found = listen(value)
    if found is None or found.host == "localhost":
        return found
    try:
        local = ip_address(found.host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise Mistake("not on the loopback: whoever reaches it reads everything of the mesh")
    return found


# Of the data plane's access log, in its order (telemetry/access.rs); a contract test compares.
ACCESS_FIELDS = (
    *(f"src.{name}" for name in ("addr", "workload", "namespace", "identity", "cluster")),
    *("dst.addr", "dst.hbone_addr", "dst.service"),
    *(f"dst.{name}" for name in ("workload", "namespace", "identity", "cluster")),
    *("direction", "bytes_sent", "bytes_recv", "duration", "error", "policy", "outcome"),
)


def access_fields(value: object) -> tuple[str, ...]:
    """A list in the file, joined by commas elsewhere."""
    found = value if isinstance(value, list | tuple) else text(value).split(",")
    names = tuple(str(name).strip() for name in found if str(name).strip())
    for name in names:
        if name not in ACCESS_FIELDS:
            raise Mistake(f"{name!r} is no access log field; there are {', '.join(ACCESS_FIELDS)}")
    return names


def http_address(value: object) -> str:
    """`http://host:port`; nothing secret crosses it."""
    found = words(value)
    scheme, separator, rest = found.partition("://")
    host, colon, number = rest.rstrip("/").rpartition(":")
    if not separator or scheme != "http" or not host or not colon or "/" in rest.rstrip("/"):
        raise Mistake("not an address; write http://host:port")
    port(number)
    return found.rstrip("/")


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "node", node_name, None, "Name of this node, as control plane and pods know it [host name]"
    ),
    Setting(
        "run-dir", path, Path("/run/underpass"), "Folder of sockets; a subfolder for each node"
    ),
    Setting("network", text, "", "Network id of this node's pods"),
    Setting("cluster-id", words, "Kubernetes", "Cluster id told to the control plane"),
    # facts ztunnel 7.2
    Setting("pod.name", words, "underpass", "The agent's own pod, as the control plane is told"),
    Setting("pod.namespace", words, "istio-system", "Its namespace"),
    Setting("pod.service-account", text, "", "Its service account; checked against the token"),
    Setting("pod.address", words, "1.1.1.1", "Its IP address"),
    Setting("trust-domain", trust_domain, "cluster.local", "Trust domain of the mesh"),
    Setting(
        "pods",
        pod_source,
        None,
        "Who names this node's pods: file:PATH; zds[:PATH], a CNI node agent's socket; or "
        "self:NAMESPACE/NAME/ACCOUNT, the one workload of the agent's own network namespace",
    ),
    Setting(
        "capture",
        one_of("auto", "ebpf", "nftables", "external", "none"),
        "auto",
        "How traffic is caught; external: by somebody else's rules [auto: nftables with file, "
        "external with zds and self]",
    ),
    Setting(
        "ebpf.folder",
        words,
        "/sys/fs/bpf/underpass",
        "Where the node's programs are pinned, in a folder of its name",
    ),
    # Far above what a pod opens before its listener accepts, far below what the maps hold.
    Setting(
        "ebpf.pod-max-pending",
        count(1, 65_536),
        16_384,
        "Captured connections of a pod that wait for being accepted",
    ),
    Setting(
        "mark",
        # The rules compare twelve bits (facts ztunnel 1.4).
        count(1, 0xFFF),
        0x539,
        "SO_MARK of the data plane's sockets, by which rules exempt it",
    ),
    Setting("ipv6", switch, True, "Listen for and catch IPv6 too"),
    # facts ztunnel 14: ENABLE_ORIG_SRC, LOCALHOST_APP_TUNNEL, ENABLE_RESPONSE_BAGGAGE
    Setting(
        "original-source",
        one_of("auto", "must", "never"),
        "auto",
        "Whether applications see the client's address; must: or the connection is refused",
    ),
    Setting("localhost-app-tunnel", switch, True, "Application tunnels end on the loopback"),
    Setting("response-baggage", switch, True, "Tell peers the workload's labels in answers"),
    Setting(
        "verify-interval",
        positive_duration,
        # Rules vanish when somebody flushes them; ten seconds bound how long a pod is bare.
        timedelta(seconds=10),
        "How often a pod's rules are compared with what they should be",
    ),
    Setting(
        "cut-precapture",
        switch,
        False,
        "Cut connections older than a pod's capture as it is captured; a namespace may differ",
    ),
    Setting(
        "pods-cgroup",
        cgroup,
        None,
        "cgroup2 folder above all processes of all pods, for capture by eBPF [kubepods]",
    ),
    Setting(
        "kubelet-cgroup",
        cgroup,
        None,
        "cgroup2 folder of the kubelet, which reaches pods' probe ports under eBPF capture",
    ),
    Setting("xds.address", https_address, None, "Control plane, https://host:port"),
    Setting("xds.root", roots, None, "Its root certificates: a path, PEM text, or SYSTEM"),
    Setting("xds.token", file, None, "File with the token for the control plane"),
    Setting(
        "xds.alt-hostname", words, None, "A further name the control plane's certificate may carry"
    ),
    Setting("xds.headers", headers, {}, "Further headers, name=value"),
    Setting("xds.metadata", metadata, {}, "Further metadata of the node, name=value"),
    Setting("xds.on-demand", switch, False, "Ask for addresses one by one instead of for the mesh"),
    Setting("xds.file", file, None, "Local configuration file instead of a control plane"),
    Setting("ca.address", https_address, None, "Certificate authority [xds.address]"),
    Setting("ca.root", roots, None, "Its root certificates [xds.root]"),
    Setting("ca.token", path, None, "File with the token for it [xds.token]"),
    Setting(
        "ca.alt-hostname",
        words,
        None,
        "A further name its certificate may carry [xds.alt-hostname]",
    ),
    Setting("ca.headers", headers, {}, "Further headers, name=value [xds.headers]"),
    # facts ztunnel 14, SECRET_TTL
    Setting("ca.ttl", positive_duration, timedelta(hours=24), "Asked lifetime of certificates"),
    Setting(
        "ca.spire-socket",
        socket_path,
        None,
        "Admin socket of a SPIRE agent that supplies certificates with their keys, instead of a CA",
    ),
    Setting("trust.crl", path, None, "File with the CRL, PEM or DER, followed as it changes"),
    Setting(
        "trust.aliases",
        trust_domains,
        (),
        "Trust domains that count as this mesh's own, joined by commas",
    ),
    Setting(
        "trust.compliance-policy",
        one_of("none", "pqc"),
        "none",
        "pqc: only the post-quantum key exchange",
    ),
    Setting(
        "trust.overlap",
        positive_duration,
        # Every identity of a node is renewed within a minute; the rest is for a CA that is slow.
        timedelta(minutes=10),
        "How long roots count that the CA's answers no longer hold",
    ),
    Setting(
        "dataplane.socket", path, None, "Control socket of a data plane that somebody else starts"
    ),
    Setting("dataplane.bin", path, None, "The underpass-dataplane to start [beside python, PATH]"),
    Setting(
        "dataplane.workers",
        count(0, 1024),
        0,
        "Worker threads of the data plane; 0: half the cores",
    ),
    Setting("dataplane.cgroup-parent", words, "auto", "cgroup2 folder for its leaf, auto, or none"),
    # facts ztunnel 11.4
    Setting(
        "dataplane.drain-deadline",
        positive_duration,
        timedelta(seconds=5),
        "Time for connections to end",
    ),
    Setting("ports.outbound", port, 15001, "Listener for captured outbound traffic, in each pod"),
    Setting("ports.inbound-plaintext", port, 15006, "Listener for captured inbound traffic"),
    Setting("ports.inbound-hbone", port, 15008, "Listener for HBONE"),
    Setting("ports.dns", port, 15053, "Listeners for captured DNS, on the pod's loopback"),
    # facts ztunnel 9.1
    Setting("dns.capture", switch, True, "Answer the DNS of pods; a pod may opt out"),
    Setting("dns.cluster-domain", dns_domain, "cluster.local", "Domain of the cluster's services"),
    Setting(
        "dns.nameservers",
        nameservers,
        (),
        "Asked for pods whose resolv.conf isn't known: ip or ip:port,… [the agent's own]",
    ),
    Setting(
        "dns.preferred-namespace", text, "", "Whose services go before those of other namespaces"
    ),
    Setting(
        "dns.forward-timeout", positive_duration, timedelta(seconds=5), "A nameserver's answer"
    ),
    Setting("dns.cache-entries", count(1, 1_000_000), 8192, "Nameservers' answers kept"),
    Setting(
        "dns.pod-max-pending", count(1, 100_000), 1024, "Questions of one pod that wait for answers"
    ),
    Setting(
        "socks5.port",
        port_or_off,
        None,
        "SOCKS5 listener on 127.0.0.1 in each pod: a port (upstream's is 15080), or off [off]",
    ),
    # facts ztunnel 3.2; a frame's bounds are those of RFC 9113, 6.5.2
    Setting("http2.stream-window", count(65_535, 2**31 - 1), 4 << 20, "HTTP/2 window, bytes"),
    Setting("http2.connection-window", count(65_535, 2**31 - 1), 16 << 20, "The same of a tunnel"),
    Setting("http2.frame-size", count(16_384, 2**24 - 1), 1 << 20, "Largest HTTP/2 frame, bytes"),
    # facts ztunnel 1.2
    Setting("keepalive.enabled", switch, True, "TCP keepalive on every connection"),
    Setting("keepalive.time", whole_seconds, timedelta(seconds=180), "Idle before the first"),
    Setting("keepalive.interval", whole_seconds, timedelta(seconds=180), "Between two of them"),
    Setting("keepalive.retries", count(1, 127), 9, "Unanswered ones before the end"),
    Setting("keepalive.user-timeout", switch, False, "Unacknowledged data ends it as well"),
    Setting(
        "admin.address",
        loopback,
        Listen("localhost", 15000),
        "Dump and log levels, on the loopback: localhost:port, address:port, or off",
    ),
    Setting(
        "admin.allow-changes",
        switch,
        False,
        "That address also changes log levels and ends the agent, for every local process",
    ),
    Setting("stats.address", listen, Listen("", 15020), "Metrics: host:port, :port, or off"),
    # facts ztunnel 11.6
    Setting(
        "stats.hbone",
        switch,
        False,
        "Metrics over HBONE too: as the agent's own pod (pod.*), on its port for HBONE",
    ),
    Setting("ready.address", listen, Listen("", 15021), "Readiness: host:port, :port, or off"),
    Setting("log.format", one_of("text", "json"), "text", "Log format of both processes"),
    Setting("log.filter", words, "info", "Log filter, for example info,underpass=debug"),
    Setting("log.access", switch, True, "Access log lines of connections that ended well"),
    Setting(
        "log.sample",
        count(1, 1_000_000),
        1,
        "One in so many of these lines is written; those of failures all are",
    ),
    Setting(
        "log.omit-fields", access_fields, (), "Access log fields left out, for example src.addr"
    ),
    # facts ztunnel 12.5
    Setting(
        "log.queue",
        count(1, 10_000_000),
        10_000,
        "Lines of the data plane that may wait to be written; more are lost and counted",
    ),
    Setting("log.policy-decisions", switch, False, "Policy decisions at info instead of debug"),
    Setting(
        "telemetry.otlp-endpoint",
        http_address,
        None,
        "Collector for access log and spans by OTLP over gRPC, http://host:port",
    ),
    # Some scrapes, so that the last counts of a pod that went are seen.
    Setting(
        "telemetry.series-ttl",
        positive_duration,
        timedelta(minutes=15),
        "Metrics of workloads that are gone for so long are dropped",
    ),
    Setting("telemetry.istio-version", text, "", "Version shown by istio_build [unknown]"),
    Setting("limits.connect-timeout", positive_duration, timedelta(seconds=10), "TCP connect"),
    Setting(
        "limits.tls-handshake-timeout", positive_duration, timedelta(seconds=10), "TLS handshake"
    ),
    Setting(
        "limits.connect-answer-timeout",
        positive_duration,
        timedelta(seconds=10),
        "CONNECT to its answer",
    ),
    Setting(
        "limits.workload-wait",
        positive_duration,
        timedelta(seconds=5),
        "Own record or certificate missing",
    ),
    Setting(
        "limits.preface-timeout",
        positive_duration,
        timedelta(seconds=10),
        "From a finished TLS handshake to the HTTP/2 preface",
    ),
    Setting("limits.pool-max-streams", count(1, 1_000_000), 100, "Streams of one tunnel"),
    Setting("limits.pool-idle", positive_duration, timedelta(minutes=5), "Idle tunnel kept"),
    Setting("limits.pool-max-tunnels", count(1, 1_000_000), 4096, "Tunnels kept for one pod"),
    Setting(
        "limits.pod-max-connections", count(1, 10_000_000), 16384, "Live connections of one pod"
    ),
    Setting(
        "limits.pod-max-handshakes", count(1, 1_000_000), 1024, "TLS handshakes in flight at a pod"
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
