"""Ended connections let go of a pod's ports, and nothing else does."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.netns import inside
from redirect import lingering
from redirect.base import RedirectError
from redirect.netns import NetnsThread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from agent.cli.demo.world import PodSandbox, World

    Free = Callable[[], Awaitable[int]]

PORT = 15001


@pytest.fixture
def pod(world: World, request: pytest.FixtureRequest) -> PodSandbox:
    return world.add_pod(world.nodes[0], f"p{abs(hash(request.node.name)) % 10_000}")


@pytest.fixture
async def free(pod: PodSandbox) -> AsyncIterator[Free]:
    threads = NetnsThread()
    fd = os.open(pod.path, os.O_RDONLY)
    yield lambda: lingering.free(threads, fd, {PORT}, subject="shop/p")
    os.close(fd)
    await threads.close()


def shared_listener() -> socket.socket:
    """As upstream's proxy listens: shared, and no SO_REUSEADDR."""
    made = socket.socket(socket.AF_INET6)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("::", PORT))
    made.listen()
    return made


def end_connections(listener: socket.socket) -> None:
    """Of both families; the listener's side closes first and keeps the TIME_WAIT."""
    for host in ("127.0.0.1", "::1"):
        client = socket.create_connection((host, PORT))
        accepted, _ = listener.accept()
        accepted.close()
        assert client.recv(1) == b""
        client.close()


def binds() -> bool:
    with socket.socket(socket.AF_INET6) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            ours.bind(("::", PORT))
            ours.listen()
        except OSError:
            return False
        return True


async def test_port_of_an_ended_proxy_is_free_at_once(pod: PodSandbox, free: Free) -> None:
    def end() -> None:
        with shared_listener() as listener:
            end_connections(listener)

    inside(pod.namespace, end)
    assert not inside(pod.namespace, binds)
    assert await free() == 2
    assert inside(pod.namespace, binds)
    assert await free() == 0


async def test_nothing_is_ended_while_somebody_listens(pod: PodSandbox, free: Free) -> None:
    ended, stop = threading.Event(), threading.Event()

    def serve() -> None:
        with shared_listener() as listener:
            end_connections(listener)
            ended.set()
            stop.wait()

    thread = threading.Thread(target=inside, args=(pod.namespace, serve))
    thread.start()
    ended.wait()
    assert await free() == 0
    stop.set()
    thread.join()
    assert await free() == 2


async def test_connection_that_lives_is_left_alone(pod: PodSandbox, free: Free) -> None:
    def living() -> tuple[socket.socket, socket.socket]:
        with shared_listener() as listener:
            client = socket.create_connection(("::1", PORT))
            return client, listener.accept()[0]

    client, accepted = inside(pod.namespace, living)
    with client, accepted:
        assert await free() == 0
        client.send(b"x")
        assert accepted.recv(1) == b"x"


async def test_what_is_no_namespace_is_an_error_that_names_the_pod() -> None:
    threads = NetnsThread()
    null = os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(RedirectError, match="shop/p"):
        await lingering.free(threads, null, {PORT}, subject="shop/p")
    os.close(null)
    await threads.close()
