"""Stable addresses for services that were given none (facts istio-ambient 6.5)."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import overload

from controlplane.sources.fields import Ip

# (v4, v6); None where the family isn't wanted or has no range.
Assigned = tuple[IPv4Address | None, IPv6Address | None]


@dataclass(frozen=True)
class Ranges:
    v4: IPv4Network | None
    v6: IPv6Network | None


@dataclass(frozen=True)
class Assignment:
    """`problems` name the services that go without, and what to do."""

    vips: Mapping[str, Assigned]
    problems: tuple[str, ...]


def assign(
    wanted: Iterable[str],
    taken: frozenset[Ip],
    before: Mapping[str, Assigned],
    ranges: Ranges,
) -> Assignment:
    """Addresses for all of `wanted`, and the remembered ones of services that are away.

    A service keeps what it has unless somebody else was given that address by hand. A new one gets
    the address its name hashes to, or the next free one after it.
    """
    names = sorted(set(wanted))
    kept: dict[str, Assigned] = {}
    used: set[Ip] = set(taken)
    for name, (v4, v6) in sorted(before.items()):
        good4 = v4 if v4 and ranges.v4 and v4 in ranges.v4 and v4 not in used else None
        good6 = v6 if v6 and ranges.v6 and v6 in ranges.v6 and v6 not in used else None
        kept[name] = (good4, good6)
        used.update(ip for ip in (good4, good6) if ip)
    problems: list[str] = []
    for name in names:
        have4, have6 = kept.get(name, (None, None))
        if have4 is None and ranges.v4:
            have4 = _free(name, ranges.v4, used)
            if have4 is None:
                problems.append(_full(name, ranges.v4))
        if have6 is None and ranges.v6:
            have6 = _free(name, ranges.v6, used)
            if have6 is None:
                problems.append(_full(name, ranges.v6))
        kept[name] = (have4, have6)
        used.update(ip for ip in (have4, have6) if ip)
    return Assignment(kept, tuple(problems))


@overload
def _free(name: str, network: IPv4Network, used: set[Ip]) -> IPv4Address | None: ...
@overload
def _free(name: str, network: IPv6Network, used: set[Ip]) -> IPv6Address | None: ...
def _free(name: str, network: IPv4Network | IPv6Network, used: set[Ip]) -> Ip | None:
    # Neither the first nor the last: some stacks treat them as the network's own.
    size = network.num_addresses - 2
    digest = hashlib.sha256(name.encode()).digest()
    start = int.from_bytes(digest[:8], "big") % size
    for step in range(min(size, len(used) + 1)):
        found = network[1 + (start + step) % size]
        if found not in used:
            return found
    return None


def _full(name: str, network: IPv4Network | IPv6Network) -> str:
    return f"{network} has no free address for {name}: give a larger --vip-range"
