"""What is made of sockets' states: who opened, who was captured, what is told once."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from typing import Any

import pytest

from agent.trace import connections
from agent.trace.connections import HOLD_NS, Connections, Seen
from redirect.base import Ports
from redirect.sockets import Connection

POD, OWN = 4026532000, 77
APP, SERVICE, CLIENT = "10.1.0.2", "10.96.0.1", "10.2.0.9"
MS = 1_000_000


class Kernel:
    """Makes records as the tracing child tells them."""

    def __init__(self) -> None:
        self.state = Connections(lambda cgroup: cgroup == OWN, Ports())
        self.time = 0

    def step(
        self,
        sk: int,
        before: int,
        after: int,
        local: tuple[str, int],
        remote: tuple[str, int],
        **more: Any,
    ) -> list[Seen]:
        self.time += MS
        v4 = ip_address(local[0]).version == 4
        record = {
            "time": self.time,
            "sk": sk,
            "cgroup": 1,
            "sent": 0,
            "received": 0,
            "netns": POD,
            "pid": 0,
            "comm": "",
            "dialled": "",
            "srtt": 90,
            "family": 2 if v4 else 10,
            "before": before,
            "after": after,
            "sport": local[1],
            "dport": remote[1],
            "saddr": ip_address(local[0]).packed.ljust(16, b"\0").hex(),
            "daddr": ip_address(remote[0]).packed.ljust(16, b"\0").hex(),
        }
        return list(self.state.feed(record | more))

    def dial(self, sk: int, local: tuple[str, int], remote: tuple[str, int], **more: Any) -> None:
        # The port isn't chosen yet.
        assert not self.step(sk, 7, 2, (local[0], 0), remote, comm="curl", pid=4711, **more)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def test_a_captured_connection_is_told_once_its_capture_is_known(kernel: Kernel) -> None:
    local, remote = (APP, 41000), (SERVICE, 80)
    kernel.dial(1, local, remote)
    assert not kernel.step(1, 2, 1, local, remote)
    own, app = kernel.step(2, 3, 1, ("127.0.0.1", 15001), local, cgroup=OWN)
    assert (own.own, app.own) == (True, False)
    assert (app.event, app.via, app.outbound) == ("opened", 15001, True)
    assert (app.process, app.pid, app.connect_ns) == ("curl", 4711, MS)
    (closed,) = kernel.step(1, 1, 7, local, remote, sent=10, received=20)
    assert (closed.event, closed.via, closed.duration_ns) == ("closed", 15001, 3 * MS)
    assert (closed.sent, closed.received, closed.process) == (10, 20, "curl")


def test_one_that_nobody_caught_is_told_after_a_moment(kernel: Kernel) -> None:
    local, remote = (APP, 41000), ("127.0.0.1", 9)
    kernel.dial(1, local, remote)
    kernel.step(1, 2, 1, local, remote)
    assert not list(kernel.state.due(kernel.time + HOLD_NS - 1))
    (seen,) = kernel.state.due(kernel.time + HOLD_NS)
    assert (seen.event, seen.via) == ("opened", None)
    assert not list(kernel.state.due(kernel.time + HOLD_NS))


def test_a_short_one_is_told_as_opened_before_it_is_as_closed(kernel: Kernel) -> None:
    local, remote = (APP, 41000), (SERVICE, 80)
    kernel.dial(1, local, remote)
    kernel.step(1, 2, 1, local, remote)
    events = [seen.event for seen in kernel.step(1, 1, 7, local, remote)]
    assert events == ["opened", "closed"]
    assert not list(kernel.state.due(kernel.time + HOLD_NS))


def test_a_refused_one_failed(kernel: Kernel) -> None:
    kernel.dial(1, (APP, 41000), (SERVICE, 80))
    (seen,) = kernel.step(1, 2, 7, (APP, 41000), (SERVICE, 80))
    assert (seen.event, seen.outbound, seen.duration_ns) == ("failed", True, MS)


@pytest.mark.parametrize(("plaintext", "port"), [(True, 15006), (False, 15008)])
def test_a_served_one_is_told_by_the_port_it_came_through(
    kernel: Kernel, plaintext: bool, port: int
) -> None:
    if plaintext:
        kernel.step(1, 3, 1, (APP, 15006), (CLIENT, 50000), cgroup=OWN)
    delivery, served = (CLIENT, 33000), (APP, 8080)
    kernel.dial(2, delivery, served, cgroup=OWN)
    (leg,) = kernel.step(2, 2, 1, delivery, served, cgroup=OWN)
    (seen,) = kernel.step(3, 3, 1, served, delivery)
    assert (leg.own, seen.own) == (True, False)
    assert (seen.outbound, seen.via, seen.connect_ns, seen.rtt_us) == (False, port, None, 90)


def test_a_plaintext_arrival_explains_one_delivery_only(kernel: Kernel) -> None:
    kernel.step(1, 3, 1, (APP, 15006), (CLIENT, 50000), cgroup=OWN)
    ports = []
    for number in (33000, 33001):
        kernel.step(number, 2, 1, (CLIENT, number), (APP, 8080), cgroup=OWN)
        ports += [s.via for s in kernel.step(-number, 3, 1, (APP, 8080), (CLIENT, number))]
    assert ports == [15006, 15008]


def test_a_refused_arrival_explains_none(kernel: Kernel) -> None:
    arrival = (APP, 15006), (CLIENT, 50000)
    kernel.step(1, 3, 1, *arrival, cgroup=OWN)
    kernel.step(1, 1, 7, *arrival, cgroup=OWN)
    kernel.step(2, 2, 1, (CLIENT, 33000), (APP, 8080), cgroup=OWN)
    (seen,) = kernel.step(3, 3, 1, (APP, 8080), (CLIENT, 33000))
    assert seen.via == 15008


def test_what_an_app_serves_past_the_data_plane_is_not_captured(kernel: Kernel) -> None:
    (seen,) = kernel.step(1, 3, 1, (APP, 8080), (CLIENT, 50000))
    assert seen.via is None


def test_a_listener_handed_over_by_a_former_data_plane_is_still_its_own(kernel: Kernel) -> None:
    """What it accepts keeps the number of a cgroup that is gone."""
    local, remote = (APP, 41000), (SERVICE, 80)
    kernel.dial(1, local, remote)
    kernel.step(1, 2, 1, local, remote)
    own, app = kernel.step(2, 3, 1, ("127.0.0.1", 15001), local, cgroup=5)
    assert (own.own, app.via) == (True, 15001)


def test_after_a_loss_nothing_is_called_uncaptured(kernel: Kernel) -> None:
    kernel.dial(1, (APP, 41000), (SERVICE, 80))
    kernel.step(1, 2, 1, (APP, 41000), (SERVICE, 80))
    kernel.state.lost()
    (seen,) = kernel.state.due(kernel.time + HOLD_NS)
    assert (seen.via, seen.sure) == (None, False)
    (served,) = kernel.step(2, 3, 1, (APP, 8080), (CLIENT, 1))
    assert not served.sure


def test_the_end_of_what_was_never_told_as_open_is_not_told(kernel: Kernel) -> None:
    assert not kernel.step(1, 9, 7, (APP, 41000), (SERVICE, 80))


def test_ipv4_clients_of_ipv6_listeners_are_ipv4(kernel: Kernel) -> None:
    (seen,) = kernel.step(1, 3, 1, (f"::ffff:{APP}", 8080), (f"::ffff:{CLIENT}", 1))
    assert [str(end[0]) for end in (seen.local, seen.remote)] == [APP, CLIENT]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (struct.pack("=H", 2) + b"\0\x50" + bytes([10, 96, 0, 1]), (ip_address(SERVICE), 80)),
        (
            struct.pack("=H", 10) + b"\0\x50" + bytes(4) + ip_address("fd00::1").packed,
            (ip_address("fd00::1"), 80),
        ),
        (b"", None),
    ],
)
def test_ebpf_leads_a_socket_elsewhere_and_what_was_asked_is_told(
    kernel: Kernel, asked: bytes, told: object
) -> None:
    local, target = ("127.0.0.1", 41000), ("127.9.9.9", 15001)
    kernel.dial(1, local, target, dialled=asked.ljust(28, b"\0").hex())
    (seen,) = kernel.step(1, 2, 1, local, target)
    assert (seen.via, seen.dialled) == (15001, told)
    (closed,) = kernel.step(1, 1, 7, local, target)
    assert closed.dialled == told


def test_ebpf_leaves_the_address_asked_for_in_a_plaintext_arrival(kernel: Kernel) -> None:
    (arrival,) = kernel.step(1, 3, 1, (APP, 8080), (CLIENT, 50000), cgroup=OWN)
    assert arrival.own
    kernel.step(2, 2, 1, (CLIENT, 33000), (APP, 8080), cgroup=OWN)
    (seen,) = kernel.step(3, 3, 1, (APP, 8080), (CLIENT, 33000))
    assert seen.via == 15006


def already(local: tuple[str, int], remote: tuple[str, int], cgroup: int = 1) -> Connection:
    ends = [(ip_address(host), port) for host, port in (local, remote)]
    return Connection(ends[0], ends[1], cgroup=cgroup, sent=5, received=6)


def test_what_was_open_before_is_judged_alike_and_told_once(kernel: Kernel) -> None:
    there = [
        already((APP, 41000), (SERVICE, 80)),
        already((APP, 8080), (CLIENT, 33000)),
        already((APP, 41001), ("169.254.7.127", 9)),
        already(("127.0.0.1", 15001), (APP, 41000), OWN),
        already((CLIENT, 33000), (APP, 8080), OWN),
    ]
    listening = {8080, 15001, 15006, 15008}
    told = list(kernel.state.already_open(POD, there, listening, 0))
    found = {seen.local[1]: (seen.outbound, seen.via) for seen in told if not seen.own}
    assert found == {41000: (True, 15001), 8080: (False, 15008), 41001: (True, None)}
    assert not list(kernel.state.already_open(POD, there, listening, 0))
    (closed,) = kernel.step(9, 1, 7, (APP, 41000), (SERVICE, 80), sent=50)
    assert (closed.via, closed.duration_ns, closed.sent) == (15001, None, 50)


def test_what_is_remembered_is_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "KEPT", 10)
    for port in range(1000, 1100):
        kernel.dial(port, (APP, port), (SERVICE, 80))
        kernel.step(port, 2, 1, (APP, port), (SERVICE, 80))
        kernel.step(-port, 3, 1, ("127.0.0.1", 15001), (APP, port), cgroup=OWN)
        kernel.dial(port * 2, (APP, port), (SERVICE, 81))
        kernel.step(port * 3, 3, 1, (APP, 15006), (f"10.3.0.{port - 1000}", 1), cgroup=OWN)
    tables = ("_dialling", "_live", "_held", "_caught", "_plaintext")
    assert all(len(getattr(kernel.state, name)) <= 10 for name in tables)
