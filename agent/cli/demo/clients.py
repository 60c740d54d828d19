"""Clients of the demo and the tests: what an application in a pod would do."""

import asyncio
import socket
from dataclasses import dataclass, field
from types import TracebackType

import aiohttp

from agent.cli.demo.manifests import Pod
from agent.cli.demo.netns import connect, open_socket


async def http_get(pod: Pod, host: str, port: int, path: str = "/", *, timeout: float = 10) -> str:
    """The body of one GET on a new connection; raises aiohttp.ClientError, OSError,
    TimeoutError, and ClientResponseError for a status other than 2xx."""
    where = f"[{host}]" if ":" in host else host
    connector = aiohttp.TCPConnector(
        force_close=True,
        socket_factory=lambda info: open_socket(
            pod.sandbox.namespace, socket.AddressFamily(info[0])
        ),
    )
    limit = aiohttp.ClientTimeout(total=timeout)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=limit) as session,
        session.get(f"http://{where}:{port}{path}", raise_for_status=True) as answer,
    ):
        return await answer.text()


FAILURES = (aiohttp.ClientError, OSError, TimeoutError, EOFError)


async def refused(pod: Pod, host: str, port: int) -> bool:
    """A new connection yields no byte of the server-first greeting."""
    try:
        async with Conversation(pod, host, port) as talk:
            return not talk.greeting
    except FAILURES:
        return True


@dataclass
class Conversation:
    """A connection to the echo server, held open."""

    pod: Pod
    host: str
    port: int
    greeting: str = ""
    _streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] = field(init=False, repr=False)

    async def __aenter__(self) -> "Conversation":
        self._streams = await connect(self.pod.sandbox.namespace, self.host, self.port)
        try:
            async with asyncio.timeout(10):
                self.greeting = (await self._streams[0].readline()).decode().strip()
        except BaseException:
            self._streams[1].close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._streams[1].close()

    async def echo(self, text: str, *, timeout: float = 10) -> bool:
        """Sends a line and gets it back; False when the connection is over."""
        reader, writer = self._streams
        try:
            writer.write(f"{text}\n".encode())
            async with asyncio.timeout(timeout):
                return (await reader.readline()).decode() == f"{text}\n"
        except (OSError, TimeoutError):
            return False

    async def ended(self, timeout: float) -> bool:
        """The far side closes within the time."""
        try:
            async with asyncio.timeout(timeout):
                return await self._streams[0].read(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True

    async def finish(self) -> str:
        """Half-closes and returns what the server still says."""
        reader, writer = self._streams
        writer.write_eof()
        async with asyncio.timeout(10):
            return (await reader.read()).decode()


class Load:
    """One request after another on new connections, until the end of `with`."""

    def __init__(self, pod: Pod, host: str, port: int) -> None:
        self.done = 0
        self.failures: list[str] = []
        self._target = pod, host, port
        self._stopping = False

    async def __aenter__(self) -> "Load":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping = True
        await self._task

    async def _run(self) -> None:
        while not self._stopping:
            try:
                await http_get(*self._target)
                self.done += 1
            except FAILURES as exc:
                self.failures.append(f"{type(exc).__name__}: {exc}")
                await asyncio.sleep(0.01)
