"""Rules for what the mesh doesn't carry though applications send it: UDP, UDP-Lite, SCTP, DCCP.

Flows are counted at the first packet of each tracked connection; DNS that was redirected is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from redirect.base import Target

# Named counters, in packets.
REFUSED = "udp_refused"
UNPROTECTED = "udp_unprotected"

# One that was confirmed had a packet before; "new" would last until somebody answers.
_FIRST = "ct status ! confirmed"


def counters() -> str:
    return "".join(f"\tcounter {name} {{\n\t}}\n\n" for name in (REFUSED, UNPROTECTED))


def leaving(target: Target, exempt: Iterator[str]) -> Iterator[str]:
    yield from exempt
    yield 'ct status dnat counter accept comment "dns-captured"'
    if not target.udp_deny:
        yield f'{_FIRST} counter name "{UNPROTECTED}" comment "unprotected-out"'
        return
    yield f'udp dport 53 {_FIRST} counter name "{UNPROTECTED}" comment "unprotected-dns"'
    yield 'udp dport 53 counter accept comment "dns-out"'
    # The sender sees EPERM, or ECONNREFUSED at its next call.
    yield f'counter name "{REFUSED}" reject with icmpx port-unreachable comment "refused-out"'


def entering(target: Target) -> Iterator[str]:
    if not target.udp_deny:
        yield (
            f'ct direction original {_FIRST} counter name "{UNPROTECTED}" comment "unprotected-in"'
        )
        return
    # To what could leave: questions to nameservers.
    yield 'ct direction reply counter accept comment "dns-answer"'
    yield f'counter name "{REFUSED}" reject with icmpx port-unreachable comment "refused-in"'


def passed_on(target: Target) -> Iterator[str]:
    """Of virtual machines; their DNS isn't captured."""
    if not target.udp_deny:
        yield f'{_FIRST} counter name "{UNPROTECTED}" comment "unprotected-through"'
        return
    yield f'udp dport 53 {_FIRST} counter name "{UNPROTECTED}" comment "unprotected-dns-through"'
    yield 'udp dport 53 counter accept comment "dns-through"'
    yield f'counter name "{REFUSED}" reject with icmpx port-unreachable comment "refused-through"'


def entry(devices: str, chain: str) -> str:
    """For a hook: `devices` is a match."""
    protocols = "meta l4proto { udp, dccp, sctp, udplite }"
    return f'{devices} {protocols} counter jump {chain} comment "{chain}"'
