"""Log levels: how directives add up, and that both processes follow them."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from agent import logs
from agent.dataplane import InvalidRequest
from agent.errors import BadLogFilter
from agent.feed import Feed
from agent.levels import Levels, merged
from agent.pods.reconciler import Reconciler
from agent.slices import DataplaneProcess, Log, RunPaths
from agent.supervisor import Supervisor
from agent.xds.local import LocalFile
from proto.gen import control_pb2
from redirect.base import CaptureConfig
from tests.support.eventually import eventually
from tests.support.fake_dataplane import FakeConnection, FakeDataplane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.mark.parametrize(
    ("before", "directives", "after"),
    [
        ("info", "underpass=debug", "info,underpass=debug"),
        ("info,underpass=debug", "underpass=warn", "info,underpass=warn"),
        ("info,underpass=debug", "DEBUG", "debug,underpass=debug"),
        ("info", " access=off , underpass.xds=trace", "info,access=off,underpass.xds=trace"),
    ],
)
def test_directives_add_to_what_is_in_force(before: str, directives: str, after: str) -> None:
    assert merged(before, directives) == after


@pytest.mark.parametrize(
    "directives", ["loud", "underpass=loud", "=debug", "underpass=", "", " , "]
)
def test_directives_that_cannot_be_read_are_named(directives: str) -> None:
    with pytest.raises(BadLogFilter, match="write LEVEL or target=LEVEL"):
        merged("info", directives)


@pytest.fixture
def quiet() -> Iterator[None]:
    """The test process's own logging, as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logs.setup(Log())
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    reconciler = Reconciler(None, verify_interval=timedelta(minutes=1))
    feed = Feed(LocalFile(tmp_path / "mesh.yaml"), None, reconciler, CaptureConfig())
    config = control_pb2.InstanceConfig(node="n1", log=control_pb2.LogConfig(filter="info"))
    socket = tmp_path / "given.sock"
    made = Supervisor(DataplaneProcess(socket=socket), RunPaths(tmp_path), config, feed)
    yield made
    await reconciler.close()
    await feed.close()
    await made.close()


def filters(fake: FakeDataplane) -> list[str]:
    return [r.configure.log.filter for r in fake.requests if r.WhichOneof("body") == "configure"]


@pytest.mark.usefixtures("quiet")
async def test_both_processes_follow_and_so_does_the_next_data_plane(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    levels = Levels(Log(), supervisor)
    # Nobody serves yet: the first one is told when it comes.
    assert not (await levels.change("underpass.pods=debug")).dataplane
    assert logging.getLogger("underpass.pods").isEnabledFor(logging.DEBUG)
    async with FakeDataplane(tmp_path / "given.sock") as fake:
        running = asyncio.create_task(supervisor.run())
        await eventually(lambda: levels.view().dataplane)
        assert fake.requests[0].hello.config.log.filter == "info,underpass.pods=debug"
        assert (await levels.change("warn")).filter == "warn,underpass.pods=debug"
        view = await levels.reset()
        assert (view.filter, view.configured) == ("info", "info")
        assert filters(fake)[-2:] == ["warn,underpass.pods=debug", "info"]
        assert not logging.getLogger("underpass.pods").isEnabledFor(logging.DEBUG)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.usefixtures("quiet")
async def test_what_the_data_plane_refuses_changes_neither(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    async def refuse(
        connection: FakeConnection, request: control_pb2.Request, fds: list[int]
    ) -> None:
        if request.configure.log.filter.endswith("debug"):
            error = control_pb2.Error(code="INVALID", subject="log.filter", text="no such target")
            await connection.reply(request, error=error)
        else:
            await connection.reply(request, done=control_pb2.Done())

    levels = Levels(Log(), supervisor)
    async with FakeDataplane(tmp_path / "given.sock", refuse) as fake:
        fake.hello.config.log.filter = "info"
        running = asyncio.create_task(supervisor.run())
        await eventually(lambda: levels.view().dataplane)
        with pytest.raises(InvalidRequest, match="no such target"):
            await levels.change("odd=debug")
        assert levels.view().filter == "info"
        assert not logging.getLogger("odd").isEnabledFor(logging.DEBUG)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
