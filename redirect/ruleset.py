"""The nftables rules of one pod, as text (facts istio-ambient 3.3, and what differs from them).

Differences, each of them narrower than upstream: inbound capture takes what is addressed to the
pod, not what it forwards; the data plane is exempt by cgroup and mark; a reply is known by its
connection mark, not by a packet mark that a process could set itself; the chain `refuse` turns away
TCP that leaves the pod although no rule redirected it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from redirect import datagram_rules
from redirect.base import INTERFACE, NotRetryable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from redirect.base import CaptureConfig, Target
    from redirect.cgroups import CgroupMatch

FAMILY = "inet"
TABLE = "underpass"

# Marks share the word with other users of it: only these bits are ours (facts istio-ambient 3.1).
MARK_MASK = 0xFFF
REPLY_MARK = 0x111
# Replies of a local DNS resolver must not meet the connection of the captured query.
DNS_ZONE = 1

_SYN = "tcp flags & (fin | syn | rst | ack) == syn"


def render(config: CaptureConfig, target: Target, exempt: Sequence[CgroupMatch]) -> str:
    """One transaction that replaces the whole table; NAT mappings of live connections stay.

    With an empty `exempt` the mark alone exempts. Raises NotRetryable for a description that
    can't be written as rules.
    """
    dns = config.ports.dns if target.dns else None
    chains = [
        _chain("mangle_prerouting", "filter hook prerouting priority -150", _remember(config)),
        _chain("mangle_output", "route hook output priority -150", _restore()),
        _chain("nat_prerouting", "nat hook prerouting priority -100", _inbound(config, target)),
        _chain("nat_output", "nat hook output priority -100", _outbound(config, exempt, dns)),
        _chain("refuse", None, _refuse(config, exempt)),
        _chain("udp_leaving", None, datagram_rules.leaving(target, _exempt(config, exempt))),
        _chain("udp_entering", None, datagram_rules.entering(target)),
        _chain("filter_output", "filter hook output priority 0", _check_output()),
        _chain("filter_postrouting", "filter hook postrouting priority 0", _check_leaving()),
    ]
    if not target.bypass_inbound:
        chains.append(_chain("refuse_inbound", None, _refuse_inbound(config)))
    chains.append(
        _chain("filter_input", "filter hook input priority 0", _check_inbound(config, target))
    )
    if target.virtual_interfaces:
        chains.append(_chain("udp_passed_on", None, datagram_rules.passed_on(target)))
        chains.append(
            _chain("filter_forward", "filter hook forward priority 0", _check_passed_on(target))
        )
    if dns is not None:
        chains.append(
            _chain("raw_prerouting", "filter hook prerouting priority -300", _dns_answers(config))
        )
        chains.append(
            _chain("raw_output", "filter hook output priority -300", _dns_queries(config))
        )
    body = "\n".join(chains)
    return f"{delete()}table {FAMILY} {TABLE} {{\n{datagram_rules.counters()}{body}}}\n"


def render_draining(config: CaptureConfig, target: Target) -> str:
    """One transaction that leaves of the table what captured connections need to go on: the hooks
    that translate them, and the way back to the data plane. New ones meet no rule.

    A UDP socket of the app keeps its mapping to the data plane for as long as it asks; in the zone
    it asks anew.
    """
    chains = [
        _chain("mangle_prerouting", "filter hook prerouting priority -150", _remember(config)),
        _chain("mangle_output", "route hook output priority -150", _restore()),
        # Empty: without a chain of this type the kernel translates no packet any more.
        _chain("nat_prerouting", "nat hook prerouting priority -100", iter(())),
        _chain("nat_output", "nat hook output priority -100", iter(())),
        _chain("filter_postrouting", "filter hook postrouting priority 0", _check_leaving()),
    ]
    if target.dns and config.ports.dns is not None:
        answers = _rule(
            'iifname != "lo" udp sport 53', f"ct zone set {DNS_ZONE}", "dns-answer-zone"
        )
        queries = _rule('oifname != "lo" udp dport 53', f"ct zone set {DNS_ZONE}", "dns-query-zone")
        chains.append(
            _chain("raw_prerouting", "filter hook prerouting priority -300", iter((answers,)))
        )
        chains.append(_chain("raw_output", "filter hook output priority -300", iter((queries,))))
    body = "\n".join(chains)
    return f"{delete()}table {FAMILY} {TABLE} {{\n{body}}}\n"


def first(text: str) -> str:
    """Of `render`, for a namespace that has no such table: an error where it has one. To delete a
    table takes the kernel some 15 ms, for it waits until nobody reads it any more (seen, 6.18)."""
    return f"create table {FAMILY} {TABLE}\n{text.removeprefix(delete())}"


def delete() -> str:
    """Deletes the table whether it is there or not: adding first makes the deletion valid."""
    return f"add table {FAMILY} {TABLE}\ndelete table {FAMILY} {TABLE}\n"


def _chain(name: str, hook: str | None, rules: Iterator[str]) -> str:
    lines = [f"\tchain {name} {{"]
    if hook is not None:
        lines.append(f"\t\ttype {hook}; policy accept;")
    lines += [f"\t\t{rule}" for rule in rules]
    return "\n".join([*lines, "\t}\n"])


def _rule(match: str, verdict: str, name: str) -> str:
    return f'{match} counter {verdict} comment "{name}"'


def _remember(config: CaptureConfig) -> Iterator[str]:
    # The data plane reaches the app over lo, with the client's address as source.
    yield _rule(
        f'iifname "lo" {_marked(config.mark)}',
        f"ct mark set ct mark & {~MARK_MASK & 0xFFFFFFFF:#010x} | {REPLY_MARK:#x}",
        "remember-spoofed",
    )


def _restore() -> Iterator[str]:
    # A route chain: the changed mark sends the app's reply through table 100 back to lo.
    yield _rule(f"ct direction reply {_proxied()}", "meta mark set ct mark", "reply-to-spoofed")


def _inbound(config: CaptureConfig, target: Target) -> Iterator[str]:
    for interface in target.virtual_interfaces:
        if interface == "lo" or not INTERFACE.fullmatch(interface):
            raise NotRetryable(f"{target.name}: {interface!r} can't be a virtual interface")
        yield _rule(
            f'iifname "{interface}" meta l4proto tcp',
            f"redirect to :{config.ports.outbound}",
            f"virtual-interface-{interface}",
        )
    if target.bypass_inbound:
        return
    for address in config.probe_addresses:
        yield _rule(
            f"meta l4proto tcp {_ip(address.version)} saddr {address}",
            "accept",
            f"probe-in-{address}",
        )
    for version in _versions(config):
        yield _rule(
            # What the pod only forwards isn't meant for it.
            f"{_not_loopback(version)} tcp dport != {config.ports.inbound_hbone}"
            f" {_unmarked(config.mark)} fib daddr type local",
            f"redirect to :{config.ports.inbound_plaintext}",
            f"inbound-v{version}",
        )


def _outbound(
    config: CaptureConfig, exempt: Sequence[CgroupMatch], dns: int | None
) -> Iterator[str]:
    yield from _exempt(config, exempt)
    yield from _probes_out(config)
    if dns is not None:
        yield _rule('oifname != "lo" udp dport 53', f"redirect to :{dns}", "dns-udp")
        for version in _versions(config):
            yield _rule(
                f"{_not_loopback(version)} tcp dport 53",
                f"redirect to :{dns}",
                f"dns-tcp-v{version}",
            )
    yield _rule(f"meta l4proto tcp ct direction reply {_proxied()}", "accept", "reply")
    yield _rule('oifname "lo"', "accept", "self-call")
    for version in _versions(config):
        yield _rule(
            f"meta l4proto tcp {_not_loopback(version)}",
            f"redirect to :{config.ports.outbound}",
            f"outbound-v{version}",
        )


def _refuse(config: CaptureConfig, exempt: Sequence[CgroupMatch]) -> Iterator[str]:
    """Only for packets that open a TCP connection and leave the pod."""
    yield from _exempt(config, exempt)
    yield _rule("ct status dnat", "accept", "captured")
    yield from _probes_out(config)
    # A connection gets its NAT mapping with its first packet only. A process that makes that one
    # go over lo (a mark, another route) and the next one out would get past nat_output.
    yield _rule("meta l4proto tcp", "reject with tcp reset", "uncaptured")


def _check_output() -> Iterator[str]:
    yield datagram_rules.entry('oifname != "lo"', "udp_leaving")
    yield _rule(f'oifname != "lo" {_SYN}', "jump refuse", "leaving")


def _check_leaving() -> Iterator[str]:
    # A socket bound to a device keeps it although its packet was redirected to loopback.
    yield _rule('oifname != "lo" ip daddr 127.0.0.0/8', "drop", "loopback-leak-v4")
    yield _rule('oifname != "lo" ip6 daddr ::1', "drop", "loopback-leak-v6")


def _refuse_inbound(config: CaptureConfig) -> Iterator[str]:
    """Only for packets that open a TCP connection and come from outside the pod."""
    yield _rule("ct status dnat", "accept", "captured-inbound")
    own = f"{{ {config.ports.inbound_plaintext}, {config.ports.inbound_hbone} }}"
    yield _rule(f"tcp dport {own}", "accept", "to-data-plane")
    for address in config.probe_addresses:
        yield _rule(
            f"meta l4proto tcp {_ip(address.version)} saddr {address}",
            "accept",
            f"probe-let-in-{address}",
        )
    # Tracking finds some packets invalid for what it remembers of their addresses and ports, and
    # translates none of those: a SYN on the tuple of an older connection that was reset (seen).
    yield _rule(
        f"meta l4proto tcp {_unmarked(config.mark)}", "reject with tcp reset", "uncaptured-inbound"
    )


def _check_inbound(config: CaptureConfig, target: Target) -> Iterator[str]:
    yield datagram_rules.entry('iifname != "lo"', "udp_entering")
    if target.bypass_inbound:
        return
    if not config.ipv6:
        yield _rule(
            f'meta nfproto ipv6 iifname != "lo" {_SYN}', "reject with tcp reset", "inbound-v6-off"
        )
    yield _rule(f'iifname != "lo" {_SYN}', "jump refuse_inbound", "entering")


def _check_passed_on(target: Target) -> Iterator[str]:
    """Of virtual machines: TCP that no rule redirected, and what the mesh doesn't carry."""
    names = ", ".join(f'"{interface}"' for interface in target.virtual_interfaces)
    yield datagram_rules.entry(f"iifname {{ {names} }}", "udp_passed_on")
    yield _rule(f"iifname {{ {names} }} {_SYN}", "reject with tcp reset", "uncaptured-through")


def _dns_answers(config: CaptureConfig) -> Iterator[str]:
    yield _rule(
        f"udp sport 53 {_unmarked(config.mark)}", f"ct zone set {DNS_ZONE}", "dns-answer-zone"
    )


def _dns_queries(config: CaptureConfig) -> Iterator[str]:
    yield _rule(f"udp dport 53 {_marked(config.mark)}", f"ct zone set {DNS_ZONE}", "dns-query-zone")


def _exempt(config: CaptureConfig, exempt: Sequence[CgroupMatch]) -> Iterator[str]:
    if not exempt:
        yield _rule(_marked(config.mark), "accept", "data-plane-by-mark")
    for number, cgroup in enumerate(exempt, 1):
        yield _rule(
            f'{_marked(config.mark)} socket cgroupv2 level {cgroup.level} "{cgroup.path}"',
            "accept",
            f"data-plane-{number}",
        )


def _probes_out(config: CaptureConfig) -> Iterator[str]:
    for address in config.probe_addresses:
        yield _rule(
            f"meta l4proto tcp {_ip(address.version)} daddr {address}",
            "accept",
            f"probe-out-{address}",
        )


def _versions(config: CaptureConfig) -> tuple[int, ...]:
    return (4, 6) if config.ipv6 else (4,)


def _ip(version: int) -> str:
    return "ip" if version == 4 else "ip6"


def _not_loopback(version: int) -> str:
    return "ip daddr != 127.0.0.0/8" if version == 4 else "ip6 daddr != ::1"


def _marked(mark: int) -> str:
    return f"meta mark & {MARK_MASK:#x} == {mark:#x}"


def _unmarked(mark: int) -> str:
    return f"meta mark & {MARK_MASK:#x} != {mark:#x}"


def _proxied() -> str:
    return f"ct mark & {MARK_MASK:#x} == {REPLY_MARK:#x}"
