"""Traffic that a pod forwards for somebody behind it, a virtual machine or a container of its own:
no socket of the pod carries it, so it goes past the mesh unless its interface is declared."""

from __future__ import annotations

import socket
from pathlib import Path

# Of the network namespace that the calling thread is in.
_FOLDER = Path("/proc/thread-self/net")
_ANYWHERE_V4, _ANYWHERE_V6 = "00000000", "0" * 32


def undeclared(declared: tuple[str, ...]) -> tuple[str, ...]:
    """Interfaces that something came in by, other than `declared` and those that lead out, in a
    namespace that forwarded packets. By name, sorted."""
    if not _forwarded():
        return ()
    spared = {"lo", *declared, *_leading_out()}
    known = {name for _, name in socket.if_nameindex()}
    return tuple(sorted((known & _receiving()) - spared))


def _forwarded() -> bool:
    """Since the namespace was made (RFC 4293, ipForwDatagrams)."""
    return _v4("ForwDatagrams") > 0 or _v6("Ip6OutForwDatagrams") > 0


def _v4(name: str) -> int:
    """A line of names, then one of values."""
    lines = [line.split() for line in _lines("snmp") if line.startswith("Ip:")]
    return int(dict(zip(*lines, strict=True)).get(name, 0)) if len(lines) == 2 else 0


def _v6(name: str) -> int:
    found = (line.split() for line in _lines("snmp6"))
    return next((int(fields[1]) for fields in found if fields[0] == name), 0)


def _leading_out() -> set[str]:
    """Those with a default route."""
    v4 = (line.split() for line in _lines("route")[1:])
    v6 = (line.split() for line in _lines("ipv6_route"))
    return {fields[0] for fields in v4 if fields[1] == fields[7] == _ANYWHERE_V4} | {
        fields[-1] for fields in v6 if fields[0] == _ANYWHERE_V6 and fields[1] == "00"
    }


def _receiving() -> set[str]:
    """Two lines of headings; then a name, and bytes and packets received first."""
    rows = (line.partition(":") for line in _lines("dev")[2:])
    return {name.strip() for name, _, rest in rows if int(rest.split()[1]) > 0}


def _lines(table: str) -> list[str]:
    """None of a kernel without IPv6."""
    try:
        return (_FOLDER / table).read_text().splitlines()
    except OSError:
        return []
