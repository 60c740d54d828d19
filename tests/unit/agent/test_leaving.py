"""Pods that leave the mesh alive: what they have open may end, and nothing stays behind."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from agent.dataplane import DataplaneSilent
from agent.pods.ledger import Ledger
from agent.pods.netns import NetnsPath
from agent.pods.reconciler import Reconciler
from agent.pods.source import PodAdded, PodRemoved, PodsSynced
from redirect.base import CaptureConfig, RedirectError
from tests.support.eventually import eventually
from tests.unit.agent.test_reconciler import FakeNetns, World

Make = Callable[[timedelta], World]


@pytest.fixture
async def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Worlds whose pods drain until the test says so, or until that deadline."""
    # What is read back from the file knows nothing of fakes.
    monkeypatch.setattr(NetnsPath, "open", FakeNetns.open)
    monkeypatch.setattr("agent.pods.steps.DRAIN_GRACE", timedelta(0))
    worlds = []
    tasks = []

    def made(deadline: timedelta) -> World:
        world = World(tmp_path)
        world.reconciler = Reconciler(
            world.redirect,
            verify_interval=timedelta(seconds=10),
            drain_deadline=deadline,
            ledger=Ledger(tmp_path / "captured.json"),
        )
        world.target.drained = lambda _: None
        tasks.append(asyncio.create_task(world.reconciler.follow(world.events())))
        world.reconciler.attach(world.target, synced=True)
        worlds.append(world)
        return world

    yield made
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for world in worlds:
        await world.reconciler.close()


async def leaving(make: Make, deadline: timedelta = timedelta(seconds=30)) -> World:
    """A world whose pod `a` drains."""
    world = make(deadline)
    world.add("a")
    world.tell(PodsSynced())
    await world.until(a="captured")
    world.tell(PodRemoved("uid-a"))
    await world.until(a="draining")
    assert world.redirect.released == {"uid-a"}
    assert world.redirect.installed == {}
    assert world.target.removed == [("uid-a", True)]
    return world


async def test_rest_of_the_capture_goes_when_the_data_plane_says_drained(make: Make) -> None:
    world = await leaving(make)
    assert not world.view("a").captured
    world.reconciler.pod_drained("uid-a")
    await world.until()
    assert world.redirect.released == set()
    assert world.target.removed == [("uid-a", True)]
    assert not (world.folder / "captured.json").exists()


async def test_connections_left_at_the_deadline_are_cut_before_the_rest_goes(make: Make) -> None:
    world = await leaving(make, timedelta(milliseconds=80))
    await world.until()
    assert world.target.removed == [("uid-a", True), ("uid-a", False)]
    assert world.redirect.released == set()


async def test_pod_that_comes_back_while_it_drains_is_captured_again(make: Make) -> None:
    world = await leaving(make, timedelta(milliseconds=200))
    world.tell(PodAdded(world.pod("a")))
    await world.until(a="captured")
    assert world.redirect.released == set()
    assert "uid-a" in world.target.up
    # Word of the former drain, and its deadline.
    world.reconciler.pod_drained("uid-a")
    await asyncio.sleep(0.3)
    assert world.states() == {"a": "captured"}
    assert world.redirect.calls["remove"] == 0
    assert world.target.removed == [("uid-a", True)]


async def test_pod_that_leaves_comes_back_and_leaves_again_drains_again(make: Make) -> None:
    world = await leaving(make)
    world.tell(PodAdded(world.pod("a")))
    await world.until(a="captured")
    world.tell(PodRemoved("uid-a"))
    await world.until(a="draining")
    world.reconciler.pod_drained("uid-a")
    await world.until()
    assert world.redirect.released == set()


async def test_another_pod_takes_over_a_namespace_that_still_drains(make: Make) -> None:
    world = await leaving(make)
    world.tell(PodAdded(world.pod("b", file="a")))
    await world.until(b="captured")
    assert world.redirect.installed.keys() == {"uid-b"}
    # Never without rules in between: what was open goes on.
    assert world.redirect.calls["remove"] == 0
    noted = json.loads((world.folder / "captured.json").read_text())
    assert [entry["uid"] for entry in noted] == ["uid-b"]


async def test_changed_description_drains_the_old_one_without_waiting_for_it(make: Make) -> None:
    world = make(timedelta(seconds=30))
    world.add("a")
    await world.until(a="captured")
    world.tell(PodAdded(replace(world.pod("a"), service_account="other")))
    await eventually(lambda: world.target.removed == [("uid-a", True)])
    await world.until(a="captured")
    assert world.redirect.calls["release"] == 1
    assert world.redirect.calls["remove"] == 0
    assert world.view("a").service_account == "other"


async def test_lost_data_plane_leaves_nobody_to_wait_for(make: Make) -> None:
    world = await leaving(make)
    world.reconciler.detach()
    await world.until()
    assert world.redirect.released == set()


async def test_successor_waits_for_what_drains_in_the_old_one(make: Make) -> None:
    world = await leaving(make, timedelta(milliseconds=300))
    async with world.reconciler.paused():
        await world.reconciler.prepare(world.target)
        world.reconciler.switch(world.target)
    assert world.target.prepared == {}
    await world.reconciler.reconfigure(CaptureConfig(mark=0x53A))
    assert world.states() == {"a": "draining"}
    assert world.redirect.installed == {}
    await world.until()


async def test_namespace_that_dies_while_it_drains_is_let_go(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.pods.reconciler.NAMESPACES_INTERVAL", 0.01)
    world = await leaving(make)
    watching = asyncio.create_task(world.reconciler.watch_namespaces())
    await asyncio.sleep(0.05)
    assert world.states() == {"a": "draining"}
    (world.folder / "a").unlink()
    await world.until()
    assert world.target.removed == [("uid-a", True), ("uid-a", False)]
    watching.cancel()


async def test_data_plane_that_does_not_answer_is_asked_to_drain_again(make: Make) -> None:
    world = make(timedelta(seconds=30))
    world.add("a")
    await world.until(a="captured")
    world.target.remove_faults = [DataplaneSilent("remove pod: no answer")]
    world.tell(PodRemoved("uid-a"))
    await eventually(lambda: world.target.removed == [("uid-a", True)])
    assert world.redirect.calls["release"] == 1


async def test_release_that_fails_leaves_the_pod_captured_until_it_works(make: Make) -> None:
    world = make(timedelta(seconds=30))
    world.add("a")
    await world.until(a="captured")
    world.redirect.release_faults = [RedirectError("busy")]
    world.tell(PodRemoved("uid-a"))
    await eventually(lambda: world.problem("a") == "busy")
    assert world.redirect.installed.keys() == {"uid-a"}
    assert world.target.removed == []
    await world.until(a="draining")


@pytest.mark.parametrize("deadline", [0.2, 30])
async def test_new_agent_lets_a_pod_drain_on_that_left_before(make: Make, deadline: float) -> None:
    first = await leaving(make, timedelta(seconds=deadline))
    await first.reconciler.close()
    second = make(timedelta(seconds=30))
    second.redirect.released = first.redirect.released
    second.tell(PodsSynced())
    await second.until(a="draining")
    assert second.redirect.calls["remove"] == 0
    if deadline > 1:
        second.reconciler.pod_drained("uid-a")
    await second.until()
    assert second.redirect.released == set()
    assert not (second.folder / "captured.json").exists()


async def test_new_agent_captures_a_pod_again_that_had_left_before(make: Make) -> None:
    first = await leaving(make)
    await first.reconciler.close()
    second = make(timedelta(seconds=30))
    second.add("a")
    second.tell(PodsSynced())
    await second.until(a="captured")
    [noted] = json.loads((second.folder / "captured.json").read_text())
    assert noted["drainsUntil"] is None
