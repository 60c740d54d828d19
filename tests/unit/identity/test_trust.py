"""What the data plane is told of trust, when, and what holds when something can't be read."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.dataplane import DataplaneLost, InvalidRequest
from agent.identity import trust as trust_module
from agent.identity.crl_file import CrlFile
from agent.identity.roots import KnownRoots
from agent.identity.trust import TrustConfig, TrustKeeper
from proto.gen import control_pb2
from tests.support.eventually import eventually

OVERLAP = 600.0


class Judge:
    """A data plane that can't read what contains `garbage`."""

    def __init__(self) -> None:
        self.told: list[control_pb2.SetTrust] = []
        self.lost = False

    async def set_trust(self, trust: control_pb2.SetTrust) -> None:
        if self.lost:
            raise DataplaneLost("gone")
        if b"garbage" in trust.crl:
            raise InvalidRequest("crl: neither PEM nor a list in DER")
        self.told.append(trust)

    @property
    def last(self) -> control_pb2.SetTrust:
        return self.told[-1]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import timedelta

    monkeypatch.setattr(trust_module, "LOOK_EVERY", timedelta(milliseconds=5))


@asynccontextmanager
async def running(keeper: TrustKeeper) -> AsyncIterator[None]:
    task = asyncio.create_task(keeper.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def keeper(folder: Path, crl: Path | None = None, **options: object) -> TrustKeeper:
    return TrustKeeper(TrustConfig(crl=crl, folder=folder, **options))  # type: ignore[arg-type]


async def test_a_data_plane_is_told_everything_before_attach_returns(tmp_path: Path) -> None:
    crl = tmp_path / "crl.pem"
    crl.write_bytes(b"first")
    trust = keeper(tmp_path, crl, aliases=("old.domain",), compliance_policy="pqc")
    judge = Judge()
    await trust.attach(judge)
    assert judge.last.crl == b"first"
    assert list(judge.last.trust_domain_aliases) == ["old.domain"]
    assert judge.last.compliance_policy == "pqc"
    assert not trust.status().crl_error
    assert trust.status().crl_since is not None


async def test_a_changed_file_is_sent_also_behind_swapped_links(tmp_path: Path) -> None:
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "crl.pem").write_text(version)
    (tmp_path / "data").symlink_to("one")
    crl = tmp_path / "crl.pem"
    crl.symlink_to("data/crl.pem")
    judge = Judge()
    trust = keeper(tmp_path, crl)
    await trust.attach(judge)
    async with running(trust):
        assert judge.last.crl == b"one"
        (tmp_path / "new").symlink_to("two")
        (tmp_path / "new").rename(tmp_path / "data")
        await eventually(lambda: judge.last.crl == b"two")
        (tmp_path / "two" / "crl.pem").write_text("three")
        await eventually(lambda: judge.last.crl == b"three")
        assert len(judge.told) == 3, "nothing is sent twice"


async def test_an_empty_file_lifts_revocations_only_when_it_stays_empty(tmp_path: Path) -> None:
    path = tmp_path / "crl.pem"
    path.write_text("one")
    file = CrlFile(path)
    assert await file.changed() == b"one"
    path.write_text("")
    assert await file.changed() is None
    path.write_text("two")
    assert await file.changed() == b"two"
    path.write_text("")
    assert await file.changed() is None
    assert await file.changed() == b""
    assert await file.changed() is None


async def test_a_missing_file_is_told_and_taken_when_it_comes(tmp_path: Path) -> None:
    crl = tmp_path / "crl.pem"
    judge = Judge()
    trust = keeper(tmp_path, crl)
    await trust.attach(judge)
    assert judge.last.crl == b""
    assert str(crl) in trust.status().crl_error
    async with running(trust):
        crl.write_bytes(b"here")
        await eventually(lambda: judge.last.crl == b"here")
        await eventually(lambda: not trust.status().crl_error)
        # One that goes again stays in force.
        crl.unlink()
        await eventually(lambda: bool(trust.status().crl_error))
    assert judge.last.crl == b"here"


async def test_an_unreadable_crl_keeps_the_last_good_one_and_is_told(tmp_path: Path) -> None:
    crl = tmp_path / "crl.pem"
    crl.write_bytes(b"good")
    judge = Judge()
    trust = keeper(tmp_path, crl)
    await trust.attach(judge)
    async with running(trust):
        crl.write_bytes(b"garbage")
        await eventually(lambda: "neither PEM" in trust.status().crl_error)
        assert judge.last.crl == b"good"
        await trust.answered(["root a"])
        assert judge.last.crl == b"good"
        assert trust.status().crl_error, "other changes don't hide it"
        # Also for a data plane, and an agent, that start now.
        fresh, successor = Judge(), keeper(tmp_path, crl)
        await successor.attach(fresh)
        assert fresh.last.crl == b"good"
        assert successor.status().crl_error
        crl.write_bytes(b"better")
        await eventually(lambda: judge.last.crl == b"better")
        await eventually(lambda: not trust.status().crl_error)


async def test_a_lost_data_plane_is_told_when_it_is_back(tmp_path: Path) -> None:
    judge = Judge()
    judge.lost = True
    trust = keeper(tmp_path)
    await trust.attach(judge)
    async with running(trust):
        judge.lost = False
        await eventually(lambda: bool(judge.told))


async def test_old_and_new_roots_count_beside_each_other_until_the_overlap_ends(
    tmp_path: Path,
) -> None:
    now = 1000.0
    judge = Judge()
    trust = TrustKeeper(TrustConfig(folder=tmp_path), clock=lambda: now)
    await trust.attach(judge)
    assert not await trust.answered(["old"]), "the first roots are no rotation"
    assert await trust.answered(["new"])
    assert list(judge.last.additional_roots) == ["new", "old"]
    assert not await trust.answered(["new"])
    # An agent that starts in between knows.
    now = 1300.0
    judge = Judge()
    trust = TrustKeeper(TrustConfig(folder=tmp_path), clock=lambda: now)
    await trust.attach(judge)
    assert list(judge.last.additional_roots) == ["new", "old"]
    assert trust.status().retiring == 1
    async with running(trust):
        now = 1601.0
        await eventually(lambda: list(judge.last.additional_roots) == ["new"])
    assert trust.status().retiring == 0


def test_authorities_that_do_not_agree_start_no_storm() -> None:
    roots = KnownRoots(OVERLAP)
    assert not roots.answered(["old"], 0)
    assert roots.answered(["old", "new"], 1)
    assert not roots.answered(["old", "new"], 2)
    assert roots.answered(["new"], 3)
    # A replica that hasn't heard yet brings the old one back: it stays, and nobody is renewed.
    assert not roots.answered(["old", "new"], 4)
    assert roots.next_end is None
    assert not roots.expire(4 + OVERLAP)


def test_what_answers_leave_out_ends_after_the_overlap() -> None:
    roots = KnownRoots(OVERLAP)
    roots.answered(["old"], 0)
    roots.answered(["new"], 10)
    assert roots.all == ("new", "old")
    assert not roots.expire(9 + OVERLAP)
    assert roots.expire(10 + OVERLAP)
    assert list(roots.all) == ["new"]


def test_roots_are_bounded() -> None:
    roots = KnownRoots(OVERLAP)
    for number in range(200):
        roots.answered([f"root {number}"], float(number))
    assert len(roots.all) <= 64
    assert "root 199" in roots.all


def test_a_clock_that_was_set_back_prolongs_no_overlap() -> None:
    roots = KnownRoots(OVERLAP)
    month = 30 * 24 * 3600.0
    roots.answered(["old"], month)
    roots.answered(["new"], month)
    assert not roots.expire(0)
    assert roots.next_end == OVERLAP
    assert roots.expire(OVERLAP)
    assert roots.all == ("new",)
