"""Connections older than their pod's capture, in the kernel: they outlive the rules, are told from
captured ones, and leave no way in behind."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.netns import inside
from redirect import CaptureConfig, NftablesCapture, precapture
from tests.netns import redirect_pods
from tests.netns.redirect_pods import DATA_PLANE_MARK, cgroup_leaf, target

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from redirect import Target
    from redirect.sockets import Connection
    from tests.netns.redirect_pods import Host, World

FAMILIES = [socket.AF_INET, socket.AF_INET6]
CONFIG = CaptureConfig()


@pytest.fixture
def world() -> Iterator[World]:
    with redirect_pods.world() as made:
        yield made


@pytest.fixture
def pod(world: World) -> Iterator[Target]:
    with target(world.pod) as made:
        yield made


@pytest.fixture
async def rules() -> AsyncIterator[NftablesCapture]:
    made = NftablesCapture(CONFIG)
    yield made
    await made.close()


def joined(
    client: Host, server: Host, family: int, port: int, *, source: int = 0, mapped: bool = False
) -> tuple[socket.socket, socket.socket]:
    """The two ends of a connection; `mapped`: both are IPv6 sockets with IPv4 addresses."""
    kind = socket.AF_INET6 if mapped else family
    with server.listen(kind, port) as listener:
        connecting = client.socket(kind)
        if source:
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            connecting.bind(("", source))
        host = server.address(family)
        connecting.connect((f"::ffff:{host}" if mapped else host, port))
        accepted = listener.accept()[0]
    accepted.settimeout(2)
    return connecting, accepted


def echoes(one: socket.socket, other: socket.socket) -> bool:
    for sender, receiver in ((one, other), (other, one)):
        sender.sendall(b"x")
        if receiver.recv(1) != b"x":
            return False
    return True


def older(world: World, config: CaptureConfig = CONFIG) -> list[Connection]:
    return inside(world.pod.netns, lambda: precapture.confirmed(config))


def port_of(one: socket.socket) -> int:
    return int(one.getsockname()[1])


@pytest.mark.parametrize(
    ("family", "mapped"), [*((f, False) for f in FAMILIES), (socket.AF_INET, True)]
)
async def test_older_connections_live_on_and_are_the_ones_that_are_found(
    world: World, pod: Target, rules: NftablesCapture, family: int, mapped: bool
) -> None:
    with ExitStack() as stack:
        ends = [
            *joined(world.pod, world.remote, family, 80, mapped=mapped),
            *joined(world.remote, world.pod, family, 81, mapped=mapped),
        ]
        for end in ends:
            stack.enter_context(end)
        await rules.install(pod)
        # Nobody listens at 15001: what is redirected fails.
        with (
            world.remote.listen(family, 82),
            world.pod.socket(family) as later,
            pytest.raises(ConnectionRefusedError),
        ):
            later.connect((world.remote.address(family), 82))
        assert echoes(ends[0], ends[1])
        assert echoes(ends[2], ends[3])
        # Rules that are put there once more change nothing.
        await rules.install(pod)
        assert echoes(ends[0], ends[1])
        found = {(one.local[1], one.remote[1]) for one in older(world)}
        assert found == {(port_of(ends[0]), 80), (81, port_of(ends[2]))}
        assert {str(one.local[0]) for one in older(world)} == {world.pod.address(family)}


@pytest.mark.parametrize("family", FAMILIES)
async def test_captured_connections_are_not_found(
    world: World, pod: Target, rules: NftablesCapture, family: int
) -> None:
    await rules.install(pod)
    proxy = world.pod.listen(family, CONFIG.ports.outbound)
    redirect_pods.mark(proxy)
    with proxy, world.pod.socket(family) as app:
        app.connect((world.remote.address(family), 80))
        with proxy.accept()[0] as accepted:
            assert older(world) == []
            assert echoes(app, accepted)
    with world.pod.listen(family, 81) as own, world.pod.socket(family) as self_call:
        self_call.connect((world.pod.address(family), 81))
        with own.accept()[0]:
            assert older(world) == []


async def test_cut_ones_are_reset_at_both_ends_and_others_go_on(
    world: World, pod: Target, rules: NftablesCapture
) -> None:
    for family in FAMILIES:
        cut = joined(world.pod, world.remote, family, 80)
        mapped = joined(world.remote, world.pod, socket.AF_INET, 81, mapped=True)
        spared = joined(world.pod, world.remote, family, 82)
        await rules.install(pod)
        doomed = [one for one in older(world) if 82 not in (one.remote[1], one.local[1])]
        assert inside(world.pod.netns, lambda d=doomed: precapture.cut(d)) == 2  # type: ignore[misc]
        assert inside(world.pod.netns, lambda d=doomed: precapture.cut(d)) == 0  # type: ignore[misc]
        for pair in (cut, mapped):
            for end in pair:
                with end, pytest.raises((ConnectionResetError, ConnectionAbortedError)):
                    end.recv(1)
        assert echoes(*spared)
        known = [(one.family, one.id) for one in doomed]
        assert inside(world.pod.netns, lambda k=known: precapture.alive(k)) == []  # type: ignore[misc]
        for end in spared:
            end.close()
        await rules.remove(pod)


async def test_an_older_connection_that_is_half_closed_is_still_one(
    world: World, pod: Target, rules: NftablesCapture
) -> None:
    app, far = joined(world.pod, world.remote, socket.AF_INET, 80)
    with app, far:
        await rules.install(pod)
        known = [(one.family, one.id) for one in older(world)]
        far.shutdown(socket.SHUT_WR)
        assert app.recv(1) == b""
        app.sendall(b"x")
        assert far.recv(1) == b"x"
        # Who doesn't know it from before can't tell it from a captured one.
        assert older(world) == []
        assert len(inside(world.pod.netns, lambda: precapture.alive(known))) == len(known) == 1
        app.close()
        assert inside(world.pod.netns, lambda: precapture.alive(known)) == []


async def test_mark_of_the_data_plane_hides_no_older_connection(
    world: World, pod: Target, rules: NftablesCapture
) -> None:
    with cgroup_leaf() as leaf:
        config = CaptureConfig(exempt_cgroups=(leaf,))
        rules.reconfigure(config)
        with redirect_pods.inside(leaf):
            own = joined(world.pod, world.remote, socket.AF_INET, 80)
        hiding = joined(world.pod, world.remote, socket.AF_INET, 81)
        for end in (own[0], hiding[0]):
            redirect_pods.mark(end, DATA_PLANE_MARK)
        await rules.install(pod)
        assert [one.remote[1] for one in older(world, config)] == [81]
        assert echoes(*hiding)
        # Nobody lives in its leaf any more, as after a hand-over of its listeners.
        with cgroup_leaf() as successor:
            config = CaptureConfig(exempt_cgroups=(successor,))
            assert [one.remote[1] for one in older(world, config)] == [81]
    # Its leaf is gone, as that of a data plane that handed its listeners over.
    with cgroup_leaf() as leaf:
        config = CaptureConfig(exempt_cgroups=(leaf,))
        assert [one.remote[1] for one in older(world, config)] == [81]
    for end in (*own, *hiding):
        end.close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_tuple_of_a_cut_connection_is_no_way_in(
    world: World, pod: Target, rules: NftablesCapture, family: int
) -> None:
    """Tracking still remembers the connection when its client comes again from the same port."""
    client, accepted = joined(world.remote, world.pod, family, 81)
    again = port_of(client)
    await rules.install(pod)
    assert inside(world.pod.netns, lambda: precapture.cut(older_here())) == 1
    client.close()
    accepted.close()
    with world.pod.listen(family, 81) as application, world.remote.socket(family) as returning:
        application.settimeout(0.2)
        returning.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        returning.bind(("", again))
        with pytest.raises(OSError):  # noqa: PT011 - refused or unanswered
            returning.connect((world.pod.address(family), 81))
        with pytest.raises(TimeoutError):
            application.accept()


def older_here() -> list[Connection]:
    return precapture.confirmed(CONFIG)
