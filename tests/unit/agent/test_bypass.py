"""Which connections and workloads go past the mesh, decided from what was read."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest

from agent.bypass import of_pods, of_workload, records
from agent.status import PodView
from redirect.base import CaptureConfig
from redirect.precapture import past_the_proxy
from redirect.sockets import Connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MARK = 0x539


def one(local: str, remote: str, mark: int = 0) -> Connection:
    ends = [(ip_address(host), int(port)) for host, port in (local.split(), remote.split())]
    return Connection(ends[0], ends[1], mark)


@pytest.mark.parametrize(
    ("found", "past"),
    [
        # Outbound: the data plane accepted it at 15001.
        ([one("10.0.0.2 4000", "10.0.0.9 80"),
          one("127.0.0.1 15001", "10.0.0.2 4000", MARK)], 0),
        # Inbound: its other end is the data plane's, by the client's address.
        ([one("10.0.0.2 80", "10.0.0.9 4000"),
          one("10.0.0.9 4000", "10.0.0.2 80", 0x1539)], 0),
        # The pod with itself, and a probe.
        ([one("10.0.0.2 4000", "10.0.0.2 80"), one("10.0.0.2 80", "10.0.0.2 4000")], 0),
        ([one("10.0.0.2 80", "169.254.7.127 4000")], 0),
        # Somebody else's port 15001 in the pod proves nothing.
        ([one("10.0.0.2 4000", "10.0.0.9 80"), one("127.0.0.1 15001", "10.0.0.2 4000", 1)], 1),
        ([one("10.0.0.2 80", "10.0.0.9 4000")], 1),
    ],
)  # fmt: skip
def test_a_connection_without_an_end_of_the_data_plane_is_past_it(
    found: list[Connection], past: int
) -> None:
    shown = [c for c in past_the_proxy(found, CaptureConfig()) if not c.remote[0].is_loopback]
    assert len([c for c in shown if c.local[1] != 15001]) == past


def test_pods_are_named_until_their_capture_is_proved() -> None:
    def view(state: str, *, captured: bool, verified: bool, problem: str = "") -> PodView:
        return PodView("u", "a", "shop", "sa", "/x", state, captured, verified, problem=problem)

    proved = view("captured", captured=True, verified=True)
    waiting = view("waiting for control plane", captured=False, verified=False)
    failed = view("failed", captured=True, verified=False, problem="rule gone")
    found = list(of_pods([proved, waiting, failed]))
    assert [entry.why for entry in found] == ["waiting for control plane", "rule gone"]
    assert all(entry.pod == "shop/a" and entry.remedy for entry in found)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "unlisted"),
        ({"uid": "known"}, None),
        ({"node": "other"}, None),
        ({"protocol": "TCP"}, None),
        ({"protocol": "TCP", "networkMode": "HostNetwork"}, "host network"),
    ],
)
def test_workloads_of_this_node_need_a_pod(changes: dict[str, Any], kind: str | None) -> None:
    workload = {"uid": "w", "node": "n", "name": "a", "namespace": "shop", "protocol": "HBONE"}
    found = of_workload(workload | changes, "n", {"known"})
    assert (found.kind if found else None) == kind


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
async def test_records_are_read_wherever_chunks_are_split(size: int) -> None:
    text = '[{"a":"ü, ["},{"b":{"c":[1,2]}},{}]'.encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(text), size):
            yield text[start : start + size]

    found = [record async for record in records(chunks())]
    assert found == [{"a": "ü, ["}, {"b": {"c": [1, 2]}}, {}]
