"""Counts of a pod's datagrams over counters that start anew."""

from agent.pods.tally import Tally
from redirect.base import Datagrams


def test_what_rules_made_anew_had_counted_stays_counted() -> None:
    tally = Tally()
    tally.begin()
    assert tally.read(Datagrams(3, 1)) == Datagrams(3, 1)
    assert tally.read(Datagrams(5, 1)) == Datagrams(2, 0)
    # The rules were written anew.
    assert tally.read(Datagrams(1, 0)) == Datagrams(1, 0)
    assert tally.total == Datagrams(6, 1)


def test_what_an_agent_before_this_one_saw_is_the_pods_but_not_this_agents() -> None:
    tally = Tally()
    assert tally.read(Datagrams(7, 2)) == Datagrams()
    assert tally.read(Datagrams(8, 2)) == Datagrams(1, 0)
    assert tally.total == Datagrams(8, 2)
