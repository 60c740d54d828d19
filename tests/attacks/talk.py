"""What every program of this folder does with a socket, and how it tells its test: one line of
JSON an attempt. No program judges; the tests do."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Long enough for a busy machine; an attempt whose packets are dropped costs this much.
PATIENCE = 3.0

libc = ctypes.CDLL(None, use_errno=True)


def report(name: str, **facts: Any) -> None:
    print(json.dumps({"name": name, **facts}), flush=True)


def attempt(name: str, opened: Callable[[], socket.socket], marker: str) -> None:
    """Connects and converses with the echo server; reports whatever happens."""
    sock: socket.socket | None = None
    try:
        sock = opened()
        report(name, **converse(sock, marker))
    except OSError as exc:
        report(name, error=error_name(exc))
    finally:
        if sock is not None:
            sock.close()


def converse(sock: socket.socket, marker: str, *, sent: bool = False) -> dict[str, Any]:
    """Greeting, one echoed line, and the ends as the application sees them. Raises OSError."""
    facts: dict[str, Any] = {
        "peer": _plain(sock.getpeername()),
        "local": _plain(sock.getsockname()),
    }
    sock.setblocking(True)
    sock.settimeout(PATIENCE)
    greeting = line(sock)
    if not greeting:
        return facts | {"error": "EOF"}
    if not sent:
        sock.sendall(f"{marker}\n".encode())
    return facts | {"greeting": greeting, "echoed": line(sock) == marker}


def line(sock: socket.socket) -> str:
    """Up to the end of line or of the stream. Raises OSError, TimeoutError among them."""
    data = b""
    deadline = time.monotonic() + PATIENCE
    while not data.endswith(b"\n"):
        if time.monotonic() > deadline:
            raise TimeoutError
        got = sock.recv(1)
        if not got:
            break
        data += got
    return data.decode().rstrip("\n")


def error_name(exc: OSError) -> str:
    if isinstance(exc, TimeoutError) and exc.errno is None:
        return "ETIMEDOUT"
    return errno.errorcode.get(exc.errno or 0, type(exc).__name__)


def stream(host: str, protocol: int = 0) -> socket.socket:
    """A TCP socket of the family of `host`, with its patience set."""
    made = socket.socket(family(host), socket.SOCK_STREAM, protocol)
    made.settimeout(PATIENCE)
    return made


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def connected(sock: socket.socket, host: str, port: int) -> socket.socket:
    """Closes the socket when it can't be connected. Raises OSError."""
    try:
        sock.connect((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def sockaddr(host: str, port: int) -> bytes:
    """As the kernel reads it."""
    raw = socket.inet_pton(family(host), host)
    if len(raw) == 4:
        return struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", port, raw)
    return struct.pack("=H", socket.AF_INET6) + struct.pack("!HI16sI", port, 0, raw, 0)


def disconnect(sock: socket.socket) -> None:
    """connect(AF_UNSPEC), which Python has no word for."""
    call("connect", sock.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16)


def call(function: str, *arguments: Any) -> int:
    """A libc function that sets errno. Raises OSError."""
    result = int(getattr(libc, function)(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), function)
    return result


def _plain(address: Any) -> list[Any]:
    return [str(address[0]).removeprefix("::ffff:"), address[1]]
