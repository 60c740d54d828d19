"""Which connections count as older: noted, restored, cut or not; without a kernel."""

from __future__ import annotations

import asyncio
import os
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

import pytest

from agent.namespaces import NamespaceRules
from agent.pods import precapture as watch
from agent.pods.netns import NetnsId, NetnsPath
from agent.pods.precapture import CutError, Precapture
from agent.pods.precapture_note import Note
from agent.pods.source import Pod
from agent.status import PodView
from redirect import precapture
from redirect.base import NotRetryable, RedirectError
from redirect.sockets import Connection
from tests.support.eventually import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NETNS = NetnsId(1, 2)


def one(port: int) -> Connection:
    here, there = IPv4Address("10.0.0.2"), IPv4Address("10.0.0.9")
    return Connection((here, port), (there, 80), id=port.to_bytes(48))


class Kernel:
    """`older`: what a look finds that knows nothing; `open`: what is still connected."""

    def __init__(self) -> None:
        self.older: list[Connection] = []
        self.open: list[Connection] = []
        self.fault: RedirectError | None = None
        self.cut_fault: RedirectError | None = None
        self.looks = 0

    def confirmed(self, _: object) -> list[Connection]:
        self.looks += 1
        if self.fault is not None:
            raise self.fault
        return self.older

    def alive(self, known: list[tuple[int, bytes]]) -> list[Connection]:
        return [c for c in self.open if (c.family, c.id) in known]

    def cut(self, doomed: list[Connection]) -> int:
        if self.cut_fault is not None:
            raise self.cut_fault
        self.open = [c for c in self.open if c not in doomed]
        self.older = []
        return len(doomed)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    for name in ("confirmed", "alive", "cut"):
        monkeypatch.setattr(precapture, name, getattr(made, name))

    async def inside(self: Precapture, entry: object, job: Callable[[], Any]) -> Any:
        return job()

    monkeypatch.setattr(Precapture, "_inside", inside)
    monkeypatch.setattr(watch, "FRESH", 0.0)
    return made


@pytest.fixture
def fd() -> Iterator[int]:
    opened = os.open(os.devnull, os.O_RDONLY)
    yield opened
    os.close(opened)


def pod(namespace: str = "shop") -> Pod:
    return Pod("u", "a", namespace, "default", NetnsPath(watch.__file__))  # type: ignore[arg-type]


def view(found: Precapture) -> PodView:
    return found.seen(
        PodView("u", "a", "shop", "default", "/x", "captured", captured=True, verified=True)
    )


async def test_pod_is_enforced_once_none_is_left(kernel: Kernel, fd: int) -> None:
    kernel.older = kernel.open = [one(1), one(2)]
    found = Precapture()
    assert view(found).precapture_connections is None
    assert not view(found).enforced
    await found.enrolled(pod(), NETNS, fd, anew=True)
    assert view(found).precapture_connections == found.count == 2
    assert view(found).precapture_named == (str(one(1)), str(one(2)))
    # What comes later isn't older: it isn't looked for any more.
    kernel.open = [one(2), one(3)]
    await found.enrolled(pod(), NETNS, fd, anew=False)
    await found.refresh()
    assert view(found).precapture_connections == 1
    kernel.open = []
    await found.refresh()
    assert view(found).enforced
    assert kernel.looks == 1
    await found.close()


async def test_next_agent_knows_what_it_could_not_find_itself(
    kernel: Kernel, fd: int, tmp_path: Path
) -> None:
    path = tmp_path / "note"
    kernel.older = kernel.open = [one(1), one(2)]
    first = Precapture(note=Note(path))
    await first.enrolled(pod(), NETNS, fd, anew=True)
    await first.close()
    kernel.older = []
    second = Precapture(note=Note(path))
    await second.enrolled(pod(), NETNS, fd, anew=False)
    assert second.count == 2
    # In another namespace it is another pod.
    third = Precapture(note=Note(path))
    await third.enrolled(pod(), NetnsId(3, 2), fd, anew=True)
    assert third.count == 0
    second.forget("u")
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"u": {}}', '{"u": {"inode": 1}}', "\0"])
async def test_note_that_cannot_be_read_is_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "note"
    path.write_text(text)
    assert Note(path).load() == {}


async def test_pod_that_could_not_be_looked_at_is_looked_at_again(
    kernel: Kernel, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "FIRST_PAUSE", 0.01)
    kernel.fault = RedirectError("not now")
    found = Precapture()
    await found.enrolled(pod(), NETNS, fd, anew=True)
    assert view(found).precapture_connections is None
    kernel.fault, kernel.older = None, [one(1)]
    await found.refresh()
    assert found.count == 1


@pytest.mark.parametrize(
    ("everywhere", "rules", "left"),
    [
        (False, NamespaceRules(), 1),
        (True, NamespaceRules(), 0),
        (False, NamespaceRules(cut_precapture=True), 0),
        (True, NamespaceRules(cut_precapture=False), 1),
    ],
)
async def test_namespace_says_whether_its_pods_are_cut(
    kernel: Kernel, fd: int, everywhere: bool, rules: NamespaceRules, left: int
) -> None:
    kernel.older = kernel.open = [one(1)]
    found = Precapture(cut_all=everywhere, namespaces={"shop": rules})
    await found.enrolled(pod(), NETNS, fd, anew=True)
    assert (found.count, found.cuts) == (left, 1 - left)


async def test_kernel_that_cannot_cut_is_told_with_what_to_do(kernel: Kernel, fd: int) -> None:
    kernel.older = kernel.open = [one(1)]
    kernel.cut_fault = NotRetryable(precapture.NO_SOCK_DESTROY)
    found = Precapture(cut_all=True)
    await found.enrolled(pod(), NETNS, fd, anew=True)
    assert "CONFIG_INET_DIAG_DESTROY" in view(found).problem
    assert view(found).remedy
    with pytest.raises(CutError, match="shop/a"):
        await found.cut()
    # Nothing is wrong any more once it ended.
    kernel.open = []
    await found.refresh()
    assert not view(found).problem


async def test_more_than_are_kept_in_mind_are_looked_for_anew(
    kernel: Kernel, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "KNOWN", 2)
    kernel.older = kernel.open = [one(1), one(2), one(3)]
    found = Precapture()
    await found.enrolled(pod(), NETNS, fd, anew=True)
    assert found.count == 2
    kernel.older = kernel.open = [one(3)]
    await found.refresh()
    assert found.count == 1


async def test_looks_grow_rarer_and_end_with_the_last_connection(
    kernel: Kernel, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(watch, "LONGEST_PAUSE", 0.04)
    kernel.older = kernel.open = [one(1)]
    found = Precapture()
    running = asyncio.create_task(found.run())
    await found.enrolled(pod(), NETNS, fd, anew=True)
    assert found.count == 1
    kernel.open = []
    await eventually(lambda: found.count == 0)
    running.cancel()
