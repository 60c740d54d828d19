"""What a configuration source needs of the data plane, and how one is attached to it."""

import asyncio
import contextlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

from proto.gen import control_pb2


class ApplyTarget(Protocol):
    """The data plane, as a taker of configuration. Both raise DataplaneError."""

    async def apply(self, response: bytes) -> control_pb2.ApplyReply:
        """Takes one serialised delta response; rejected resources are in the reply.

        Raises InvalidRequest when it can make nothing of the response.
        """
        ...

    async def types(self) -> Sequence[control_pb2.TypeState]:
        """What the data plane holds now (Hello's answer, asked anew)."""
        ...


class Attachment:
    """One data plane for as long as it is the current one."""

    def __init__(self, target: ApplyTarget, types: Sequence[control_pb2.TypeState]) -> None:
        self.target = target
        # Set when another one takes its place or it is detached.
        self.gone = asyncio.Event()
        self._known: Sequence[control_pb2.TypeState] | None = types

    async def take_types(self) -> Sequence[control_pb2.TypeState]:
        """What is held: as told at attaching for the first asker, asked anew after that.

        Kept nowhere in the agent: names and versions of a large mesh take tens of megabytes.
        """
        known, self._known = self._known, None
        return await self.target.types() if known is None else known

    async def linger(self, at_most: timedelta) -> None:
        """Waits, but not past the end of this attachment."""
        # Not wait_for: before Python 3.12 it may swallow a cancellation.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most.total_seconds()):
                await self.gone.wait()


class AttachPoint:
    """Where data planes come and go; `current` waits for one."""

    def __init__(self) -> None:
        self._attachment: Attachment | None = None
        self._changed = asyncio.Event()

    def attach(self, target: ApplyTarget, types: Sequence[control_pb2.TypeState]) -> None:
        self.detach()
        self._attachment = Attachment(target, types)
        self._changed.set()

    def detach(self) -> None:
        if self._attachment is not None:
            self._attachment.gone.set()
        self._attachment = None
        self._changed.clear()

    @property
    def attached(self) -> bool:
        return self._attachment is not None

    async def current(self) -> Attachment:
        while self._attachment is None:
            await self._changed.wait()
        return self._attachment
