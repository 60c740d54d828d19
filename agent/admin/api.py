"""The admin socket's JSON: `GET /v1/…` looks, `POST /v1/…` changes: the log levels, the data
plane's process, connections that are older than their pod's capture."""

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from aiohttp import web

from agent import told
from agent.admin.dump import OWN, own_section
from agent.dataplane import Dataplane, DataplaneError, InvalidRequest, NotFound
from agent.errors import AgentError, BadLogFilter
from agent.levels import Levels
from agent.report import Report
from agent.slices import Config
from agent.status import Problem, plain
from proto.gen import control_pb2

# Sections of the data plane's own dump, passed through as they come.
SECTIONS = ("workloads", "services", "policies")


def admin_app(
    config: Config, report: Report, levels: Levels, replace: Callable[[], Awaitable[None]]
) -> web.Application:
    api = _Api(config, report, levels, replace)
    app = web.Application(middlewares=[_errors_as_json])
    app.router.add_get("/v1/status", api.status)
    app.router.add_get("/v1/pods", api.pods)
    app.router.add_get("/v1/certificates", api.certificates)
    app.router.add_get("/v1/connections", api.connections)
    for section in SECTIONS:
        app.router.add_get(f"/v1/{section}", api.section)
    for section in told.SECTIONS:
        app.router.add_get(f"/v1/{section}", api.told)
    app.router.add_get("/v1/dump/{section}", api.dump)
    app.router.add_get("/v1/bypass", api.bypass)
    app.router.add_get("/v1/precapture", api.precapture)
    app.router.add_post("/v1/precapture/cut", api.cut_precapture)
    app.router.add_get("/v1/log", api.log)
    app.router.add_post("/v1/log", api.change_log)
    app.router.add_post("/v1/dataplane/replace", api.replace)
    return app


class _Api:
    def __init__(
        self, config: Config, report: Report, levels: Levels, replace: Callable[[], Awaitable[None]]
    ) -> None:
        self._config = config
        self._report = report
        self._levels = levels
        self._replace = replace

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(plain(await self._report.status()))

    async def pods(self, request: web.Request) -> web.Response:
        return web.json_response(plain(await self._report.pods()))

    async def certificates(self, request: web.Request) -> web.Response:
        return web.json_response(plain(self._report.certificates()))

    async def connections(self, request: web.Request) -> web.Response:
        """`?pod=UID` for one pod."""
        found = [
            _connection(connection)
            async for connection in _present(self._report).connections(request.query.get("pod", ""))
        ]
        return web.json_response(found)

    async def section(self, request: web.Request) -> web.StreamResponse:
        section = request.path.rpartition("/")[2]
        return await _stream(request, _present(self._report).path, section)

    async def told(self, request: web.Request) -> web.Response:
        section = request.path.rpartition("/")[2]
        try:
            found = await told.tell(_present(self._report), section, request.query)
        except (InvalidRequest, NotFound) as exc:
            # The question is wrong, not the data plane.
            status = 404 if isinstance(exc, NotFound) else 400
            return web.json_response({"error": str(exc)}, status=status)
        return web.json_response(found)

    async def dump(self, request: web.Request) -> web.StreamResponse:
        """One section of the whole in facts ztunnel 13.1."""
        section = request.match_info["section"]
        if section in OWN:
            return web.json_response(await own_section(self._config, section))
        try:
            return await _stream(request, _present(self._report).path, section)
        except NotFound as exc:
            raise web.HTTPNotFound(reason=f"no section {section}") from exc

    async def bypass(self, request: web.Request) -> web.Response:
        return web.json_response(plain(await self._report.bypass()))

    async def precapture(self, request: web.Request) -> web.Response:
        """Connections that are older than their pod's capture."""
        await self._report.precapture.refresh()
        return web.json_response(
            [
                {"uid": pod.uid, "pod": pod.key, "connection": str(one)}
                for pod, found in self._report.precapture.listed()
                for one in found
            ]
        )

    async def cut_precapture(self, request: web.Request) -> web.Response:
        """`?pod=UID` those of one pod, `?all` those of all."""
        if ("pod" in request.query) == ("all" in request.query):
            raise web.HTTPBadRequest(reason="write either pod=UID or all")
        uids = None if "all" in request.query else [request.query["pod"]]
        count = await self._report.precapture.cut(uids)
        return web.json_response({"cut": count})

    async def log(self, request: web.Request) -> web.Response:
        return web.json_response(plain(self._levels.view()))

    async def change_log(self, request: web.Request) -> web.Response:
        """`?set=DIRECTIVES` adds to what is in force; `?reset` returns to what is configured."""
        directives = request.query.get("set", "")
        if "reset" in request.query:
            return web.json_response(plain(await self._levels.reset(directives)))
        return web.json_response(plain(await self._levels.change(directives)))

    async def replace(self, request: web.Request) -> web.Response:
        await self._replace()
        return web.json_response(plain(self._report.supervised()))


async def _stream(request: web.Request, path: Path, section: str) -> web.StreamResponse:
    """Over a connection of its own: a client that reads slowly holds up nobody else."""
    observer = await Dataplane.connect(path, role="observer")
    observer.hello.Clear()
    try:
        chunks: AsyncIterator[bytes] = observer.dump(section)
        first = await anext(chunks, b"")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(first)
        async for chunk in chunks:
            await response.write(chunk)
        await response.write_eof()
        return response
    finally:
        await observer.close()


def _connection(connection: control_pb2.Connection) -> dict[str, object]:
    found: dict[str, object] = {
        field.name: getattr(connection, field.name) for field in connection.DESCRIPTOR.fields
    }
    found["direction"] = control_pb2.Connection.Direction.Name(connection.direction).lower()
    return found


def _present(report: Report) -> Dataplane:
    dataplane = report.dataplane
    if dataplane is None:
        raise web.HTTPServiceUnavailable(reason="no data plane serves")
    return dataplane


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """`{what, why, remedy}` like the problems of the status, for the CLI to show alike."""
    try:
        return await handler(request)
    except web.HTTPException as exc:
        problem, status = Problem(request.path, exc.reason), exc.status
    except BadLogFilter as exc:
        problem, status = Problem("log", str(exc), exc.remedy), 400
    except DataplaneError as exc:
        problem, status = Problem("data plane", str(exc), exc.remedy), 503
    except AgentError as exc:
        problem, status = Problem(request.path, str(exc), exc.remedy), 409
    body = {"error": problem.why, **dataclasses.asdict(problem)}
    return web.json_response(body, status=status)
