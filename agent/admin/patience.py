"""A time limit for the heads of requests: who opens connections and says nothing, or a byte now and
then, is let go. aiohttp itself waits an hour."""

import asyncio
from collections.abc import Awaitable, Callable
from weakref import WeakKeyDictionary

from aiohttp import web
from aiohttp.typedefs import Middleware

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Factory = Callable[[], asyncio.Protocol]

# facts ztunnel 13
HEAD_WAIT = 2.0


class Patience:
    """Of one server: its factory goes through `watched`, its application has `middleware`."""

    def __init__(self, seconds: float = HEAD_WAIT) -> None:
        self._seconds = seconds
        self._open: WeakKeyDictionary[asyncio.BaseTransport, _Watched] = WeakKeyDictionary()

    def watched(self, factory: Factory) -> Factory:
        return lambda: _Watched(factory(), self._open, self._seconds)

    @property
    def middleware(self) -> Middleware:
        @web.middleware
        async def arrived(request: web.Request, handler: Handler) -> web.StreamResponse:
            watched = self._open.get(request.transport) if request.transport else None
            if watched is None:
                return await handler(request)
            watched.begin()
            try:
                return await handler(request)
            finally:
                watched.end()

        return arrived


class _Watched(asyncio.Protocol):
    """Hands everything on. The time runs from the connection's begin, later from a request's first
    byte, until the head is complete; between two requests the server's keep-alive decides."""

    def __init__(
        self,
        inner: asyncio.Protocol,
        known: "WeakKeyDictionary[asyncio.BaseTransport, _Watched]",
        seconds: float,
    ) -> None:
        self._inner = inner
        self._known = known
        self._seconds = seconds
        self._transport: asyncio.BaseTransport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False
        # Bytes of a next request came while one was answered.
        self._ahead = False

    def begin(self) -> None:
        self._stop()
        self._busy, self._ahead = True, False

    def end(self) -> None:
        self._busy = False
        if self._ahead:
            self._start()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._known[transport] = self
        self._start()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._busy:
            self._ahead = True
        elif self._timer is None:
            self._start()
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._inner.connection_lost(exc)

    def _start(self) -> None:
        if self._transport is not None and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._seconds, self._transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
