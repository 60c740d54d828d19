"""Who may work on pods now: so many at once, and nobody during a pause."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

# Steps that run at once; each costs the kernel some milliseconds, and a node may start with 250.
AT_ONCE = 8


class Turns:
    """State: `_busy` turns are taken, `_pauses` are asked for (they nest)."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._busy = 0
        self._pauses = 0
        self._going = asyncio.Event()
        self._going.set()
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        while True:
            await self._going.wait()
            await self._free.acquire()
            if self._going.is_set():
                break
            # Paused meanwhile: a turn held while waiting would keep `limited` work out.
            self._free.release()
        self._busy += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._free.release()
            self._busy -= 1
            if self._busy == 0:
                self._idle.set()

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Inside, no turn is taken."""
        self._pauses += 1
        self._going.clear()
        try:
            await self._idle.wait()
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._going.set()

    @asynccontextmanager
    async def limited(self) -> AsyncIterator[None]:
        """Work of the pause itself, as many at once as there are turns."""
        async with self._free:
            yield
