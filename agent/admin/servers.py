"""The agent's HTTP servers: admin on a Unix socket, metrics and readiness on ports.

Binding comes first and may fail; serving starts with it, answers say what isn't ready.
"""

import os
import socket
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from aiohttp import web

from agent.admin.api import admin_app
from agent.admin.health import readiness_app
from agent.admin.metrics import metrics_app
from agent.errors import PortInUse
from agent.levels import Levels
from agent.report import Report
from agent.settings import Listen
from agent.slices import RunPaths
from agent.slices import Servers as ServersConfig

# A client that doesn't read is let go.
_SHUTDOWN = 1.0


class Servers:
    """`async with`: bound and serving inside."""

    def __init__(
        self,
        paths: RunPaths,
        config: ServersConfig,
        report: Report,
        levels: Levels,
        replace: Callable[[], Awaitable[None]],
    ) -> None:
        self._paths = paths
        self._config = config
        self._report = report
        self._levels = levels
        self._replace = replace
        self._runners: list[web.AppRunner] = []
        # Name -> host:port as bound, for port 0.
        self.bound: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        try:
            # The claim on the run folder says that no other agent lives: what is here is stale.
            self._paths.admin_socket.unlink(missing_ok=True)
            api = admin_app(self._report, self._levels, self._replace)
            await self._serve(api, _bind_unix(self._paths))
            for name, app, listen in (
                ("stats", metrics_app(self._report), self._config.stats),
                ("ready", readiness_app(self._report), self._config.ready),
            ):
                if listen is not None:
                    bound = _bind_tcp(name, listen)
                    host, port = bound.getsockname()[:2]
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

    async def _serve(self, app: web.Application, bound: socket.socket) -> None:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN)
        self._runners.append(runner)
        await runner.setup()
        await web.SockSite(runner, bound).start()

    async def _close(self) -> None:
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


def _bind_tcp(name: str, listen: Listen) -> socket.socket:
    """All of IPv4 and IPv6 for an empty host, IPv4 alone where the kernel has no IPv6."""
    host, family = listen.host, socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    if not host:
        host, family = ("::", socket.AF_INET6) if socket.has_dualstack_ipv6() else ("", family)
    try:
        bound = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
        bound.bind((host, listen.port))
    except OSError as exc:
        bound.close()
        raise PortInUse(f"{name} on {listen.host or '*'}:{listen.port}: {exc.strerror}") from exc
    return bound
