"""Capture by nftables: the rules, the routing they need, and the check that both are there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from redirect import (
    cgroups,
    conntrack,
    datagram_rules,
    generation,
    nft,
    precapture,
    readback,
    routes,
    ruleset,
    sock_diag,
    sockets,
)
from redirect.base import (
    CaptureConfig,
    Datagrams,
    Installed,
    NotRetryable,
    Probe,
    RedirectError,
    Target,
)
from redirect.netns import NetnsThread

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

BY_MARK_ALONE = (
    "nftables can't match cgroups here (it takes kernel 5.13 with nft_socket, and cgroup2 mounted"
    f" below {cgroups.NFT_ROOT}): the data plane is exempt by its mark alone, which every process"
    " with NET_RAW can set"
)

OLDER_BREAK = (
    "the kernel has no ctnetlink (CONFIG_NF_CT_NETLINK): connections older than their pod's capture"
    " break at their next packet"
)

_EMPTY = f"table {ruleset.FAMILY} {ruleset.TABLE} {{\n}}\n"


@dataclass(frozen=True)
class _Proof:
    namespace: tuple[int, int]
    text: str
    # Ids of the cgroups that the text names by path.
    leaves: tuple[int, ...]


class NftablesCapture:
    """Implements `Redirect`.

    State: `_config` (by `reconfigure`), what was found once about the node, `_references`
    (by `_reference`), `_proofs` (by `verify`).
    """

    name = "nftables"
    exempts_by_rule = True

    def __init__(self, config: CaptureConfig | None = None) -> None:
        self._config = config or CaptureConfig()
        self._netns = NetnsThread()
        # A namespace without interfaces where rules can be tried and read back.
        self._scratch: int | None = None
        self._cgroup2 = cgroups.Mount()
        # Whether rules can match the cgroup of a socket here; None until tried.
        self._by_cgroup: bool | None = None
        # Whether older connections outlive the rules; told by `probe`.
        self._keeps_older = True
        # What the kernel makes of a rendering, by its text and the ids of the cgroups in it.
        self._references: dict[tuple[str, tuple[int, ...]], readback.Objects] = {}
        # By uid: what was last found to be there, and nftables' generation at that time.
        self._proofs: dict[str, tuple[_Proof, int]] = {}

    async def probe(self) -> Probe:
        """Of the node, not of the configuration: whether the data plane has a cgroup is told by
        whoever starts it."""
        try:
            text = ruleset.render(
                self._config, Target(uid="", name="probe", netns_fd=-1, dns=True), ()
            )
            await self._in_scratch(lambda: _try(text))
            await self._in_scratch(lambda: _try_routes(ipv6=self._config.ipv6))
            by_cgroup = await self._can_match_cgroups()
            self._keeps_older = await self._in_scratch(conntrack.usable)
        except RedirectError as exc:
            return Probe(usable=False, reason=str(exc))
        except OSError as exc:
            return Probe(usable=False, reason=f"namespaces can't be used: {exc}")
        notes = (() if by_cgroup else (BY_MARK_ALONE,), () if self._keeps_older else (OLDER_BREAK,))
        return Probe(usable=True, notes=sum(notes, ()))

    async def install(self, target: Target) -> None:
        config, ipv6 = self._config, self._config.ipv6
        text = ruleset.render(config, target, await self._exempt())
        tracking = ruleset.render_draining(config, target)
        keeps_older = self._keeps_older

        def apply() -> None:
            tracked = target.shared and keeps_older and _know_all(tracking)
            if keeps_older and not target.shared:
                # Until the rules are there, what is opened still breaks: it isn't captured either.
                conntrack.keep(precapture.find(config))
            # Routing first: without it a redirected connection's replies would leave the pod.
            added = routes.install(ipv6=ipv6)
            try:
                _load(text)
            except BaseException:
                if tracked:
                    nft.run(ruleset.delete())
                routes.remove(added)
                raise

        await self._in_pod(target, apply)

    async def verify(self, target: Target) -> tuple[str, ...]:
        try:
            text = ruleset.render(self._config, target, await self._exempt())
            leaves = self._leaf_ids()
        except RedirectError as exc:
            return (str(exc),)
        missing = await self._missing_routes(target)
        namespace = os.fstat(target.netns_fd)
        proof = _Proof((namespace.st_dev, namespace.st_ino), text, leaves)
        before = await self._in_pod(target, generation.current)
        if self._proofs.get(target.uid) == (proof, before):
            return missing
        self._proofs.pop(target.uid, None)
        problems = await self._compare(target, text, leaves)
        if not problems and await self._in_pod(target, generation.current) == before:
            self._proofs[target.uid] = (proof, before)
        return (*problems, *missing)

    async def _missing_routes(self, target: Target) -> tuple[str, ...]:
        ipv6 = self._config.ipv6

        def look() -> tuple[str, ...]:
            there = routes.present()
            return tuple(
                f"{part} is missing" for part in routes.wanted(ipv6=ipv6) if part not in there
            )

        return await self._in_pod(target, look)

    async def _compare(self, target: Target, text: str, leaves: tuple[int, ...]) -> tuple[str, ...]:
        found = await self._in_pod(target, lambda: nft.read(ruleset.FAMILY, ruleset.TABLE))
        problems: tuple[str, ...] = ()
        for _ in range(2):
            problems = readback.differences(found, await self._reference(text, leaves))
            if not problems:
                break
            # nft prints a cgroup by searching for its id, and may now find another path for it.
            self._references.clear()
        return problems

    async def release(self, target: Target) -> None:
        """Policy routing stays: replies of spoofed connections need it."""
        self._proofs.pop(target.uid, None)
        text = ruleset.render_draining(self._config, target)
        await self._in_pod(target, lambda: nft.run(text))

    async def idle(self, target: Target) -> bool:
        return await self._in_pod(target, lambda: conntrack.translated() == 0)

    async def remove(self, target: Target) -> None:
        self._proofs.pop(target.uid, None)

        def withdraw() -> None:
            nft.run(ruleset.delete())
            if target.shared:
                conntrack.forget()
            else:
                routes.remove()

        await self._in_pod(target, withdraw)

    async def list(self, target: Target) -> Installed:
        def look() -> Installed:
            found = nft.read(ruleset.FAMILY, ruleset.TABLE, counters=True)
            return Installed(
                readback.installed(found), tuple(str(part) for part in routes.present())
            )

        return await self._in_pod(target, look)

    async def datagrams(self, target: Target) -> Datagrams:
        def look() -> Datagrams:
            found = nft.counters(ruleset.FAMILY, ruleset.TABLE)
            return Datagrams(
                found.get(datagram_rules.REFUSED, 0), found.get(datagram_rules.UNPROTECTED, 0)
            )

        return await self._in_pod(target, look)

    def reconfigure(self, config: CaptureConfig) -> None:
        self._config = config
        self._references.clear()

    async def close(self) -> None:
        await self._netns.close()
        if self._scratch is not None:
            os.close(self._scratch)
            self._scratch = None

    async def _exempt(self) -> tuple[cgroups.CgroupMatch, ...]:
        leaves = self._config.exempt_cgroups
        if not leaves or not await self._can_match_cgroups():
            return ()
        mounted = self._cgroup2.point()
        if mounted is None:
            raise NotRetryable(f"cgroup2 isn't mounted below {cgroups.NFT_ROOT} any more")
        return tuple(cgroups.match(leaf, mounted) for leaf in leaves)

    async def _can_match_cgroups(self) -> bool:
        """Tried with the root of the mount, which needs no leaf to be there yet."""
        if self._by_cgroup is None:
            mounted = self._cgroup2.point()
            if mounted is None:
                self._by_cgroup = False
                return False
            path = mounted.relative_to(cgroups.NFT_ROOT)
            text = (
                f"table {ruleset.FAMILY} {ruleset.TABLE} {{\n\tchain probe {{\n"
                f'\t\tsocket cgroupv2 level 0 "{path}" accept\n\t}}\n}}\n'
            )
            # A failure of everything isn't one of cgroups: it must not weaken the exemption.
            await self._in_scratch(lambda: _try(_EMPTY))
            try:
                await self._in_scratch(lambda: _try(text))
            except RedirectError:
                self._by_cgroup = False
            else:
                self._by_cgroup = True
        return self._by_cgroup

    def _leaf_ids(self) -> tuple[int, ...]:
        leaves = self._config.exempt_cgroups if self._by_cgroup else ()
        return tuple(cgroups.identify(leaf) for leaf in leaves)

    async def _reference(self, text: str, leaves: tuple[int, ...]) -> readback.Objects:
        """What the kernel makes of this text, with the cgroups as they are now."""
        if (text, leaves) not in self._references:
            made = await self._in_scratch(lambda: _try(text))
            self._references[text, leaves] = made
        return self._references[text, leaves]

    async def _in_scratch(self, job: Callable[[], T]) -> T:
        if self._scratch is None:
            self._scratch = await self._netns.create()
        return await self._netns.run(self._scratch, job, subject="scratch namespace")

    async def _in_pod(self, target: Target, job: Callable[[], T]) -> T:
        """As NetnsThread.run; errors of the job name the pod."""

        def named() -> T:
            try:
                return job()
            except RedirectError as exc:
                raise type(exc)(f"{target.name}: {exc}") from exc

        return await self._netns.run(target.netns_fd, named, subject=target.name)


def _load(text: str) -> None:
    try:
        nft.run(ruleset.first(text))
    except nft.Exists:
        nft.run(text)


def _know_all(tracking: str) -> bool:
    """What is open by another way, or opened while the rules come, is known to connection tracking
    before there are any that would redirect it. Whether that took a table."""
    made = nft.read(ruleset.FAMILY, ruleset.TABLE) is None
    if made:
        nft.run(tracking)
    # Of one whose SYN isn't answered, the answer mustn't pass for something odd.
    conntrack.keep(
        one
        for one in sockets.connections(arriving=True)
        if one.state != sock_diag.SYN_SENT and not one.remote[0].is_loopback
    )
    return made


def _try(text: str) -> readback.Objects:
    """Loads the table, reads it back and deletes it."""
    nft.run(text)
    try:
        return nft.read(ruleset.FAMILY, ruleset.TABLE) or []
    finally:
        nft.run(ruleset.delete())


def _try_routes(*, ipv6: bool) -> None:
    routes.bring_lo_up()
    routes.install(ipv6=ipv6)
    routes.remove()
