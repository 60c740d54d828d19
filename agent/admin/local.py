"""The loopback's HTTP (15000) at upstream's paths (facts ztunnel 13): reads for everybody on the
node; what changes something only where `admin.allow-changes` says so, since every process of the
host reaches it. The agent's own socket needs no such leave: only its owner may connect to it."""

from collections.abc import Callable

from aiohttp import web

from agent.admin.dump import config_dump
from agent.dataplane import Dataplane, DataplaneError
from agent.errors import BadLogFilter
from agent.levels import Levels
from agent.report import Report
from agent.slices import Config

REFUSED = (
    "not allowed on this address, since every process of the host reaches it: {instead}, "
    "or start the agent with --admin-allow-changes=true\n"
)
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Underpass</title></head><body>
<h1>Underpass, node {node}</h1>
<ul>
<li><a href="/config_dump">config_dump</a>: what this node knows of the mesh, as JSON</li>
<li><a href="/logging">logging</a>: log levels</li>
</ul>
<p>{ready}. Metrics and readiness have ports of their own; <code>underpass status</code> tells
more.</p>
</body></html>
"""


def local_app(
    config: Config, report: Report, levels: Levels, end: Callable[[], None]
) -> web.Application:
    api = _Local(config, report, levels, end)
    app = web.Application()
    app.router.add_get("/", api.page)
    app.router.add_route("*", "/config_dump", api.dump)
    app.router.add_get("/logging", api.levels)
    app.router.add_post("/logging", api.change_levels)
    app.router.add_post("/quitquitquit", api.quit)
    return app


class _Local:
    def __init__(
        self, config: Config, report: Report, levels: Levels, end: Callable[[], None]
    ) -> None:
        self._config = config
        self._report = report
        self._levels = levels
        self._end = end

    async def page(self, request: web.Request) -> web.Response:
        pending = self._report.pending()
        ready = f"Not ready, pending: {', '.join(pending)}" if pending else "Ready"
        page = _PAGE.format(node=self._config.node.name, ready=ready)
        return web.Response(text=page, content_type="text/html")

    async def dump(self, request: web.Request) -> web.StreamResponse:
        """Over a connection of its own: a client that reads slowly holds up nobody else."""
        dataplane = self._report.dataplane
        if dataplane is None:
            return web.Response(status=503, text="no data plane serves\n")
        try:
            observer = await Dataplane.connect(dataplane.path, role="observer")
        except DataplaneError as exc:
            return web.Response(status=503, text=f"{exc}\n")
        observer.hello.Clear()
        try:
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            async for piece in config_dump(self._config, observer):
                await response.write(piece)
            await response.write_eof()
            return response
        finally:
            await observer.close()

    async def levels(self, request: web.Request) -> web.Response:
        return web.Response(text=f"current log level is {self._levels.view().filter}\n")

    async def change_levels(self, request: web.Request) -> web.Response:
        """`?level=LEVEL or target=LEVEL,…` adds, `?reset` returns to what is configured first;
        neither only shows."""
        level, reset = request.query.get("level", ""), "reset" in request.query
        if not level and not reset:
            return await self.levels(request)
        if not self._config.servers.allow_changes:
            return web.Response(status=403, text=REFUSED.format(instead="use `underpass log`"))
        try:
            await (self._levels.reset(level) if reset else self._levels.change(level))
        except BadLogFilter as exc:
            return web.Response(status=400, text=f"{exc}\n")
        except DataplaneError as exc:
            return web.Response(status=503, text=f"{exc}\n")
        return await self.levels(request)

    async def quit(self, request: web.Request) -> web.Response:
        if not self._config.servers.allow_changes:
            return web.Response(status=403, text=REFUSED.format(instead="send SIGTERM"))
        self._end()
        return web.Response(text="shutdown now\n")
