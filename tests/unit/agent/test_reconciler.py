"""Pods between wanted and real: order, faults, repair, and data planes that come and go."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest

from agent.dataplane import (
    DataplaneError,
    DataplaneLost,
    DataplaneSilent,
    InUse,
    InvalidRequest,
)
from agent.errors import NetnsMissing
from agent.namespaces import NamespaceRules
from agent.pods import reconciler
from agent.pods.captures import Captures
from agent.pods.enrolment import Enrolment, Node, Step
from agent.pods.ledger import Ledger
from agent.pods.netns import NetnsId, NetnsPath
from agent.pods.reconciler import CaptureError, Reconciler
from agent.pods.source import Pod, PodAdded, PodEvent, PodRemoved, PodsSynced
from agent.status import PodView
from proto.gen import control_pb2
from redirect.base import CaptureConfig, NetnsGone, NotRetryable, RedirectError
from tests.support.eventually import eventually
from tests.support.fake_redirect import FakeRedirect
from tests.support.fake_target import FakeTarget


@dataclass(frozen=True)
class FakeNetns(NetnsPath):
    """An ordinary file instead of a namespace."""

    def open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise NetnsMissing(f"{self.path}: no such network namespace") from exc


class World:
    """A reconciler with its source, redirection and data plane."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.redirect = FakeRedirect()
        self.target = FakeTarget()
        self.reconciler = Reconciler(
            self.redirect,
            verify_interval=timedelta(milliseconds=80),
            namespaces={"shop": NamespaceRules(registry_only="on", waypoint_required="dry-run")},
        )
        self.target.drained = self.reconciler.pod_drained
        self._events: asyncio.Queue[PodEvent] = asyncio.Queue()

    def pod(self, name: str, *, file: str | None = None) -> Pod:
        path = self.folder / (file or name)
        return Pod(f"uid-{name}", name, "shop", "default", FakeNetns(path))

    def netns(self, name: str) -> None:
        (self.folder / name).write_text(name)

    def tell(self, *events: PodEvent) -> None:
        for event in events:
            self._events.put_nowait(event)

    def add(self, *names: str) -> None:
        for name in names:
            self.netns(name)
            self.tell(PodAdded(self.pod(name)))

    def view(self, name: str) -> PodView:
        return next(view for view in self.reconciler.views() if view.name == name)

    def problem(self, name: str) -> str:
        return {view.name: view.problem for view in self.reconciler.views()}.get(name, "")

    def states(self) -> dict[str, str]:
        return {view.name: view.state for view in self.reconciler.views()}

    async def until(self, **states: str) -> None:
        await eventually(lambda: self.states() == states, what=self.reconciler.views)

    async def events(self) -> AsyncIterator[PodEvent]:
        while True:
            yield await self._events.get()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    following = asyncio.create_task(world.reconciler.follow(world.events()))
    yield world
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await world.reconciler.close()


async def test_rules_of_its_namespace_go_with_a_pod_to_the_data_plane(world: World) -> None:
    world.add("a")
    bank = Pod("uid-b", "b", "bank", "default", FakeNetns(world.folder / "b"))
    world.netns("b")
    world.tell(PodAdded(bank), PodsSynced())
    world.reconciler.attach(world.target, synced=True)
    await world.until(a="captured", b="captured")
    assert world.target.settings["uid-a"].registry_only == control_pb2.ENFORCEMENT_ON
    assert world.target.settings["uid-a"].waypoint_required == control_pb2.ENFORCEMENT_DRY_RUN
    assert world.target.settings["uid-b"].registry_only == control_pb2.ENFORCEMENT_OFF


async def test_pod_is_captured_only_once_the_data_plane_knows_the_mesh(world: World) -> None:
    world.add("a")
    await world.until(a="waiting for data plane")
    world.reconciler.attach(world.target, synced=False)
    await world.until(a="waiting for control plane")
    assert "uid-a" in world.target.up
    assert world.redirect.installed == {}
    world.reconciler.dataplane_synced()
    await world.until(a="captured")
    assert world.view("a").verified
    assert "uid-a" in world.redirect.installed


async def test_removal_takes_rules_first_and_drains_a_pod_that_lives_on(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="captured")
    world.tell(PodRemoved("uid-a"))
    await world.until()
    assert world.redirect.installed == {}
    assert world.target.removed == [("uid-a", True)]


async def test_removal_of_a_dead_pod_waits_for_nobody(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="captured")
    (world.folder / "a").unlink()
    world.tell(PodRemoved("uid-a"))
    await world.until()
    assert world.target.removed == [("uid-a", False)]


async def test_same_uid_with_another_namespace_leaves_the_old_one_before(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="captured")
    world.netns("other")
    world.tell(PodAdded(world.pod("a", file="other")))
    inode = (world.folder / "other").stat().st_ino
    await eventually(lambda: world.target.up.get("uid-a") == inode)
    await world.until(a="captured")
    assert [uid for uid, _ in world.target.removed] == ["uid-a"]
    assert world.redirect.calls["remove"] == 1


async def test_namespace_made_anew_under_its_path_is_followed(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="captured")
    (world.folder / "new").write_text("new")
    (world.folder / "new").rename(world.folder / "a")
    inode = (world.folder / "a").stat().st_ino
    await eventually(lambda: world.target.up.get("uid-a") == inode)
    await world.until(a="captured")


async def test_namespace_made_anew_is_noticed_long_before_the_next_comparison(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    world.reconciler = Reconciler(world.redirect, verify_interval=timedelta(hours=1))
    tasks = [
        asyncio.create_task(world.reconciler.follow(world.events())),
        asyncio.create_task(world.reconciler.watch_namespaces()),
    ]
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="captured")
    (world.folder / "new").write_text("new")
    (world.folder / "new").rename(world.folder / "a")
    inode = (world.folder / "a").stat().st_ino
    await eventually(lambda: world.target.up.get("uid-a") == inode)
    await world.until(a="captured")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await world.reconciler.close()


async def test_missing_namespace_is_a_problem_of_that_pod_until_it_comes(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.tell(PodAdded(world.pod("late")))
    world.add("a")
    await world.until(late="failed", a="captured")
    assert "no such network namespace" in world.view("late").problem
    assert world.view("late").remedy
    world.netns("late")
    await world.until(late="captured", a="captured")
    assert world.view("late").problem == ""


async def test_two_pods_in_one_namespace_are_refused_for_the_second(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="captured")
    world.tell(PodAdded(world.pod("b", file="a")))
    await world.until(a="captured", b="failed")
    assert "already the network namespace of shop/a" in world.view("b").problem


async def test_pod_with_a_new_uid_takes_over_the_namespace_of_the_old_one(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="captured")
    # As the pod file tells it: gone and new in one moment, so that the new one comes too early.
    world.tell(PodRemoved("uid-a"), PodAdded(world.pod("b", file="a")))
    await world.until(b="captured")
    assert world.redirect.installed.keys() == {"uid-b"}


@pytest.mark.parametrize(
    ("fault", "stays"), [(NotRetryable("nft: not permitted"), True), (NetnsGone("gone"), False)]
)
async def test_leaving_pod_whose_rules_can_not_be_removed_stays_with_its_problem(
    world: World, fault: RedirectError, stays: bool
) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="captured")
    world.redirect.release_faults = [fault]
    world.tell(PodRemoved("uid-a"))
    if stays:
        await eventually(lambda: world.problem("a") == str(fault))
        assert world.states() == {"a": "removing"}
        assert world.target.removed == []
    else:
        await world.until()


async def test_pod_that_left_while_no_agent_ran_loses_its_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is read back from the file knows nothing of fakes.
    monkeypatch.setattr(NetnsPath, "open", FakeNetns.open)
    file = tmp_path / "captured.json"
    first, second = World(tmp_path), World(tmp_path)
    second.redirect = first.redirect
    for world in (first, second):
        world.reconciler = Reconciler(
            first.redirect, verify_interval=timedelta(seconds=1), ledger=Ledger(file)
        )
    following = asyncio.create_task(first.reconciler.follow(first.events()))
    first.reconciler.attach(first.target, synced=True)
    first.add("stays", "leaves", "moves", "dies")
    await eventually(lambda: set(first.states().values()) == {"captured"})
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await first.reconciler.close()

    (tmp_path / "dies").unlink()
    second.netns("elsewhere")
    following = asyncio.create_task(second.reconciler.follow(second.events()))
    second.reconciler.attach(second.target, synced=True)
    second.tell(PodAdded(second.pod("stays")), PodAdded(second.pod("moves", file="elsewhere")))
    second.tell(PodsSynced())
    await second.until(stays="captured", moves="captured")
    # Two calls: for the pod that left, and for the namespace that its pod left.
    await eventually(lambda: second.redirect.calls["remove"] == 2)
    noted = {(entry["uid"], Path(entry["netns"]).name) for entry in json.loads(file.read_text())}
    assert noted == {("uid-stays", "stays"), ("uid-moves", "elsewhere")}
    second.tell(PodRemoved("uid-stays"), PodRemoved("uid-moves"))
    await second.until()
    assert not file.exists()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await second.reconciler.close()


@pytest.mark.parametrize("text", ["", "[", '{"a": 1}', '[{"uid": 1}]', "[3]", '"x"'])
async def test_unreadable_note_of_captured_pods_stops_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / "captured.json").write_text(text)
    assert Ledger(tmp_path / "captured.json").load() == []


async def test_removed_rules_are_repaired_and_counted(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="captured")
    world.redirect.installed.clear()
    await eventually(lambda: world.view("a").repairs == 1)
    assert "uid-a" in world.redirect.installed
    assert world.reconciler.repairs == 1


async def test_rules_are_watched_also_while_no_data_plane_serves(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="captured")
    world.reconciler.detach()
    world.redirect.installed.clear()
    await eventually(lambda: world.view("a").repairs == 1)


async def test_passing_fault_of_the_redirection_is_repeated(world: World) -> None:
    world.redirect.install_faults["uid-a"] = [RedirectError("nft is busy")]
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await eventually(lambda: world.problem("a") == "nft is busy")
    await world.until(a="captured")
    assert world.view("a").problem == ""


async def test_lasting_fault_is_not_repeated_and_touches_no_other_pod(world: World) -> None:
    world.redirect.install_faults["uid-a"] = [NotRetryable("nft is missing; install nftables")]
    world.reconciler.attach(world.target, synced=True)
    world.add("a", "b")
    await world.until(a="failed", b="captured")
    installs = world.redirect.calls["install"]
    await eventually(lambda: world.redirect.calls["verify"] > 3)
    assert world.redirect.calls["install"] == installs
    assert world.view("a").problem == "nft is missing; install nftables"


async def test_capture_that_can_not_be_proven_is_undone(world: World) -> None:
    world.redirect.unverifiable.add("uid-a")
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="failed")
    assert world.redirect.installed == {}
    assert not world.view("a").captured
    assert "a rule isn't there" in world.view("a").problem


@pytest.mark.parametrize("fault", [InUse("port 15008 is taken"), DataplaneLost("gone")])
async def test_pod_that_can_not_be_added_is_not_captured_and_tried_again(
    world: World, fault: DataplaneError
) -> None:
    world.target.faults = [fault, fault]
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await eventually(lambda: world.problem("a") == str(fault))
    assert world.redirect.installed == {}
    await world.until(a="captured")


async def test_lost_listener_is_a_problem_until_all_listen_again(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="captured")
    world.target.taken = True
    world.reconciler.listener_lost("uid-a")
    await eventually(lambda: "15008" in world.problem("a"))
    assert world.view("a").repairs == 1
    # Refused is better than bare.
    assert "uid-a" in world.redirect.installed
    world.target.taken = False
    await world.until(a="captured")
    assert world.problem("a") == ""


async def test_wrong_request_is_not_repeated_until_the_pod_changes(world: World) -> None:
    world.target.faults = [InvalidRequest("service_account is empty")]
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="failed")
    world.netns("a2")
    world.tell(PodAdded(world.pod("a", file="a2")))
    await world.until(a="captured")


async def test_only_a_complete_list_ends_pods_of_an_earlier_agent(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add("a", "b")
    await world.until(a="captured", b="captured")
    assert world.target.kept == []
    assert not world.target.synced
    world.tell(PodsSynced())
    await eventually(lambda: world.target.synced)
    assert world.target.kept == [{"uid-a", "uid-b"}]


async def test_announcement_that_fails_is_repeated(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "ANNOUNCE_AGAIN", 0.01)
    world.target.keep_faults = [DataplaneSilent("no answer")]
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    world.tell(PodsSynced())
    await eventually(lambda: world.target.synced)
    assert world.target.kept == [{"uid-a"}]


async def test_node_is_settled_though_one_pod_of_the_list_fails(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.tell(PodAdded(world.pod("absent")))
    world.add("a")
    assert not world.reconciler.settled
    world.tell(PodsSynced())
    await eventually(lambda: world.reconciler.settled)


async def test_new_data_plane_gets_every_pod_and_rules_stay_meanwhile(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add("a", "b")
    world.tell(PodsSynced())
    await world.until(a="captured", b="captured")
    world.reconciler.detach()
    assert set(world.redirect.installed) == {"uid-a", "uid-b"}
    second = FakeTarget()
    world.reconciler.attach(second, synced=False)
    await eventually(lambda: set(second.up) == {"uid-a", "uid-b"})
    await eventually(lambda: second.kept == [{"uid-a", "uid-b"}])
    assert world.redirect.calls["remove"] == 0


async def test_rules_found_at_start_are_kept_or_updated_before_the_data_plane_listens(
    world: World,
) -> None:
    world.redirect.installed["uid-a"] = CaptureConfig(exempt_cgroups=(Path("/old"),))
    world.redirect.reconfigure(CaptureConfig(exempt_cgroups=(Path("/new"),)))
    world.redirect.installed["uid-b"] = world.redirect.config
    world.target.hold = asyncio.Event()
    world.reconciler.attach(world.target, synced=False)
    world.add("a", "b")
    await eventually(lambda: world.redirect.installed.get("uid-a") == world.redirect.config)
    assert world.target.up == {}
    assert world.redirect.calls["install"] == 1
    world.target.hold.set()
    await world.until(a="captured", b="captured")


async def test_successor_is_prepared_in_a_pause_and_then_has_the_pods(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    await world.until(a="captured")
    successor = FakeTarget()
    async with world.reconciler.paused():
        await world.reconciler.prepare(successor)
        assert set(successor.prepared) == {"uid-a"}
        world.add("b")
        await eventually(lambda: "b" in world.states())
        await asyncio.sleep(0.05)
        assert set(world.target.up) == {"uid-a"}
        world.reconciler.switch(successor)
    await world.until(a="captured", b="captured")
    assert successor.up.keys() == {"uid-b"}
    assert world.target.up.keys() == {"uid-a"}


async def test_changed_exemption_reaches_every_captured_pod(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.add(*(f"p{number}" for number in range(20)))
    await eventually(lambda: set(world.states().values()) == {"captured"})
    config = CaptureConfig(exempt_cgroups=(Path("/one"), Path("/two")))
    await world.reconciler.reconfigure(config)
    assert set(world.redirect.installed.values()) == {config}
    world.redirect.install_faults["uid-p3"] = [RedirectError("busy")]
    with pytest.raises(CaptureError, match="shop/p3: busy"):
        await world.reconciler.reconfigure(CaptureConfig())


async def test_dns_changes_in_place_rules_first_when_it_goes_and_last_when_it_comes(
    world: World,
) -> None:
    world.add("a")
    world.tell(PodsSynced())
    world.reconciler.attach(world.target, synced=True)
    await world.until(a="captured")
    on = world.pod("a")
    assert world.target.settings["uid-a"].dns
    order: list[str] = []
    world.redirect.heard = world.target.heard = order.append
    for wanted in (False, True):
        order.clear()
        world.tell(PodAdded(replace(on, dns_capture=wanted)))
        await eventually(lambda: len(order) >= 2)
        assert world.target.settings["uid-a"].dns is wanted
        assert order[:2] == (["updated", "install"] if wanted else ["install", "updated"])
        assert world.redirect.dns["uid-a"] is wanted
    assert world.target.removed == []
    assert world.view("a").captured


async def test_probe_ports_change_in_place(world: World) -> None:
    world.add("a")
    world.tell(PodsSynced())
    world.reconciler.attach(world.target, synced=True)
    await world.until(a="captured")
    world.tell(PodAdded(replace(world.pod("a"), probe_ports=(80, 8080))))
    await eventually(lambda: world.target.settings["uid-a"].probe_ports == [80, 8080])
    assert world.target.removed == []
    assert world.view("a").captured


async def test_dns_changed_while_no_data_plane_serves_goes_with_the_next(world: World) -> None:
    world.add("a")
    world.tell(PodsSynced())
    world.reconciler.attach(world.target, synced=True)
    await world.until(a="captured")
    world.reconciler.detach()
    world.tell(PodAdded(replace(world.pod("a"), dns_capture=False)))
    await eventually(lambda: not world.redirect.dns["uid-a"])
    assert world.target.updated == []
    world.reconciler.attach(world.target, synced=True)
    await eventually(lambda: not world.target.settings["uid-a"].dns)
    assert world.target.removed == []


async def test_without_capture_the_data_plane_only_listens(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.reconciler = Reconciler(None, verify_interval=timedelta(seconds=1))
    following = asyncio.create_task(world.reconciler.follow(world.events()))
    world.reconciler.attach(world.target, synced=True)
    world.add("a")
    world.tell(PodsSynced())
    await world.until(a="not captured")
    await eventually(lambda: world.reconciler.settled)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await world.reconciler.close()


async def test_agents_own_namespace_is_served_and_never_redirected(world: World) -> None:
    world.reconciler.attach(world.target, synced=True)
    world.netns("own")
    world.tell(PodAdded(replace(world.pod("own"), only_ports=(15020,))))
    world.add("a")
    world.tell(PodsSynced())
    await world.until(own="served", a="captured")
    await eventually(lambda: world.reconciler.settled)
    assert world.target.settings["uid-own"] == control_pb2.PodSettings(
        capture=control_pb2.PodSettings.NONE, only_ports=[15020]
    )
    assert set(world.redirect.installed) == {"uid-a"}


def test_leaving_goes_rules_then_data_plane_then_namespace() -> None:
    pod = Pod("u", "n", "ns", "sa", NetnsPath(Path("/x")))
    leaving = Enrolment(pod, None, netns_fd=5, netns=NetnsId(1, 1), added_to=3, captured=True)
    node = Node(generation=3, synced=True, captures=Captures(FakeRedirect()))
    assert leaving.next(node, 0) is Step.RELEASE
    assert leaving.next(Node(4, True, Captures(FakeRedirect())), 0) is Step.UNCAPTURE
    leaving.captured, leaving.released = False, True
    assert leaving.next(node, 0) is Step.REMOVE
    leaving.added_to, leaving.drained_by = 0, 5.0
    assert leaving.next(node, 4.9) is Step.REST
    assert leaving.next(node, 5.0) is Step.UNCAPTURE
    leaving.released = False
    assert leaving.next(Node(4, True, Captures(FakeRedirect())), 0) is Step.CLOSE
    leaving.added_to, leaving.netns_fd = 0, -1
    assert leaving.next(node, 0) is Step.FORGET
