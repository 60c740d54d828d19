"""Connects to an echo server in an unusual way, and converses.

Run as `python -m tests.attacks.odd_sockets CASE HOST PORT MARKER`.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
from typing import TYPE_CHECKING

from tests.attacks import uring
from tests.attacks.talk import (
    PATIENCE,
    attempt,
    connected,
    converse,
    error_name,
    family,
    report,
    sockaddr,
    stream,
)

if TYPE_CHECKING:
    from collections.abc import Callable

IPPROTO_MPTCP = 262
TCP_MD5SIG = 14
TCP_FASTOPEN_CONNECT = 30
IP_FREEBIND, IP_TRANSPARENT = 15, 19
IPV6_TRANSPARENT, IPV6_FREEBIND = 75, 78


def main(case: str, host: str, port: int, marker: str) -> None:
    kind, _, value = case.partition("=")
    if kind in EARLY:
        _speak_first(case, EARLY[kind], host, port, marker)
    else:
        attempt(case, lambda: CASES[kind](host, port, value), marker)


def plain(host: str, port: int, _: str) -> socket.socket:
    return connected(stream(host), host, port)


def mptcp(host: str, port: int, _: str) -> socket.socket:
    return connected(stream(host, IPPROTO_MPTCP), host, port)


def mapped(host: str, port: int, _: str) -> socket.socket:
    """An IPv4 destination on an IPv6 socket."""
    return connected(stream("::"), f"::ffff:{host}", port)


def mapped_mptcp(host: str, port: int, _: str) -> socket.socket:
    return connected(stream("::", IPPROTO_MPTCP), f"::ffff:{host}", port)


def non_blocking(host: str, port: int, _: str) -> socket.socket:
    sock = stream(host)
    sock.setblocking(False)
    failure = sock.connect_ex((host, port))
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    if not poll.poll(PATIENCE * 1000):
        raise TimeoutError
    failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if failure:
        raise OSError(failure, os.strerror(failure))
    return sock


def io_uring(host: str, port: int, how: str) -> socket.socket:
    sock = stream(host)
    sock.setblocking(True)
    uring.connect(sock, host, port, kernel_thread=how == "sqpoll")
    return sock


def option_memory(host: str, port: int, count: str) -> socket.socket:
    """Signing keys until no memory for options is left to the socket."""
    sock = stream(host)
    made = 0
    try:
        while made < 10_000:
            # Of TEST-NET addresses: nothing is signed that this test sends.
            foreign = sockaddr(f"198.18.{made >> 8}.{made & 255}", 0).ljust(128, b"\0")
            key = struct.pack("=128sBBHI80s", foreign, 0, 0, 4, 0, b"key0")
            sock.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, key)
            made += 1
    except OSError as exc:
        report("keys", made=made, error=error_name(exc), enough=made == int(count))
    return connected(sock, host, port)


def device(host: str, port: int, name: str) -> socket.socket:
    sock = stream(host)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
    return connected(sock, host, port)


def mark(host: str, port: int, value: str) -> socket.socket:
    sock = stream(host)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, int(value, 16))
    return connected(sock, host, port)


def mark_bound(host: str, port: int, value: str) -> socket.socket:
    """A mark that leads to another route is no reason to choose another source address."""
    number, _, source = value.partition(",")
    sock = stream(host)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, int(number, 16))
    sock.bind((source, 0))
    return connected(sock, host, port)


def transparent(host: str, port: int, source: str) -> socket.socket:
    """From an address that is another pod's."""
    return connected(_foreign(host, source, IP_TRANSPARENT, IPV6_TRANSPARENT), host, port)


def free_bind(host: str, port: int, source: str) -> socket.socket:
    return connected(_foreign(host, source, IP_FREEBIND, IPV6_FREEBIND), host, port)


def loopback_source(host: str, port: int, source: str) -> socket.socket:
    sock = stream(host)
    sock.bind((source, 0))
    return connected(sock, host, port)


def source_port(host: str, port: int, local: str) -> socket.socket:
    sock = stream(host)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", int(local)))
    return connected(sock, host, port)


def fast_open(sock: socket.socket, host: str, port: int, data: bytes) -> None:
    sock.sendto(data, socket.MSG_FASTOPEN, (host, port))


def fast_open_connect(sock: socket.socket, host: str, port: int, data: bytes) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    sock.connect((host, port))
    sock.sendall(data)


def device_late(sock: socket.socket, host: str, port: int, data: bytes) -> None:
    """Bound to a device when it is connected already."""
    sock.bind((_own(host), 0))
    sock.connect((host, port))
    _leave_by_device(sock, data)


def device_before_syn(sock: socket.socket, host: str, port: int, data: bytes) -> None:
    """Bound to a device after connect, but before anything was sent."""
    sock.bind((_own(host), 0))
    sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    sock.connect((host, port))
    _leave_by_device(sock, data)


def _leave_by_device(sock: socket.socket, data: bytes) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    sock.sendall(data)


def _own(host: str) -> str:
    """Which address this namespace has towards another."""
    with socket.socket(family(host), socket.SOCK_DGRAM) as sock:
        sock.connect((host, 9))
        return str(sock.getsockname()[0])


def _foreign(host: str, source: str, option_v4: int, option_v6: int) -> socket.socket:
    sock = stream(host)
    if ":" in host:
        sock.setsockopt(socket.IPPROTO_IPV6, option_v6, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, option_v4, 1)
    sock.bind((source, 0))
    return sock


def _speak_first(
    case: str,
    send: Callable[[socket.socket, str, int, bytes], None],
    host: str,
    port: int,
    marker: str,
) -> None:
    """Data leaves with the SYN where the kernel may."""
    with stream(host) as sock:
        # A socket with a timeout of Python's doesn't block: half of these calls would be lost.
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@2l", int(PATIENCE), 0))
        try:
            send(sock, host, port, f"{marker}\n".encode())
            report(case, **converse(sock, marker, sent=True))
        except OSError as exc:
            report(case, error=error_name(exc))


CASES: dict[str, Callable[[str, int, str], socket.socket]] = {
    "plain": plain,
    "mptcp": mptcp,
    "mapped": mapped,
    "mapped_mptcp": mapped_mptcp,
    "non_blocking": non_blocking,
    "io_uring": io_uring,
    "option_memory": option_memory,
    "device": device,
    "mark": mark,
    "mark_bound": mark_bound,
    "transparent": transparent,
    "free_bind": free_bind,
    "loopback_source": loopback_source,
    "source_port": source_port,
}
EARLY = {
    "fast_open": fast_open,
    "fast_open_connect": fast_open_connect,
    "device_late": device_late,
    "device_before_syn": device_before_syn,
}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
