"""A node as the commands see it: an admin socket with given answers, a data plane's socket."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aiohttp import web
from click.testing import CliRunner, Result

from agent.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path


def underpass(run_dir: Path, *arguments: str) -> Result:
    """As a user types it, in a terminal of 80 columns."""
    return CliRunner(env={"UNDERPASS_NODE": None, "UNDERPASS_RUN_DIR": None}).invoke(
        main, ["--run-dir", str(run_dir), *arguments]
    )


@contextmanager
def agent(run_dir: Path, node: str, answers: dict[str, Any]) -> Iterator[None]:
    """Serves /v1/<section> for each answer; one that is an int is that HTTP status, one that is
    called gets the request's method and query."""

    async def handle(request: web.Request) -> web.Response:
        answer = answers.get(request.match_info["section"], 404)
        if callable(answer):
            answer = answer(request.method, dict(request.query))
        if isinstance(answer, int):
            return web.json_response({"error": "not today"}, status=answer)
        return web.json_response(answer)

    folder = run_dir / node
    folder.mkdir(parents=True, exist_ok=True)

    def server() -> AbstractAsyncContextManager[None]:
        return _Admin(folder / "admin.sock", handle)

    with background(server):
        yield


class _Admin:
    def __init__(self, path: Path, handle: Any) -> None:
        app = web.Application()
        app.router.add_route("*", "/v1/{section:.+}", handle)
        self._runner = web.AppRunner(app)
        self._path = path

    async def __aenter__(self) -> None:
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self._path)).start()

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


@contextmanager
def background(server: Callable[[], AbstractAsyncContextManager[Any]]) -> Iterator[None]:
    """The server in a loop and thread of its own: commands run their own loop."""
    started = threading.Event()
    failures: list[BaseException] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with server():
            started.set()
            await stop.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        except BaseException as exc:
            failures.append(exc)
        finally:
            started.set()
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    try:
        yield
    finally:
        if not loop.is_closed():
            loop.call_soon_threadsafe(stop.set)
        thread.join()
        assert not failures, failures
