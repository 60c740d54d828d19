"""The agent's HTTP servers: its own API on a Unix socket; metrics, readiness and upstream's admin
paths on ports.

Binding comes first and may fail; serving starts with it, answers say what isn't ready.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from aiohttp import web

from agent.admin.api import admin_app
from agent.admin.health import readiness_app
from agent.admin.local import local_app
from agent.admin.metrics import metrics_app
from agent.admin.patience import Patience
from agent.errors import PortInUse
from agent.levels import Levels
from agent.report import Report
from agent.slices import Config, RunPaths
from agent.values import Listen

# A client that doesn't read is let go.
_SHUTDOWN = 1.0
# Whoever opens connections for nothing must not keep a scraper out.
_BACKLOG = 1024


class Servers:
    """`async with`: bound and serving inside."""

    def __init__(
        self,
        config: Config,
        report: Report,
        levels: Levels,
        replace: Callable[[], Awaitable[None]],
        end: Callable[[], None],
    ) -> None:
        """`replace` changes the data plane for another one, `end` begins the agent's end."""
        self._paths = config.paths
        self._config = config
        self._report = report
        self._levels = levels
        self._replace = replace
        self._end = end
        self._runners: list[web.AppRunner] = []
        self._listening: list[asyncio.Server] = []
        # Name -> host:port as bound, for port 0.
        self.bound: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        try:
            # The claim on the run folder says that no other agent lives: what is here is stale.
            self._paths.admin_socket.unlink(missing_ok=True)
            api = admin_app(self._config, self._report, self._levels, self._replace)
            await self._serve(api, [_bind_unix(self._paths)])
            local = local_app(self._config, self._report, self._levels, self._end)
            servers = self._config.servers
            for name, app, listen in (
                ("stats", metrics_app(self._report), servers.stats),
                ("ready", readiness_app(self._report), servers.ready),
                ("admin", local, servers.admin),
            ):
                if listen is not None:
                    bound = _bind_tcp(name, listen)
                    host, port = bound[0].getsockname()[:2]
                    self.bound[name] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                    await self._serve(app, bound)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._close()

    async def _serve(self, app: web.Application, bound: list[socket.socket]) -> None:
        patience = Patience()
        app.middlewares.insert(0, patience.middleware)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN)
        self._runners.append(runner)
        await runner.setup()
        assert runner.server is not None  # set by setup
        factory = patience.watched(runner.server)
        loop = asyncio.get_running_loop()
        for one in bound:
            self._listening.append(await loop.create_server(factory, sock=one, backlog=_BACKLOG))

    async def _close(self) -> None:
        for server in self._listening:
            server.close()
        for runner in self._runners:
            await runner.cleanup()
        self._paths.admin_socket.unlink(missing_ok=True)


def _bind_unix(paths: RunPaths) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # Before bind, so that there is no moment in which others could connect.
    before = os.umask(0o177)
    try:
        bound.bind(str(paths.admin_socket))
    except OSError as exc:
        bound.close()
        raise PortInUse(f"{paths.admin_socket}: {exc.strerror}") from exc
    finally:
        os.umask(before)
    return bound


def _bind_tcp(name: str, listen: Listen) -> list[socket.socket]:
    """All of IPv4 and IPv6 for an empty host, IPv4 alone where the kernel has no IPv6. `localhost`
    is both addresses of the loopback, or the one that there is."""
    if listen.host != "localhost":
        return [_bind_one(name, listen)]
    first = _bind_one(name, Listen("127.0.0.1", listen.port))
    try:
        # With port 0 the second takes what the first got.
        return [first, _bind_one(name, Listen("::1", first.getsockname()[1]))]
    except PortInUse as exc:
        cause = exc.__cause__
        if isinstance(cause, OSError) and cause.errno in (
            errno.EADDRNOTAVAIL,
            errno.EAFNOSUPPORT,
        ):
            return [first]
        first.close()
        raise


def _bind_one(name: str, listen: Listen) -> socket.socket:
    host, family = listen.host, socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    if not host:
        host, family = ("::", socket.AF_INET6) if socket.has_dualstack_ipv6() else ("", family)
    where = f"{name} on {listen.host or '*'}:{listen.port}"
    try:
        bound = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as exc:
        raise PortInUse(f"{where}: {exc.strerror}") from exc
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
        bound.bind((host, listen.port))
    except OSError as exc:
        bound.close()
        raise PortInUse(f"{where}: {exc.strerror}") from exc
    return bound
