"""What a process in a captured pod, and a peer of it, notice."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from redirect import CaptureConfig, NftablesCapture, Ports
from tests.netns.redirect_pods import (
    IP_TRANSPARENT,
    IPV6_TRANSPARENT,
    Host,
    World,
    cgroup_leaf,
    inside,
    mark,
    original_dst,
    target,
    world,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FAMILIES = [pytest.param(socket.AF_INET, id="v4"), pytest.param(socket.AF_INET6, id="v6")]
OUTBOUND, INBOUND, HBONE = 15001, 15006, 15008


@pytest.fixture
def place() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.fixture
def leaf() -> Iterator[Path]:
    with cgroup_leaf() as made:
        yield made


async def capture(pod: Host, config: CaptureConfig | None = None, **options: object) -> None:
    redirect = NftablesCapture(config)
    with target(pod, **options) as pod_target:
        await redirect.install(pod_target)
    await redirect.close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_outbound_arrives_at_15001_with_its_original_destination(
    place: World, family: int
) -> None:
    await capture(place.pod)
    with (
        place.pod.listen(family, OUTBOUND) as proxy,
        place.remote.listen(family, 8080) as server,
        place.pod.socket(family) as client,
    ):
        client.connect((place.remote.address(family), 8080))
        accepted, _ = proxy.accept()
        assert original_dst(accepted) == (place.remote.address(family), 8080)
        accepted.sendall(b"captured")
        assert client.recv(100) == b"captured"
        assert client.getpeername()[:2] == (place.remote.address(family), 8080)
        accepted.close()
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


async def test_a_dual_stack_listener_learns_the_ipv4_destination(place: World) -> None:
    await capture(place.pod)
    with place.pod.socket(socket.AF_INET6) as proxy, place.pod.socket(socket.AF_INET) as client:
        proxy.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        proxy.bind(("::", OUTBOUND))
        proxy.listen()
        client.connect((place.remote.v4, 8080))
        accepted, _ = proxy.accept()
        raw = accepted.getsockopt(socket.SOL_IP, 80, 16)
        assert socket.inet_ntoa(raw[4:8]) == place.remote.v4
        accepted.close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_outbound_is_refused_while_nothing_listens(place: World, family: int) -> None:
    await capture(place.pod)
    with (
        place.remote.listen(family, 8080),
        place.pod.socket(family) as client,
        pytest.raises(ConnectionRefusedError),
    ):
        client.connect((place.remote.address(family), 8080))


@pytest.mark.parametrize("family", FAMILIES)
async def test_inbound_arrives_at_15006_with_its_original_destination(
    place: World, family: int
) -> None:
    await capture(place.pod)
    with (
        place.pod.listen(family, INBOUND) as proxy,
        place.pod.listen(family, 8080),
        place.remote.socket(family) as client,
    ):
        client.connect((place.pod.address(family), 8080))
        accepted, peer = proxy.accept()
        assert original_dst(accepted) == (place.pod.address(family), 8080)
        assert peer[0] == place.remote.address(family)
        accepted.close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_hbone_arrives_at_15008_itself(place: World, family: int) -> None:
    await capture(place.pod)
    with (
        place.pod.listen(family, INBOUND),
        place.pod.listen(family, HBONE) as hbone,
        place.remote.socket(family) as client,
    ):
        client.connect((place.pod.address(family), HBONE))
        hbone.accept()[0].close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_bypass_leaves_inbound_alone_and_still_captures_outbound(
    place: World, family: int
) -> None:
    await capture(place.pod, bypass_inbound=True)
    with (
        place.pod.listen(family, 8080) as app,
        place.pod.listen(family, OUTBOUND) as proxy,
        place.remote.socket(family) as peer,
        place.pod.socket(family) as client,
    ):
        peer.connect((place.pod.address(family), 8080))
        app.accept()[0].close()
        client.connect((place.remote.address(family), 8080))
        proxy.accept()[0].close()


@pytest.mark.parametrize(
    ("family", "own_address"),
    [
        (socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET, "127.0.0.9"),
        (socket.AF_INET6, "::1"),
        (socket.AF_INET, ""),
        (socket.AF_INET6, ""),
    ],
)
async def test_a_pod_calling_itself_is_not_captured(
    place: World, family: int, own_address: str
) -> None:
    await capture(place.pod)
    with place.pod.listen(family, 8080) as app, place.pod.socket(family) as client:
        client.connect((own_address or place.pod.address(family), 8080))
        app.accept()[0].close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_data_plane_passes_by_cgroup_and_mark(
    place: World, leaf: Path, family: int
) -> None:
    await capture(place.pod, CaptureConfig(exempt_cgroups=(leaf,)))
    with place.remote.listen(family, 8080) as server:
        with inside(leaf):
            client = place.pod.socket(family)
        mark(client)
        client.connect((place.remote.address(family), 8080))
        server.accept()[0].close()
        client.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("forged", [0x539, 0x111], ids=["data-plane-mark", "reply-mark"])
@pytest.mark.parametrize("bound", [False, True], ids=["routed", "bound-to-device"])
async def test_a_forged_mark_outside_the_cgroup_does_not_reach_the_network(
    place: World, leaf: Path, family: int, forged: int, bound: bool
) -> None:
    await capture(place.pod, CaptureConfig(exempt_cgroups=(leaf,)))
    with place.remote.listen(family, 8080) as server, place.pod.socket(family) as attacker:
        mark(attacker, forged)
        attacker.bind((place.pod.address(family), 0))
        if bound:
            attacker.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        attacker.settimeout(0.5)
        with pytest.raises((ConnectionRefusedError, TimeoutError)):
            attacker.connect((place.remote.address(family), 8080))
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_cgroup_without_the_mark_is_captured(
    place: World, leaf: Path, family: int
) -> None:
    await capture(place.pod, CaptureConfig(exempt_cgroups=(leaf,)))
    with place.remote.listen(family, 8080), place.pod.listen(family, OUTBOUND) as proxy:
        with inside(leaf):
            client = place.pod.socket(family)
        client.connect((place.remote.address(family), 8080))
        proxy.accept()[0].close()
        client.close()


async def test_without_a_configured_cgroup_the_mark_alone_passes(place: World) -> None:
    await capture(place.pod)
    with (
        place.remote.listen(socket.AF_INET, 8080) as server,
        place.pod.socket(socket.AF_INET) as client,
    ):
        mark(client)
        client.connect((place.remote.v4, 8080))
        server.accept()[0].close()


async def test_during_an_overlap_both_data_planes_pass(place: World, leaf: Path) -> None:
    with cgroup_leaf() as successor:
        await capture(place.pod, CaptureConfig(exempt_cgroups=(leaf, successor)))
        with place.remote.listen(socket.AF_INET, 8080) as server:
            for instance in (leaf, successor):
                with inside(instance):
                    client = place.pod.socket(socket.AF_INET)
                mark(client)
                client.connect((place.remote.v4, 8080))
                server.accept()[0].close()
                client.close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_no_packet_to_loopback_leaves_by_a_socket_bound_to_a_device(
    place: World, family: int
) -> None:
    """Such a socket keeps its device although its packet was redirected to loopback."""
    await capture(place.pod)
    place.remote.run(
        "nft",
        "add table inet wire;"
        " add chain inet wire in { type filter hook prerouting priority -300; };"
        " add rule inet wire in ip daddr 127.0.0.0/8 counter;"
        " add rule inet wire in ip6 daddr ::1 counter;"
        " add rule inet wire in meta l4proto tcp counter",
    )
    with place.pod.listen(family, OUTBOUND), place.pod.socket(family) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.connect((place.remote.address(family), 8080))
    arrived = place.remote.run("nft", "list", "table", "inet", "wire")
    assert arrived.count("packets 0 ") == 3, arrived


async def test_a_syn_that_first_went_over_lo_does_not_leave_when_sent_again(
    place: World, leaf: Path
) -> None:
    """The mark of replies routes the first SYN to lo, where it gets no NAT mapping and no answer.
    The mark is then taken off, and the retransmission would go to the network."""
    await capture(place.pod, CaptureConfig(exempt_cgroups=(leaf,)))
    place.pod.run("nft", "add table inet silence; add chain inet silence i"
                  " { type filter hook input priority 0; }; add rule inet silence i"
                  " tcp dport 8080 tcp flags syn drop")  # fmt: skip
    with (
        place.remote.listen(socket.AF_INET, 8080) as server,
        place.pod.socket(socket.AF_INET) as attacker,
    ):
        mark(attacker, 0x111)
        attacker.bind((place.pod.v4, 0))
        attacker.setblocking(False)
        with pytest.raises(BlockingIOError):
            attacker.connect((place.remote.v4, 8080))
        mark(attacker, 0)
        server.settimeout(3)  # the first retransmission comes after one second
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("rp_filter", ["0", "1"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_the_app_answers_a_spoofed_client_through_the_data_plane(
    place: World, leaf: Path, family: int, rp_filter: str
) -> None:
    await capture(place.pod, CaptureConfig(exempt_cgroups=(leaf,)))
    for interface in ("all", "lo", "eth0"):
        place.pod.run("sysctl", "-qw", f"net.ipv4.conf.{interface}.rp_filter={rp_filter}")
    client_address = "10.66.6.6" if family == socket.AF_INET else "fd66::6"
    with place.pod.listen(family, 8080) as app:
        with inside(leaf):
            upstream = place.pod.socket(family)
        mark(upstream)
        if family == socket.AF_INET:
            upstream.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        else:
            upstream.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        upstream.bind((client_address, 0))
        upstream.connect((place.pod.address(family), 8080))
        accepted, peer = app.accept()
        assert peer[0] == client_address
        upstream.sendall(b"question")
        assert accepted.recv(100) == b"question"
        accepted.sendall(b"answer" * 20_000)
        accepted.close()
        received = 0
        while chunk := upstream.recv(65536):
            received += len(chunk)
        assert received == len(b"answer") * 20_000
        upstream.close()


async def test_with_ipv6_off_tcp_over_ipv6_is_refused_both_ways(place: World) -> None:
    await capture(place.pod, CaptureConfig(ipv6=False))
    v6 = socket.AF_INET6
    with (
        place.remote.listen(v6, 8080),
        place.pod.listen(v6, 8080),
        place.pod.socket(v6) as leaving,
        place.remote.socket(v6) as coming,
        place.pod.socket(v6) as local,
    ):
        with pytest.raises(ConnectionRefusedError):
            leaving.connect((place.remote.v6, 8080))
        with pytest.raises(ConnectionRefusedError):
            coming.connect((place.pod.v6, 8080))
        local.connect(("::1", 8080))


async def test_forwarded_tcp_of_a_virtual_interface_arrives_at_15001(place: World) -> None:
    """The remote host stands in for a virtual machine behind the interface."""
    await capture(place.pod, virtual_interfaces=("eth0",))
    place.remote.run("ip", "route", "add", "198.51.100.0/24", "via", place.pod.v4)
    with (
        place.pod.listen(socket.AF_INET, OUTBOUND) as proxy,
        place.remote.socket(socket.AF_INET) as guest,
    ):
        guest.connect(("198.51.100.7", 80))
        accepted, _ = proxy.accept()
        assert original_dst(accepted) == ("198.51.100.7", 80)
        accepted.close()


async def test_dns_is_captured_only_where_asked_for(place: World) -> None:
    await capture(place.pod, CaptureConfig(ports=Ports(dns=15053)), dns=True)
    with (
        place.pod.listen(socket.AF_INET, 15053) as resolver,
        place.pod.socket(socket.AF_INET) as client,
    ):
        client.connect((place.remote.v4, 53))
        accepted, _ = resolver.accept()
        assert original_dst(accepted) == (place.remote.v4, 53)
        accepted.close()


async def test_probes_from_upstreams_address_reach_the_app(place: World) -> None:
    await capture(place.pod)
    place.remote.run("ip", "addr", "add", "169.254.7.127/32", "dev", "lo")
    with (
        place.pod.listen(socket.AF_INET, 8080) as app,
        place.remote.socket(socket.AF_INET) as kubelet,
    ):
        kubelet.bind(("169.254.7.127", 0))
        kubelet.connect((place.pod.v4, 8080))
        app.accept()[0].close()
