"""What the control plane is told, and the check that reports all mistakes together."""

import re
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

EXIT_USAGE = 64  # EX_USAGE of sysexits.h, as the agent's configuration uses it

_NAME = re.compile(r"[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class Options:
    """Times are of leaf certificates; an empty `network` is the nameless one, as istiod's."""

    manifests: Path
    state: Path
    # 15012 is where agents look for a control plane with TLS (facts ztunnel 7.1).
    listen: tuple[str, ...] = ("127.0.0.1:15012",)
    trust_domain: str = "cluster.local"
    cluster_id: str = "Kubernetes"
    network: str = ""
    root_namespace: str = "istio-system"
    # Ranges that Istio allocates from (facts istio-ambient 6.5): reserved, so never routed.
    vip_ranges: tuple[str, ...] = ("240.240.0.0/16", "2001:2::/48")
    extra_sans: tuple[str, ...] = ()
    # Facts istio-ambient 7.1: 24 h when none is asked for, 2160 h at most.
    certificate_ttl: timedelta = timedelta(hours=24)
    max_certificate_ttl: timedelta = timedelta(hours=2160)


class OptionsError(ValueError):
    """All mistakes of one set of options."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def check(options: Options) -> None:
    """Raises OptionsError naming every option that can't work and what would."""
    problems: list[str] = []
    if not options.manifests.is_dir():
        problems.append(f"--manifests {options.manifests}: not a folder: create it or name another")
    if options.state.exists() and not options.state.is_dir():
        problems.append(f"--state {options.state}: is not a folder: name one that may be created")
    if not options.listen:
        problems.append("--listen: give at least one address, for example 127.0.0.1:15012")
    for address in options.listen:
        try:
            parse_listen(address)
        except ValueError as error:
            problems.append(f"--listen {address}: {error}")
    for flag, value in (
        ("--trust-domain", options.trust_domain),
        ("--cluster-id", options.cluster_id),
        ("--root-namespace", options.root_namespace),
    ):
        if not _NAME.fullmatch(value):
            problems.append(f"{flag} {value!r}: use letters, digits, '.', '-' and '_'")
    if options.network and not _NAME.fullmatch(options.network):
        problems.append(f"--network {options.network!r}: use letters, digits, '.', '-' and '_'")
    try:
        parse_ranges(options.vip_ranges)
    except ValueError as error:
        problems.append(f"--vip-range: {error}")
    for san in options.extra_sans:
        if not _NAME.fullmatch(san) and ":" not in san:
            problems.append(f"--san {san!r}: give a DNS name or an IP address")
    if options.certificate_ttl <= timedelta(0):
        problems.append("--certificate-ttl: must be longer than nothing")
    if options.certificate_ttl > options.max_certificate_ttl:
        problems.append("--certificate-ttl: is longer than --max-certificate-ttl")
    if problems:
        raise OptionsError(problems)


def parse_listen(address: str) -> tuple[str, int]:
    """Splits `host:port` or `[v6]:port`; port 0 takes a free one. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or (":" in host and not host.startswith("[")):
        raise ValueError("write host:port, or [address]:port for IPv6")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"{port!r} is not a port (0 to 65535)")
    return host, int(port)


def parse_ranges(ranges: tuple[str, ...]) -> tuple[IPv4Network | None, IPv6Network | None]:
    """At most one range a family. Raises ValueError."""
    v4: IPv4Network | None = None
    v6: IPv6Network | None = None
    for text in ranges:
        network = ip_network(text)
        if network.num_addresses < 4:
            raise ValueError(f"{text} holds too few addresses")
        if isinstance(network, IPv4Network):
            if v4:
                raise ValueError(f"{text}: an IPv4 range is given already ({v4})")
            v4 = network
        else:
            if v6:
                raise ValueError(f"{text}: an IPv6 range is given already ({v6})")
            v6 = network
    return v4, v6
