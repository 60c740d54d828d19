"""A pod between two ways to capture: the new one first, the former for as long as it is needed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from agent.pods import steps
from agent.pods.captures import Captures
from agent.pods.ledger import Ledger, read
from agent.pods.reconciler import Reconciler
from agent.pods.source import PodAdded, PodRemoved
from proto.gen import control_pb2
from redirect.base import NotRetryable
from tests.support.eventually import eventually
from tests.support.fake_redirect import FakeRedirect
from tests.unit.agent.test_reconciler import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

UID = "uid-a"


class Moving(World):
    def __init__(self, folder: Path, *, first: str = "nftables") -> None:
        super().__init__(folder)
        self.ways = {name: FakeRedirect(name) for name in ("nftables", "ebpf")}
        self.ways["ebpf"].exempts_by_rule = False
        self.order: list[str] = []
        for name, way in self.ways.items():
            way.heard = lambda _, name=name: self.order.append(f"install {name}")  # type: ignore[misc]
        self.start(first)

    def start(self, first: str) -> None:
        """As an agent that captures by this unless a pod asks for the other."""
        other = "ebpf" if first == "nftables" else "nftables"
        self.reconciler = Reconciler(
            self.ways[first],
            others=(self.ways[other],),
            verify_interval=timedelta(milliseconds=40),
            ledger=Ledger(self.folder / "captured.json"),
        )

    def run(self) -> None:
        self.reconciler.attach(self.target, synced=True)
        self._following = asyncio.create_task(self.reconciler.follow(self.events()))

    async def end(self) -> None:
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
        await self.reconciler.close()

    def ask_for(self, way: str) -> None:
        self.tell(PodAdded(replace(self.pod("a"), capture=way)))

    def held(self) -> tuple[str, ...]:
        (found,) = read(self.folder / "captured.json")
        return found.ways

    async def by(self, way: str, *former: str) -> None:
        wanted = [(way, former)]

        def seen() -> bool:
            views = self.reconciler.views()
            return [(one.capture, one.former_captures) for one in views] == wanted

        await eventually(seen, what=self.reconciler.views)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Moving]:
    monkeypatch.setattr(steps, "SETTLING", 0.0)
    world = Moving(tmp_path)
    world.run()
    world.add("a")
    await world.until(a="captured")
    yield world
    await world.end()


async def test_former_way_is_kept_until_no_connection_needs_it(world: Moving) -> None:
    assert world.held() == ("nftables",)
    world.ways["nftables"].busy.add(UID)
    world.ask_for("ebpf")
    await world.by("ebpf", "nftables")
    assert world.order == ["install nftables", "install ebpf"]
    assert UID in world.ways["nftables"].released
    assert set(world.held()) == {"ebpf", "nftables"}
    world.ways["nftables"].busy.clear()
    await world.by("ebpf")
    assert world.ways["nftables"].released == set()
    assert world.held() == ("ebpf",)
    # And back: the data plane looks after eBPF until nothing of it is left.
    world.ways["ebpf"].busy.add(UID)
    world.ask_for("nftables")
    await world.by("nftables", "ebpf")
    assert world.target.settings[UID].capture == control_pb2.PodSettings.EBPF
    world.ways["ebpf"].busy.clear()
    await world.by("nftables")
    assert world.target.settings[UID].capture == control_pb2.PodSettings.NFTABLES


async def test_pod_that_cannot_move_stays_captured_and_looked_after(world: Moving) -> None:
    world.ways["ebpf"].install_faults[UID] = [NotRetryable("the kernel is too old")] * 2
    world.ask_for("ebpf")
    await eventually(lambda: "stays captured by nftables" in world.problem("a"))
    assert "the kernel is too old" in world.problem("a")
    # Somebody flushes its rules meanwhile.
    world.ways["nftables"].installed.clear()
    await eventually(lambda: UID in world.ways["nftables"].installed)
    await world.by("ebpf")
    assert world.problem("a") == ""


async def test_unproved_new_way_is_taken_back_at_once(world: Moving) -> None:
    world.ways["ebpf"].unverifiable.add(UID)
    world.ask_for("ebpf")
    await eventually(lambda: "a rule isn't there" in world.problem("a"))
    assert world.view("a").capture == "nftables"
    assert UID in world.ways["nftables"].installed
    assert UID not in world.ways["ebpf"].installed


async def test_agent_of_another_mode_takes_over_what_both_ways_left(world: Moving) -> None:
    world.ways["nftables"].busy.add(UID)
    world.ask_for("ebpf")
    await world.by("ebpf", "nftables")
    await world.end()
    # As if it had died between the two.
    world.ways["nftables"].installed[UID] = world.ways["nftables"].config
    for first in ("ebpf", "nftables"):
        world.ways["nftables"].busy.clear()
        world.start(first)
        world.run()
        world.add("a")
        await world.by(first)
        other = "ebpf" if first == "nftables" else "nftables"
        assert UID not in world.ways[other].installed
        assert world.held() == (first,)
        if first == "ebpf":
            await world.end()


async def test_agent_after_the_move_leaves_the_former_way_as_it_is(world: Moving) -> None:
    world.ways["nftables"].busy.add(UID)
    world.ask_for("ebpf")
    await world.by("ebpf", "nftables")
    await world.end()
    assert world.held() == ("ebpf", "nftables")
    world.order.clear()
    world.start("ebpf")
    world.run()
    world.add("a")
    await world.by("ebpf", "nftables")
    assert world.order == ["install ebpf"]


async def test_pod_that_leaves_while_it_moves_loses_both(world: Moving) -> None:
    world.ways["nftables"].busy.add(UID)
    world.ask_for("ebpf")
    await world.by("ebpf", "nftables")
    world.tell(PodRemoved(UID))
    await world.until()
    for way in world.ways.values():
        assert UID not in way.installed
        assert UID not in way.released


async def test_way_that_is_not_to_be_had_is_told(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.reconciler = Reconciler(
        FakeRedirect("nftables"),
        verify_interval=timedelta(seconds=1),
        missing={"ebpf": "no pods' cgroup"},
    )
    following = asyncio.create_task(world.reconciler.follow(world.events()))
    world.reconciler.attach(world.target, synced=True)
    world.netns("a")
    world.tell(PodAdded(replace(world.pod("a"), capture="ebpf")))
    await world.until(a="captured")
    assert world.view("a").notes == ("captured by nftables, not ebpf: no pods' cgroup",)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await world.reconciler.close()


async def test_pod_with_virtual_interfaces_is_captured_by_nftables(world: Moving) -> None:
    world.ask_for("ebpf")
    await world.by("ebpf")
    machine = replace(world.pod("a"), virtual_interfaces=("tap0",))
    world.tell(PodAdded(machine))
    await world.by("nftables")
    assert list(world.target.settings[UID].virtual_interfaces) == ["tap0"]


async def test_without_nftables_machines_go_past_and_it_is_told(tmp_path: Path) -> None:
    alone = Captures(FakeRedirect("ebpf"), missing={"nftables": "no module nf_tables"})
    machine = replace(World(tmp_path).pod("a"), virtual_interfaces=("tap0",))
    assert alone.wanted(machine) is alone.default
    assert "tap0 goes past the mesh" in alone.note(machine)
    assert "no module nf_tables" in alone.note(machine)
