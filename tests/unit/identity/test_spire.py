"""Certificates of a SPIRE agent: followed, checked, installed with their keys."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import load_der_private_key
from cryptography.x509 import load_pem_x509_certificate

from agent.identity import IdentityState
from agent.identity.spire import SpireIdentities
from agent.identity.spire_config import SpireConfig
from agent.identity.trust import TrustConfig, TrustKeeper
from agent.xds.backoff import Backoff
from proto.gen import control_pb2
from tests.support.eventually import eventually
from tests.support.small_ca import SmallCa
from tests.support.spire_server import FakeSpire, roots_pem
from tests.support.targets import RecordingKeeper

FAST = Backoff(start=timedelta(milliseconds=20), cap=timedelta(milliseconds=60))
SLOW = Backoff(start=timedelta(minutes=5), cap=timedelta(minutes=5))
WEB, DB = "spiffe://cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/shop/sa/db"


@pytest.fixture
async def spire(tmp_path: Path) -> AsyncIterator[FakeSpire]:
    async with FakeSpire(tmp_path / "admin.sock") as spire:
        yield spire


@contextlib.asynccontextmanager
async def running(
    spire: FakeSpire, *, patience: float = 10.0, retry: Backoff = FAST, **more: Any
) -> AsyncIterator[SpireIdentities]:
    config = SpireConfig(socket=spire.socket, patience=timedelta(seconds=patience))
    supply = SpireIdentities(config, "cluster.local", retry=retry, spread=0.05, **more)
    task = asyncio.create_task(supply.run())
    try:
        yield supply
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def status_of(supply: SpireIdentities, identity: str) -> Any:
    return next(entry for entry in supply.status() if entry.identity == identity)


def told(keeper: RecordingKeeper, *parts: str) -> Callable[[], bool]:
    return lambda: any(all(part in text for part in parts) for _, text in keeper.failures)


async def test_an_identity_gets_its_certificate_key_and_roots(spire: FakeSpire) -> None:
    keeper = RecordingKeeper()
    async with running(spire) as supply:
        supply.attach(keeper, [])
        supply.wanted(WEB, connection=True)
        await eventually(lambda: WEB in keeper.installed)
        [(content, _)] = keeper.keys[WEB]
        leaf = load_pem_x509_certificate(keeper.chains[WEB][0].encode())
        key: Any = load_der_private_key(content, None)
        assert leaf.public_key() == key.public_key()
        assert tuple(keeper.roots[WEB]) == roots_pem([spire.signer])
        await eventually(lambda: status_of(supply, WEB).state is IdentityState.AVAILABLE)
        assert spire.asked == [WEB]
        assert keeper.csrs == []
        assert supply.trouble() is None
        assert supply.fetched == 1


async def test_a_key_is_overwritten_once_it_was_installed(spire: FakeSpire) -> None:
    keeper = RecordingKeeper()
    async with running(spire) as supply:
        supply.attach(keeper, [])
        supply.wanted(WEB, connection=False)
        await eventually(lambda: WEB in keeper.installed)
        [(content, secret)] = keeper.keys[WEB]
        assert any(content)
        await eventually(lambda: _content(secret) == bytes(len(content)))
        assert repr(secret) == f"<secret, {len(content)} bytes>"


async def test_a_refused_key_is_overwritten_too(spire: FakeSpire) -> None:
    keeper = RecordingKeeper()
    keeper.refuse = "the key isn't the certificate's"
    async with running(spire, retry=SLOW) as supply:
        supply.attach(keeper, [])
        supply.wanted(WEB, connection=False)
        await eventually(told(keeper, "the key isn't the certificate's"))
        await eventually(lambda: not any(_content(keeper.keys[WEB][0][1])))


def _content(secret: Any) -> bytes:
    content = bytearray()
    secret.append_to(content)
    return bytes(content)


async def test_what_the_server_pushes_is_installed(spire: FakeSpire) -> None:
    keeper = RecordingKeeper()
    async with running(spire, retry=SLOW) as supply:
        supply.attach(keeper, [])
        for identity in (WEB, DB):
            supply.wanted(identity, connection=False)
        await eventually(lambda: len(keeper.installed) == 2)
        before = keeper.installed[WEB].serial
        spire.renew()
        await eventually(lambda: keeper.installed[WEB].serial != before)
        await eventually(lambda: status_of(supply, WEB).serial == keeper.installed[WEB].serial)
        assert sorted(spire.asked) == [DB, WEB], "the same subscriptions"


async def test_the_same_answer_again_is_not_installed_again(spire: FakeSpire) -> None:
    keeper = RecordingKeeper()
    async with running(spire) as supply:
        supply.attach(keeper, [])
        supply.wanted(WEB, connection=False)
        supply.wanted(DB, connection=False)
        await eventually(lambda: len(keeper.installed) == 2)
        spire.push()
        spire.entries[DB] = []
        spire.push()
        await eventually(lambda: "no SVID" in status_of(supply, DB).last_error)
        assert len(keeper.keys[WEB]) == 1
        assert status_of(supply, DB).state is IdentityState.AVAILABLE, "what is valid stays"


async def test_an_svid_for_somebody_else_is_refused_and_both_are_named(spire: FakeSpire) -> None:
    spire.entries[WEB] = [DB]
    keeper = RecordingKeeper()
    async with running(spire, retry=SLOW) as supply:
        supply.attach(keeper, [])
        supply.wanted(WEB, connection=True)
        await eventually(told(keeper, WEB, f"SVID for {DB}", "k8s:ns:shop k8s:sa:web"))
        assert not keeper.installed
        assert status_of(supply, WEB).state is IdentityState.UNAVAILABLE
        assert supply.trouble() is None
        spire.entries[WEB] = [DB, WEB]
        spire.push()
        await eventually(lambda: WEB in keeper.installed)
        await eventually(lambda: status_of(supply, WEB).last_error == "")


async def test_an_svid_whose_certificate_says_otherwise_is_refused(spire: FakeSpire) -> None:
    lying = spire._issue(DB)
    lying.x509_svid.id.path = "/ns/shop/sa/web"
    spire._held[WEB] = lying
    keeper = RecordingKeeper()
    async with running(spire, retry=SLOW) as supply:
        supply.attach(keeper, [])
        supply.wanted(WEB, connection=True)
        await eventually(told(keeper, WEB, f"a certificate for {DB}"))
        assert not keeper.installed


async def test_without_a_registration_entry_the_selectors_are_named(spire: FakeSpire) -> None:
    spire.entries[WEB] = []
    keeper = RecordingKeeper()
    async with running(spire, retry=SLOW) as supply:
        supply.attach(keeper, [])
        supply.wanted(WEB, connection=True)
        await eventually(told(keeper, "no SVID", "k8s:ns:shop k8s:sa:web", "registration entry"))


async def test_an_identity_of_another_trust_domain_is_never_asked(spire: FakeSpire) -> None:
    other = "spiffe://other.td/ns/shop/sa/web"
    keeper = RecordingKeeper()
    async with running(spire, retry=SLOW) as supply:
        supply.attach(keeper, [])
        supply.wanted(other, connection=True)
        await eventually(told(keeper, "other.td", "cluster.local"))
        assert spire.asked == []


async def test_roots_of_another_trust_domain_alone_are_refused(tmp_path: Path) -> None:
    keeper = RecordingKeeper()
    async with FakeSpire(tmp_path / "s", trust_domain="other.td") as spire, running(spire) as run:
        run.attach(keeper, [])
        run.wanted(WEB, connection=True)
        await eventually(told(keeper, "spiffe://other.td", "cluster.local"))
        trouble = run.trouble()
        assert trouble is not None
        assert "other.td" in trouble.cause
        assert spire.asked == []


async def test_who_is_no_delegate_hears_what_to_do(spire: FakeSpire) -> None:
    spire.refuse = (grpc.StatusCode.PERMISSION_DENIED, "caller not configured as a delegate")
    keeper = RecordingKeeper()
    async with running(spire) as supply:
        supply.attach(keeper, [])
        supply.wanted(WEB, connection=True)
        await eventually(told(keeper, str(spire.socket), "PERMISSION_DENIED", "authorized_del"))
        trouble = supply.trouble()
        assert trouble is not None
        assert "authorized_delegates" in trouble.remedy
        spire.refuse = None
        supply.wanted(WEB, connection=True)
        await eventually(lambda: WEB in keeper.installed)
        assert supply.trouble() is None


async def test_without_the_server_what_is_valid_stays_and_it_is_found_again(
    spire: FakeSpire,
) -> None:
    keeper = RecordingKeeper()
    async with running(spire) as supply:
        supply.attach(keeper, [])
        supply.wanted(WEB, connection=False)
        await eventually(lambda: WEB in keeper.installed)
        before = keeper.installed[WEB].serial
        await spire.stop()
        await eventually(lambda: supply.trouble() is not None)
        trouble = supply.trouble()
        assert trouble is not None
        assert str(spire.socket) in trouble.cause
        assert "admin_socket_path" in trouble.remedy
        assert status_of(supply, WEB).state is IdentityState.AVAILABLE
        assert status_of(supply, WEB).last_error == ""
        assert keeper.failures == []
        supply.wanted(DB, connection=True)
        await eventually(told(keeper, "SPIRE agent at", str(spire.socket)))
        await spire.start()
        await eventually(lambda: DB in keeper.installed)
        spire.renew()
        await eventually(lambda: keeper.installed[WEB].serial != before)
        assert supply.trouble() is None


async def test_a_silent_server_is_told(spire: FakeSpire) -> None:
    spire.silent = True
    keeper = RecordingKeeper()
    async with running(spire, patience=0.2) as supply:
        supply.attach(keeper, [])
        supply.wanted(WEB, connection=True)
        await eventually(told(keeper, "didn't answer in 0.2 s"))


async def test_a_certificate_that_isnt_renewed_is_told_before_its_end(spire: FakeSpire) -> None:
    spire.life = timedelta(seconds=3)
    keeper = RecordingKeeper()
    async with running(spire) as supply:
        supply.attach(keeper, [])
        supply.wanted(WEB, connection=False)
        await eventually(lambda: WEB in keeper.installed)
        await eventually(lambda: "hasn't renewed" in status_of(supply, WEB).last_error)
        assert len(keeper.keys[WEB]) == 1


async def test_roots_that_change_are_told_first_and_installed_with_every_certificate(
    spire: FakeSpire, tmp_path: Path
) -> None:
    keeper, judge, new = RecordingKeeper(), RecordingJudge(), SmallCa("new")
    trust = TrustKeeper(TrustConfig(folder=tmp_path))
    await trust.attach(judge)
    async with running(spire, roots=trust) as supply:
        supply.attach(keeper, [])
        for identity in (WEB, DB):
            supply.wanted(identity, connection=False)
        await eventually(lambda: len(keeper.installed) == 2)
        serials = {identity: keeper.installed[identity].serial for identity in (WEB, DB)}
        spire.roots = [spire.signer, new]
        spire.push()
        both = roots_pem(spire.roots)
        await eventually(lambda: all(tuple(keeper.roots[name]) == both for name in serials))
        assert set(judge.roots) == set(both)
        assert {name: keeper.installed[name].serial for name in serials} == serials
        spire.signer, spire.roots = new, [new]
        spire.renew()
        alone = roots_pem([new])
        await eventually(lambda: all(tuple(keeper.roots[name]) == alone for name in serials))
        assert set(judge.roots) == set(both), "the old one counts until its time is over"


async def test_a_new_data_plane_gets_everything_and_the_old_one_nothing_more(
    spire: FakeSpire,
) -> None:
    old, new = RecordingKeeper(), RecordingKeeper()
    async with running(spire) as supply:
        supply.attach(old, [])
        supply.wanted(WEB, connection=False)
        await eventually(lambda: WEB in old.installed)
        supply.attach(new, [])
        await eventually(lambda: WEB in new.installed)
        assert new.installed[WEB].serial == old.installed[WEB].serial
        spire.renew()
        await eventually(lambda: new.installed[WEB].serial != old.installed[WEB].serial)
        assert len(old.keys[WEB]) == 1


async def test_a_data_plane_that_serves_is_followed_by_what_it_holds(spire: FakeSpire) -> None:
    keeper = RecordingKeeper()
    held = control_pb2.CertificateStatus(
        identity=WEB, not_before=1, not_after=4_000_000_000, serial="1"
    )
    async with running(spire) as supply:
        supply.attach(keeper, [held])
        assert status_of(supply, WEB).state is IdentityState.AVAILABLE
        await eventually(lambda: WEB in keeper.installed)


async def test_a_forgotten_identity_is_followed_no_more(spire: FakeSpire) -> None:
    keeper = RecordingKeeper()
    async with running(spire) as supply:
        supply.attach(keeper, [])
        for identity in (WEB, DB):
            supply.wanted(identity, connection=False)
        await eventually(lambda: len(keeper.installed) == 2)
        supply.forgotten(WEB)
        spire.renew()
        await eventually(lambda: len(keeper.keys[DB]) == 2)
        assert len(keeper.keys[WEB]) == 1
        assert [entry.identity for entry in supply.status()] == [DB]


class RecordingJudge:
    def __init__(self) -> None:
        self.roots: list[str] = []

    async def set_trust(self, trust: control_pb2.SetTrust) -> None:
        self.roots = list(trust.additional_roots)
