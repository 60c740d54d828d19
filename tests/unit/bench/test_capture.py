"""What bench.capture makes of its samples."""

from pathlib import Path

import pytest

from agent.cli.demo.mesh import Mesh
from agent.cli.demo.world import World
from bench import enrol
from bench.prober import Probe
from bench.relay import _result, _Way


def test_a_way_is_told_by_its_round_in_the_middle_and_by_all_its_probes() -> None:
    (node,) = World("none", nodes=1).nodes
    (client, server) = enrol.many(node, 2)
    way = _Way("ebpf", Mesh(World("none"), Path(), Path()), client, server)
    way.samples = [(300.0, 0.003, 0.03), (100.0, 0.001, 0.01), (200.0, 0.002, 0.02)]
    way.probes = [Probe(float(at), at, "") for at in range(100)] + [Probe(1.0, 500.0, "reset")]
    told = _result(way, 400.0)
    assert (told.rate, told.ratio) == (200.0, 0.5)
    assert told.proxies == pytest.approx(2000)
    assert told.machine == pytest.approx(20_000)
    assert (told.median, told.p99, told.failures) == (50, 99, 1)


def test_a_thousand_pods_have_names_addresses_and_links_of_their_own() -> None:
    (node,) = World("none", nodes=1).nodes
    pods = list(enrol.many(node, 1000))
    for one in ("namespace", "ipv4", "ipv6", "link"):
        assert len({getattr(pod.sandbox, one) for pod in pods}) == 1000
    # Interface names hold fifteen characters.
    assert max(len(pod.sandbox.link) for pod in pods) <= 15
    assert len({pod.service_account for pod in pods}) == enrol.ACCOUNTS
