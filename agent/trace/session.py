"""One run of a tracer: the child, the node's pods as they come and go, and a view over both."""

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any

import click

from agent.trace.node import Node
from agent.trace.tracer import Tracer
from agent.trace.views import Row, View

# Pods are asked for, and counters read, this often.
LOOK = 1.0
# What the programs of capture tell, this often.
POLL = 0.1


class Session:
    """`tell` gets each row, `note` what is said beside them, in words."""

    def __init__(
        self, node: Node, view: View, tell: Callable[[Row], None], note: Callable[[str], None]
    ) -> None:
        self._node = node
        self._view = view
        self._tell = tell
        self._note = note
        self._away = ""

    async def run(self, duration: float | None) -> None:
        """Until SIGINT, SIGTERM or the end of the duration. Raises TraceError."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        dns = self._node.ports.dns or 53
        async with Tracer(self._view.program, dns, dialled=self._node.rewrites) as tracer:
            tracer.watch(self._node.pods)
            # While the child compiles.
            await self._look()
            tasks: list[asyncio.Task[Any]] = [
                asyncio.create_task(self._read(tracer)),
                asyncio.create_task(self._keep_looking(tracer)),
                asyncio.create_task(self._keep_polling()),
            ]
            ended: asyncio.Task[Any] = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait(
                    [*tasks, ended], timeout=duration, return_when=asyncio.FIRST_COMPLETED
                )
                for task in tasks:
                    if task.done():
                        task.result()
            finally:
                for task in (*tasks, ended):
                    task.cancel()
                await asyncio.gather(*tasks, ended, return_exceptions=True)
        self._poll()
        self._due(time.monotonic_ns() + 10**12)
        for row in self._view.summary():
            self._tell(row)

    async def _read(self, tracer: Tracer) -> None:
        async for record in tracer.records():
            if "ready" in record:
                self._view.ready()
                await self._look()
                self._note(f"Tracing {len(self._node.pods)} pods; ends with Ctrl-C.")
            elif "now" in record:
                # The kernel's time as far as it was read, which may be behind.
                self._due(record["now"])
            elif "lost" in record:
                self._view.lost()
                self._note(
                    f"{record['lost']} events were lost: they come faster than they are read"
                )
            else:
                for row in self._view.feed(record):
                    self._tell(row)

    async def _keep_looking(self, tracer: Tracer) -> None:
        while True:
            await asyncio.sleep(LOOK)
            before = set(self._node.pods)
            try:
                await asyncio.to_thread(self._node.refresh)
                self._away = ""
            except click.ClickException as exc:
                # What is known still holds; said once.
                if not self._away:
                    self._note(exc.message)
                self._away = exc.message
            if set(self._node.pods) != before:
                tracer.watch(self._node.pods)
            await self._look()

    async def _keep_polling(self) -> None:
        while True:
            self._poll()
            await asyncio.sleep(POLL)

    def _poll(self) -> None:
        for row in self._view.poll(self._note):
            self._tell(row)

    async def _look(self) -> None:
        pods = list(self._node.pods.values())
        for row in await self._view.look(pods, time.monotonic_ns()):
            self._tell(row)

    def _due(self, now: int) -> None:
        for row in self._view.due(now):
            self._tell(row)
