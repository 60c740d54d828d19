"""What proof connections tell of a pod, and what follows: state, repair, readiness."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from agent.pods import proofs
from agent.pods.proof import NOT_PROVED, PROVED, UNKNOWN
from agent.pods.proofs import Means, judge
from agent.pods.prove_child import Leg, Met, ProofError, ProveChild
from agent.pods.reconciler import Reconciler
from agent.pods.source import PodAdded, PodsSynced
from tests.support.eventually import eventually
from tests.unit.agent.test_reconciler import World

OUT4, OUT6 = Leg(True, 4, b"o4"), Leg(True, 6, b"o6")
IN4, IN6 = Leg(False, 4, b"i4"), Leg(False, 6, b"i6")
LEGS = (OUT4, OUT6, IN4, IN6)
ENDED, REFUSED, SILENT = Met("ended"), Met("refused", "refused"), Met("silent", "no answer")
UNREACHABLE, ABSENT, DENIED = Met("unreachable", "no route"), Met("absent"), Met("denied", "EPERM")


def judged(arrived: Sequence[Leg], *, ebpf: bool = False, **met: Met) -> tuple[str, str]:
    words = {leg.nonce: met.get(leg.nonce.decode(), ENDED) for leg in LEGS}
    return judge(LEGS, words, {leg.nonce for leg in arrived}, ebpf=ebpf)


def test_a_pod_whose_connections_all_arrive_is_proved() -> None:
    assert judged(LEGS) == (PROVED, "")


def test_one_family_is_enough_where_the_pod_has_no_other() -> None:
    assert judged((OUT4, IN4), o6=UNREACHABLE, i6=ABSENT) == (PROVED, "")


@pytest.mark.parametrize("met", [REFUSED, SILENT, ENDED, Met("held"), Met("answered")])
def test_a_connection_out_of_the_pod_that_doesnt_arrive_disproves(met: Met) -> None:
    state, reason = judged((OUT4, IN4, IN6), o6=met)
    assert state == NOT_PROVED
    assert "out of the pod (IPv6)" in reason


def test_without_a_route_only_ebpf_still_captures() -> None:
    assert judged((OUT6, IN4, IN6), o4=UNREACHABLE)[0] == PROVED
    assert judged((OUT6, IN4, IN6), o4=UNREACHABLE, ebpf=True)[0] == NOT_PROVED


def test_a_refused_connection_into_the_pod_disproves() -> None:
    state, reason = judged((OUT4, OUT6, IN6), i4=REFUSED)
    assert state == NOT_PROVED
    assert "to the pod (IPv4)" in reason


@pytest.mark.parametrize("met", [UNREACHABLE, SILENT, ABSENT])
def test_a_pod_out_of_the_nodes_reach_is_unknown_with_its_own_reason(met: Met) -> None:
    state, reason = judged((OUT4, OUT6), i4=met, i6=met)
    assert state == UNKNOWN
    assert reason.startswith("the node can't reach the pod: ")


def test_what_the_kernel_refuses_goes_nowhere_and_disproves_nothing() -> None:
    assert judged((IN4, IN6), o4=DENIED, o6=DENIED)[0] == UNKNOWN


class FakeMaker:
    """A child that meets what it is told to."""

    def __init__(self) -> None:
        self.met = REFUSED
        self.fails = ""
        self.pods: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def make(self, legs: Sequence[tuple[int, Leg]]) -> Mapping[bytes, Met]:
        self.pods.append(len({fd for fd, _ in legs}))
        await self.gate.wait()
        if self.fails:
            raise ProofError(self.fails)
        return {leg.nonce: self.met for _, leg in legs}

    def kill(self) -> None: ...


class ProvedWorld(World):
    def __init__(self, folder: Path, means: Means) -> None:
        super().__init__(folder)
        self.reconciler = Reconciler(
            self.redirect, verify_interval=timedelta(seconds=20), proofs=means
        )

    def told(self, name: str) -> dict[str, object]:
        """Empty before the pod is known."""
        views = {view.name: vars(view) for view in self.reconciler.views()}
        return views.get(name, {})

    async def proved(self, name: str, state: str) -> None:
        await eventually(lambda: self.told(name).get("proof") == state, what=self.reconciler.views)


@pytest.fixture
def maker() -> FakeMaker:
    return FakeMaker()


@pytest.fixture
async def world(tmp_path: Path, maker: FakeMaker) -> AsyncIterator[ProvedWorld]:
    world = ProvedWorld(tmp_path, Means(maker, timedelta(seconds=60)))
    following = asyncio.create_task(world.reconciler.follow(world.events()))
    world.reconciler.attach(world.target, synced=True)
    yield world
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await world.reconciler.close()


async def test_a_captured_pod_is_proved_and_the_node_ready_only_then(
    world: ProvedWorld, maker: FakeMaker
) -> None:
    maker.gate.clear()
    world.add("a")
    world.tell(PodsSynced())
    await eventually(lambda: world.told("a").get("verified"))
    assert world.view("a").proof == ""
    assert not world.reconciler.settled
    maker.gate.set()
    await world.proved("a", PROVED)
    assert world.reconciler.settled
    assert world.reconciler.prover.counts[PROVED] == 1


async def test_a_disproved_pod_is_repaired_and_proved_again(
    world: ProvedWorld, maker: FakeMaker
) -> None:
    world.target.arrives = False
    world.add("a")
    await world.proved("a", NOT_PROVED)
    view = world.view("a")
    assert not view.verified
    assert "refused" in view.problem
    assert view.remedy
    world.target.arrives = True
    await world.proved("a", PROVED)
    view = world.view("a")
    assert view.verified
    assert not view.problem
    assert view.repairs >= 1
    assert world.redirect.calls["install"] >= 2


async def test_one_bad_pod_keeps_the_node_out_only_for_a_while(
    world: ProvedWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.target.arrives = False
    world.add("a")
    world.tell(PodsSynced())
    await world.proved("a", NOT_PROVED)
    assert not world.reconciler.settled
    loop = asyncio.get_running_loop()
    later = loop.time() + proofs.PATIENCE
    monkeypatch.setattr("agent.pods.reconciler._now", lambda: later)
    assert world.reconciler.settled
    assert world.view("a").proof == NOT_PROVED


async def test_many_pods_share_a_child(world: ProvedWorld, maker: FakeMaker) -> None:
    maker.gate.clear()
    names = [f"p{number}" for number in range(40)]
    world.add(*names)
    await eventually(lambda: all(world.told(name).get("verified") for name in names))
    maker.gate.set()
    await eventually(lambda: all(world.told(name)["proof"] == PROVED for name in names))
    assert sum(maker.pods) == 40
    assert len(maker.pods) <= 4


async def test_a_child_that_fails_says_nothing_against_pods(
    world: ProvedWorld, maker: FakeMaker
) -> None:
    maker.fails = "it can't be started"
    world.add("a")
    world.tell(PodsSynced())
    await world.proved("a", UNKNOWN)
    assert world.view("a").verified
    assert "can't be started" in world.view("a").proof_reason
    assert world.reconciler.settled


async def test_the_next_data_plane_proves_anew(world: ProvedWorld) -> None:
    world.add("a")
    await world.proved("a", PROVED)
    world.reconciler.detach()
    assert world.view("a").proof == ""
    world.reconciler.attach(world.target, synced=True)
    await world.proved("a", PROVED)


async def test_a_proof_during_a_change_of_data_planes_counts_for_nothing(
    world: ProvedWorld, maker: FakeMaker
) -> None:
    maker.gate.clear()
    world.target.arrives = False
    world.add("a")
    await eventually(lambda: maker.pods == [1])
    world.reconciler.switch(world.target)
    maker.gate.set()
    await eventually(lambda: len(maker.pods) > 1)
    world.target.arrives = True
    await world.proved("a", PROVED)


async def test_without_the_program_nothing_is_proved_and_nothing_waits(tmp_path: Path) -> None:
    world = ProvedWorld(tmp_path, Means(None, timedelta(seconds=60), why="no program here"))
    following = asyncio.create_task(world.reconciler.follow(world.events()))
    world.reconciler.attach(world.target, synced=True)
    world.netns("a")
    world.tell(PodAdded(world.pod("a")), PodsSynced())
    await eventually(lambda: world.told("a").get("proof") == UNKNOWN)
    assert world.view("a").proof_reason == "no program here"
    assert world.view("a").verified
    assert world.reconciler.settled
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await world.reconciler.close()


async def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProofError, match="nowhere"):
        await ProveChild(tmp_path / "nowhere", None).make([])


async def test_a_program_that_doesnt_know_the_word_is_quoted(tmp_path: Path) -> None:
    program = tmp_path / "old"
    program.write_text("#!/bin/sh\necho \"unrecognized subcommand '$1'\" >&2\nexit 64\n")
    program.chmod(0o755)
    with pytest.raises(ProofError, match="ended with 64: unrecognized subcommand 'prove'"):
        await ProveChild(program, None).make([])


async def test_a_pod_whose_processes_live_elsewhere_fails(
    world: ProvedWorld, tmp_path: Path
) -> None:
    """This process stands for them; the pod's namespace is a file."""
    cgroup = tmp_path / "cgroup"
    cgroup.mkdir()
    world.netns("a")
    world.tell(PodAdded(replace(world.pod("a"), cgroup=cgroup)))
    await world.proved("a", PROVED)
    (cgroup / "cgroup.procs").write_text(f"{os.getpid()}\n")
    world.tell(PodAdded(replace(world.pod("a"), cgroup=cgroup, probe_ports=(80,))))
    world.reconciler.detach()
    world.reconciler.attach(world.target, synced=True)
    wanted = f"{cgroup}: none of its processes lives in"
    await eventually(lambda: wanted in str(world.told("a")["problem"]))
