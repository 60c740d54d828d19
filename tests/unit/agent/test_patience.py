"""Who sends no head of a request in time is let go; all others are served however long it takes."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.agent.test_admin import Node

HEAD = b"GET /healthz/ready HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path)
    async with made.servers:
        yield made
    await made.reconciler.close()
    await made.feed.close()
    await made.supervisor.close()


async def connect(node: Node, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if name == "api":
        return await asyncio.open_unix_connection(node.paths.admin_socket)
    host, _, port = node.servers.bound[name].rpartition(":")
    return await asyncio.open_connection(host.strip("[]"), int(port))


async def trickle(writer: asyncio.StreamWriter, head: bytes) -> None:
    """A byte every 100 ms, each on its way in time."""
    for byte in head:
        writer.write(bytes([byte]))
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("name", ["stats", "ready", "admin", "api"])
@pytest.mark.parametrize("says", [b"", HEAD], ids=["nothing", "a byte now and then"])
async def test_whoever_sends_no_head_in_two_seconds_is_let_go(
    node: Node, name: str, says: bytes
) -> None:
    reader, writer = await connect(node, name)
    began = asyncio.get_running_loop().time()
    talking = asyncio.create_task(trickle(writer, says))
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    took = asyncio.get_running_loop().time() - began
    assert 1.5 < took < 5
    talking.cancel()
    writer.close()


async def test_a_connection_that_is_kept_may_rest_but_not_dawdle(node: Node) -> None:
    reader, writer = await connect(node, "ready")
    for _ in range(2):
        writer.write(HEAD + b"\r\n")
        async with asyncio.timeout(5):
            await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(b"\n")
        # Longer than a head may take: between two requests nobody hurries.
        await asyncio.sleep(2.5)
    began = asyncio.get_running_loop().time()
    writer.write(HEAD)
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    assert 1.5 < asyncio.get_running_loop().time() - began < 5
    writer.close()


async def test_slow_ones_keep_nobody_out(node: Node) -> None:
    slow = [await connect(node, "ready") for _ in range(200)]
    reader, writer = await connect(node, "ready")
    writer.write(HEAD + b"Connection: close\r\n\r\n")
    async with asyncio.timeout(5):
        assert (await reader.read()).startswith(b"HTTP/1.1 ")
    for _, other in [*slow, (reader, writer)]:
        other.close()
