"""Install, verify, repair and remove in real namespaces."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from redirect import (
    CaptureConfig,
    NetnsGone,
    NftablesCapture,
    Ports,
    RedirectError,
    Target,
    cgroups,
    nft,
)
from tests.netns.redirect_pods import World, cgroup_leaf, target, world

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture
def place() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.fixture
def leaf() -> Iterator[Path]:
    with cgroup_leaf() as made:
        yield made


@pytest.fixture
def pod(place: World) -> Iterator[Target]:
    with target(place.pod) as made:
        yield made


@pytest.fixture
async def redirect(leaf: Path) -> AsyncIterator[NftablesCapture]:
    made = NftablesCapture(CaptureConfig(exempt_cgroups=(leaf,)))
    yield made
    await made.close()


MANY = """
import asyncio, sys
from pathlib import Path
from agent.pods.netns import NetnsPath
from redirect import NftablesCapture, Target

async def main():
    place = NetnsPath(Path(sys.argv[1]))
    held = [place.open() for _ in range(1100)]
    redirect, target = NftablesCapture(), Target(uid="u", name="shop/web", netns_fd=held[-1])
    await redirect.install(target)
    print(await redirect.verify(target))

asyncio.run(main())
"""


def test_an_agent_that_holds_more_than_a_thousand_namespaces_still_captures(place: World) -> None:
    """libnftables ends its process where its socket's number is above what select(2) takes."""
    done = subprocess.run(
        [sys.executable, "-c", MANY, f"/run/netns/{place.pod.netns}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "()\n"), done.stderr


def routing(place: World) -> str:
    """Everything that capture could leave behind, both families."""
    commands = [
        ["nft", "list", "ruleset"],
        ["ip", "-4", "rule"],
        ["ip", "-6", "rule"],
        ["ip", "-4", "route", "show", "table", "all"],
        ["ip", "-6", "route", "show", "table", "all"],
    ]
    return "\n".join(place.pod.run(*command) for command in commands)


async def test_an_installed_pod_verifies(
    redirect: NftablesCapture, pod: Target, place: World
) -> None:
    await redirect.install(pod)
    assert await redirect.verify(pod) == ()
    assert "socket cgroupv2" in place.pod.run("nft", "list", "table", "inet", "underpass")


async def test_installing_twice_changes_nothing(
    redirect: NftablesCapture, pod: Target, place: World
) -> None:
    await redirect.install(pod)
    before = routing(place)
    await redirect.install(pod)
    assert routing(place) == before
    assert await redirect.verify(pod) == ()


async def test_removal_leaves_the_namespace_as_it_was(
    redirect: NftablesCapture, pod: Target, place: World
) -> None:
    before = routing(place)
    await redirect.install(pod)
    assert routing(place) != before
    await redirect.remove(pod)
    assert routing(place) == before
    await redirect.remove(pod)
    assert routing(place) == before


async def test_removal_leaves_others_rules_alone(
    redirect: NftablesCapture, pod: Target, place: World
) -> None:
    place.pod.run("nft", "add table inet istio-ambient-nat")
    place.pod.run("ip", "rule", "add", "pref", "100", "fwmark", "0x7", "lookup", "100")
    place.pod.run("ip", "route", "add", "192.0.2.0/24", "dev", "eth0", "table", "100")
    before = routing(place)
    await redirect.install(pod)
    await redirect.remove(pod)
    assert routing(place) == before


SABOTAGE = {
    "removed table": ("nft delete table inet underpass", "the table was removed"),
    "flushed ruleset": ("nft flush ruleset", "the table was removed"),
    "flushed chain": ("nft flush chain inet underpass nat_output", "outbound-v4 is missing"),
    "emptied inbound": ("nft flush chain inet underpass nat_prerouting", "inbound-v6 is missing"),
    "added rule": (
        "nft insert rule inet underpass nat_output tcp dport 443 accept",
        "rule without a name was added to nat_output",
    ),
    "impostor": (
        'nft insert rule inet underpass nat_output accept comment "outbound-v4"',
        "rule outbound-v4 was added to nat_output",
    ),
    "added chain": ("nft add chain inet underpass extra", "chain extra was added"),
    "added set": ("nft add set inet underpass s { type ipv4_addr; }", "set s isn't as installed"),
    "policy": (
        "nft chain inet underpass nat_output { policy drop; }",
        "chain nat_output hooks in differently",
    ),
    "dormant table": ("nft add table inet underpass { flags dormant; }", "isn't as installed"),
    "rule 4": ("ip rule del pref 32764", "IPv4 rule 32764: fwmark 0x111/0xfff lookup 100"),
    "rule 6": ("ip -6 rule del pref 32764", "IPv6 rule 32764"),
    "route 4": ("ip route flush table 100", "IPv4 route: local default dev lo table 100"),
    "route 6": ("ip -6 route flush table 100", "IPv6 route: local default dev lo table 100"),
}


@pytest.mark.parametrize(("command", "problem"), SABOTAGE.values(), ids=SABOTAGE.keys())
async def test_verify_names_the_sabotage_and_install_repairs_it(
    redirect: NftablesCapture, pod: Target, place: World, command: str, problem: str
) -> None:
    await redirect.install(pod)
    place.pod.run(*_words(command))
    problems = await redirect.verify(pod)
    assert any(problem in text for text in problems), problems
    await redirect.install(pod)
    assert await redirect.verify(pod) == ()


async def test_verify_names_a_changed_rule(
    redirect: NftablesCapture, pod: Target, place: World
) -> None:
    await redirect.install(pod)
    handle = _handle(place, "nat_output", "outbound-v4")
    place.pod.run(
        "nft",
        f"replace rule inet underpass nat_output handle {handle} meta l4proto tcp"
        ' ip daddr != 127.0.0.0/8 counter redirect to :9 comment "outbound-v4"',
    )
    assert await redirect.verify(pod) == ("rule outbound-v4 in nat_output was changed",)


async def test_verify_names_a_rule_removed_from_the_middle(
    redirect: NftablesCapture, pod: Target, place: World
) -> None:
    await redirect.install(pod)
    handle = _handle(place, "refuse", "uncaptured")
    place.pod.run("nft", f"delete rule inet underpass refuse handle {handle}")
    assert await redirect.verify(pod) == ("rule uncaptured is missing in refuse",)


async def test_verify_names_another_order(
    redirect: NftablesCapture, pod: Target, place: World
) -> None:
    await redirect.install(pod)
    text = place.pod.run("nft", "list", "chain", "inet", "underpass", "refuse")
    rules = [line.strip() for line in text.splitlines() if "comment" in line]
    place.pod.run("nft", "flush chain inet underpass refuse")
    for rule in [rules[-1], *rules[:-1]]:
        place.pod.run("nft", f"add rule inet underpass refuse {_without_counts(rule)}")
    assert await redirect.verify(pod) == ("rules of refuse stand in another order",)


async def test_verify_notices_that_the_leaf_was_made_again(
    redirect: NftablesCapture, pod: Target, leaf: Path
) -> None:
    """The rule holds the id of the deleted leaf; whatever gets that path now isn't exempt."""
    await redirect.install(pod)
    leaf.rmdir()
    problems = await redirect.verify(pod)
    assert len(problems) == 1
    assert str(leaf) in problems[0]
    leaf.mkdir()
    assert "rule data-plane-1 in nat_output was changed" in await redirect.verify(pod)
    await redirect.install(pod)
    assert await redirect.verify(pod) == ()


async def test_verify_notices_rules_for_the_wrong_data_plane(
    redirect: NftablesCapture, pod: Target, leaf: Path
) -> None:
    await redirect.install(pod)
    with cgroup_leaf() as successor:
        redirect.reconfigure(CaptureConfig(exempt_cgroups=(leaf, successor)))
        assert "rule data-plane-2 is missing in nat_output" in await redirect.verify(pod)
        await redirect.install(pod)
        assert await redirect.verify(pod) == ()
        redirect.reconfigure(CaptureConfig(exempt_cgroups=(successor,)))
        await redirect.install(pod)
        assert await redirect.verify(pod) == ()


async def test_verify_lists_rules_again_only_after_a_change(
    redirect: NftablesCapture, pod: Target, place: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    listings: list[object] = []
    read = nft.read

    def listed(family: str, table: str) -> object:
        listings.append(table)
        return read(family, table)

    monkeypatch.setattr(nft, "read", listed)
    await redirect.install(pod)
    assert await redirect.verify(pod) == ()
    listings.clear()
    assert await redirect.verify(pod) == ()
    assert listings == []
    place.pod.run("nft", "add table inet somebody-elses")
    assert await redirect.verify(pod) == ()
    assert listings
    place.pod.run("nft", "flush chain inet underpass refuse")
    assert await redirect.verify(pod) != ()
    # Still wrong, though nothing was changed since.
    assert await redirect.verify(pod) != ()


async def test_a_namespace_of_another_pod_with_this_uid_is_looked_at(
    redirect: NftablesCapture, pod: Target
) -> None:
    await redirect.install(pod)
    assert await redirect.verify(pod) == ()
    with world() as other, target(other.pod) as same_generation:
        moved = replace(pod, netns_fd=same_generation.netns_fd)
        assert "the table was removed" in await redirect.verify(moved)


async def test_turning_dns_off_leaves_no_dns_rule(pod: Target, place: World) -> None:
    redirect = NftablesCapture(CaptureConfig(ports=Ports(dns=15053)))
    await redirect.install(replace(pod, dns=True))
    assert "15053" in place.pod.run("nft", "list", "ruleset")
    await redirect.install(pod)
    assert "15053" not in place.pod.run("nft", "list", "ruleset")
    assert "raw" not in place.pod.run("nft", "list", "ruleset")
    assert await redirect.verify(pod) == ()
    await redirect.close()


async def test_a_namespace_without_ipv6_needs_no_ipv6_route(
    redirect: NftablesCapture, pod: Target, place: World
) -> None:
    place.pod.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    await redirect.install(pod)
    assert await redirect.verify(pod) == ()
    assert place.pod.run("ip", "-6", "route", "show", "table", "100").strip() == ""


async def test_list_counts_what_was_captured(
    redirect: NftablesCapture, pod: Target, place: World
) -> None:
    assert (await redirect.list(pod)).rules == ()
    await redirect.install(pod)
    with place.pod.socket(socket.AF_INET) as client:
        assert client.connect_ex((place.remote.v4, 80)) != 0
    found = await redirect.list(pod)
    outbound = next(rule for rule in found.rules if rule.name == "outbound-v4")
    assert (outbound.chain, outbound.packets) == ("nat_output", 1)
    assert len(found.routing) == 4


async def test_a_captured_connection_survives_a_new_install(
    redirect: NftablesCapture, pod: Target, place: World
) -> None:
    await redirect.install(pod)
    with (
        place.pod.listen(socket.AF_INET, 15001) as proxy,
        place.pod.listen(socket.AF_INET, 15006) as inbound,
        place.pod.socket(socket.AF_INET) as client,
        place.remote.socket(socket.AF_INET) as peer,
    ):
        client.connect((place.remote.v4, 80))
        peer.connect((place.pod.v4, 80))
        pairs = [(client, proxy.accept()[0]), (peer, inbound.accept()[0])]
        echoed: list[int] = []
        stop = threading.Event()

        def talk() -> None:
            while not stop.is_set():
                for near, far in pairs:
                    near.sendall(b"ping")
                    assert far.recv(4) == b"ping"
                    far.sendall(b"pong")
                    assert near.recv(4) == b"pong"
                echoed.append(1)

        conversation = asyncio.create_task(asyncio.to_thread(talk))
        for _ in range(30):
            await redirect.install(pod)
        stop.set()
        await conversation  # raises what a broken connection raised
        assert echoed
        for _, far in pairs:
            far.close()


async def test_twenty_pods_are_captured_at_the_same_time(redirect: NftablesCapture) -> None:
    with ExitStack() as stack:
        places = [stack.enter_context(world()) for _ in range(20)]
        pods = [stack.enter_context(target(place.pod)) for place in places]
        await asyncio.gather(*(redirect.install(pod) for pod in pods))
        assert set(await asyncio.gather(*(redirect.verify(pod) for pod in pods))) == {()}
        for place in places:
            with (
                place.pod.socket(socket.AF_INET) as client,
                place.pod.listen(socket.AF_INET, 15001) as proxy,
            ):
                client.connect((place.remote.v4, 80))
                proxy.accept()[0].close()
        await asyncio.gather(*(redirect.remove(pod) for pod in pods))
        for place in places:
            assert place.pod.run("nft", "list", "ruleset").strip() == ""


async def test_nothing_happens_in_the_namespace_of_the_caller(
    redirect: NftablesCapture, pod: Target
) -> None:
    def own() -> str:
        return os.readlink("/proc/thread-self/ns/net")

    before = own(), await asyncio.to_thread(own)
    await redirect.install(pod)
    assert (own(), await asyncio.to_thread(own)) == before


async def test_something_else_than_a_namespace_is_gone_for_good(redirect: NftablesCapture) -> None:
    with tempfile.TemporaryFile() as file:
        with pytest.raises(NetnsGone, match="shop/cart"):
            await redirect.install(Target("uid", "shop/cart", file.fileno()))
        with pytest.raises(NetnsGone, match="shop/cart"):
            await redirect.verify(Target("uid", "shop/cart", file.fileno()))
    with pytest.raises(NetnsGone, match="isn't open"):
        await redirect.install(Target("uid", "shop/cart", 9999))


async def test_a_pod_that_cannot_be_written_as_rules_is_left_alone(
    redirect: NftablesCapture, pod: Target, place: World
) -> None:
    before = routing(place)
    with pytest.raises(RedirectError, match="virtual interface") as refusal:
        await redirect.install(replace(pod, virtual_interfaces=('x" accept;',)))
    assert not refusal.value.retryable
    assert routing(place) == before


async def test_a_missing_leaf_fails_with_its_name_and_captures_nothing(
    pod: Target, place: World, leaf: Path
) -> None:
    missing = leaf / "not-there"
    redirect = NftablesCapture(CaptureConfig(exempt_cgroups=(missing,)))
    before = routing(place)
    with pytest.raises(RedirectError, match="is the data plane running") as refusal:
        await redirect.install(pod)
    assert pod.name in str(refusal.value)
    assert refusal.value.retryable
    assert routing(place) == before
    await redirect.close()


async def test_a_failed_repair_keeps_the_old_rules(
    redirect: NftablesCapture, pod: Target, leaf: Path
) -> None:
    await redirect.install(pod)
    redirect.reconfigure(CaptureConfig(exempt_cgroups=(leaf, leaf / "not-there")))
    with pytest.raises(RedirectError):
        await redirect.install(pod)
    redirect.reconfigure(CaptureConfig(exempt_cgroups=(leaf,)))
    assert await redirect.verify(pod) == ()


async def test_the_probe_is_usable_here_without_reservations(redirect: NftablesCapture) -> None:
    probe = await redirect.probe()
    assert (probe.usable, probe.reason, probe.notes) == (True, "", ())


async def test_where_cgroups_cannot_be_matched_the_probe_says_so_and_the_mark_exempts(
    pod: Target, place: World, leaf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text("30 23 0:26 / /mnt/cgroup2 rw - cgroup2 cgroup2 rw\n")
    monkeypatch.setattr(cgroups, "MOUNTINFO", mountinfo)
    redirect = NftablesCapture(CaptureConfig(exempt_cgroups=(leaf,)))
    probe = await redirect.probe()
    assert probe.usable
    assert any("mark alone" in note for note in probe.notes)
    await redirect.install(pod)
    assert await redirect.verify(pod) == ()
    rules = place.pod.run("nft", "list", "table", "inet", "underpass")
    assert "data-plane-by-mark" in rules
    assert "cgroupv2" not in rules
    await redirect.close()


async def test_a_failure_of_nft_as_a_whole_does_not_weaken_the_exemption(
    pod: Target, leaf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redirect = NftablesCapture(CaptureConfig(exempt_cgroups=(leaf,)))

    def broken(text: str) -> None:
        raise RedirectError("nft: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(nft, "run", broken)
        with pytest.raises(RedirectError, match="out of memory"):
            await redirect.install(pod)
    await redirect.install(pod)
    assert any(rule.name == "data-plane-1" for rule in (await redirect.list(pod)).rules)
    await redirect.close()


def _handle(place: World, chain: str, rule: str) -> str:
    text = place.pod.run("nft", "-a", "list", "chain", "inet", "underpass", chain)
    line = next(line for line in text.splitlines() if f'comment "{rule}"' in line)
    return line.rpartition("handle ")[2].strip()


def _without_counts(rule: str) -> str:
    return re.sub(r"counter packets \d+ bytes \d+", "counter", rule)


def _words(command: str) -> list[str]:
    """nft takes its command as one argument, so that braces need no quoting."""
    program, _, rest = command.partition(" ")
    return [program, rest] if program == "nft" else command.split()
