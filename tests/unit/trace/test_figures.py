"""Percentiles, our own reasons, and which pods are traced."""

from __future__ import annotations

import os
from typing import Any

import pytest

from agent.trace.latency import Latencies
from agent.trace.pods import traced
from agent.trace.reasons import Reason, growth, refusing


def test_percentiles_are_off_by_a_fifth_at_most() -> None:
    kind = Latencies()
    for value in range(1, 10_001):
        kind.add(value)
    for part in (0.5, 0.9, 0.99):
        truth = part * 10_000
        assert truth <= kind.percentile(part) <= truth * 1.2
    assert (kind.percentile(1), kind.longest_us) == (10_000, 10_000)
    assert sum(count for _, _, count in kind.histogram()) == 10_000


def test_a_histogram_shows_gaps_and_nothing_of_nothing() -> None:
    kind = Latencies()
    assert (kind.histogram(), kind.percentile(0.5)) == ([], 0)
    kind.add(0)
    kind.add(9)
    assert kind.histogram() == [(0, 1, 1), (2, 3, 0), (4, 7, 0), (8, 15, 1)]


def rule(name: str, packets: int, verdict: str) -> dict[str, Any]:
    counter = {"counter": {"packets": packets, "bytes": 60 * packets}}
    return {"rule": {"chain": "refuse", "comment": name, "expr": [counter, {verdict: None}]}}


def test_only_rules_that_end_a_packets_way_are_reasons() -> None:
    table: list[dict[str, Any]] = [
        {"table": {"name": "underpass"}},
        rule("uncaptured", 3, "reject"),
        rule("loopback-leak-v4", 1, "drop"),
        rule("outbound-v4", 9, "redirect"),
    ]
    found = [(one.name, one.count) for one in refusing(table)]
    assert found == [("uncaptured", 3), ("loopback-leak-v4", 1)]


def test_growth_tells_what_was_met_since_also_after_counters_began_anew() -> None:
    before = [Reason(None, "same", 4), Reason(None, "more", 4), Reason(7, "anew", 4)]
    after = [
        *(Reason(None, "same", 4), Reason(None, "more", 6), Reason(7, "anew", 2)),
        *(Reason(8, "new", 1), Reason(9, "none", 0)),
    ]
    found = {one.name: one.count for one in growth(before, after)}
    assert found == {"more": 2, "anew": 2, "new": 1}


OWN = os.stat("/proc/self/ns/net").st_ino
ROWS = [
    {"uid": "a", "namespace": "shop", "name": "web", "netns": "/proc/self/ns/net"},
    {"uid": "b", "namespace": "other", "name": "web", "netns": "net:[4026539999]"},
    {"uid": "c", "namespace": "shop", "name": "gone", "netns": "/run/netns/is-not-there"},
]


@pytest.mark.parametrize(
    ("uid", "namespace", "keys"),
    [
        (None, None, {"shop/web", "other/web"}),
        ("b", None, {"other/web"}),
        (None, "shop", {"shop/web"}),
        ("c", None, set()),
    ],
)
def test_pods_are_known_by_their_namespaces(
    uid: str | None, namespace: str | None, keys: set[str]
) -> None:
    found = traced(ROWS, os.getpid(), uid, namespace)
    assert {pod.key for pod in found.values()} == keys
    assert all(pod.inode == inode for inode, pod in found.items())


def test_a_namespace_is_opened_by_a_process_that_lives_in_it() -> None:
    told = f"net:[{OWN}]"
    (pod,) = traced([ROWS[0] | {"netns": told}], None).values()
    fd = pod.open()
    assert fd is not None
    try:
        assert os.fstat(fd).st_ino == OWN
    finally:
        os.close(fd)


def test_a_namespace_that_was_replaced_is_not_opened() -> None:
    (pod,) = traced(ROWS[:1], os.getpid()).values()
    assert type(pod)(pod.uid, pod.key, pod.inode + 1, pod.place).open() is None
