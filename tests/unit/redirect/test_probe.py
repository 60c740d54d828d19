"""Machines that can't capture say so, with a remedy, instead of failing later."""

from __future__ import annotations

import sys

import pytest

from redirect import NftablesCapture, NotRetryable, RedirectError, nft
from redirect.netns import NetnsThread


async def test_without_the_library_the_probe_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def here(self: object, fd: int, job: object, *, subject: str) -> object:
        return job()  # type: ignore[operator]

    async def create(self: object) -> int:
        return -1

    monkeypatch.setitem(sys.modules, "nftables", None)
    monkeypatch.setattr(NetnsThread, "run", here)
    monkeypatch.setattr(NetnsThread, "create", create)
    probe = await NftablesCapture().probe()
    assert not probe.usable
    assert "python3-nftables" in probe.reason


async def test_without_the_capability_the_probe_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def create(self: object) -> int:
        raise NotRetryable("can't be made: not permitted; give the agent CAP_SYS_ADMIN")

    monkeypatch.setattr(NetnsThread, "create", create)
    probe = await NftablesCapture().probe()
    assert not probe.usable
    assert "CAP_SYS_ADMIN" in probe.reason


@pytest.mark.parametrize(
    ("printed", "remedy"),
    [
        ("Error: Could not process rule: Operation not permitted\n", "CAP_NET_ADMIN"),
        ("Error: Could not process rule: Operation not supported\n", "nft_chain_nat"),
        ("Error: Could not process rule: No such file or directory\n", "nft_chain_nat"),
        ("Error: cgroupv2 path fails: No such file or directory\n", "data plane running"),
    ],
)
def test_what_nft_prints_comes_with_a_remedy(printed: str, remedy: str) -> None:
    error = nft.explain(printed)
    assert isinstance(error, RedirectError)
    assert remedy in str(error)
    assert "Error: " in str(error)
