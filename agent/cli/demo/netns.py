"""Doing something inside a named network namespace: a socket opened there stays there."""

import asyncio
import ctypes
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

FOLDER = Path("/run/netns")
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def inside(namespace: str, work: Callable[[], T]) -> T:
    """Runs `work` on a thread that lives in the namespace and is thrown away afterwards.

    Raises whatever `work` raises, OSError when there is no such namespace.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            with (FOLDER / namespace).open() as handle:
                if _libc.setns(handle.fileno(), CLONE_NEWNET):
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code), namespace)
            results.append(work())
        except BaseException as exc:  # handed to the caller below
            errors.append(exc)

    thread = threading.Thread(target=body, name=f"in {namespace}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def open_socket(
    namespace: str, family: socket.AddressFamily, kind: socket.SocketKind = socket.SOCK_STREAM
) -> socket.socket:
    """A non-blocking socket of that namespace."""

    def work() -> socket.socket:
        made = socket.socket(family, kind)
        made.setblocking(False)
        return made

    return inside(namespace, work)


async def connect(
    namespace: str, host: str, port: int, *, timeout: float = 10.0
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A TCP connection made from inside the namespace; raises OSError, TimeoutError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = open_socket(namespace, family)
    try:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout):
            await loop.sock_connect(sock, (host, port))
        return await asyncio.open_connection(sock=sock, limit=1 << 20)
    except BaseException:
        sock.close()
        raise
