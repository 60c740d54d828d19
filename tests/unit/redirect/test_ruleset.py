"""Rules as text, compared with files in tests/golden.

UNDERPASS_WRITE_GOLDEN=1 rewrites the files; the change is then read in review.
"""

from __future__ import annotations

import os
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from redirect import CaptureConfig, NotRetryable, Ports, Target
from redirect.cgroups import CgroupMatch
from redirect.ruleset import delete, render, render_draining

GOLDEN = Path(__file__).parents[2] / "golden" / "rulesets"
LEAF = CgroupMatch(3, "unified/underpass/node-a/data-plane-1")
SUCCESSOR = CgroupMatch(3, "unified/underpass/node-a/data-plane-2")
POD = Target(uid="u1", name="shop/cart", netns_fd=-1)

VARIANTS = {
    "default_cgroup": (CaptureConfig(), POD, (LEAF,)),
    "mark_alone": (CaptureConfig(), POD, ()),
    "v4_only": (CaptureConfig(ipv6=False), POD, (LEAF,)),
    "overlap_two_cgroups": (CaptureConfig(), POD, (LEAF, SUCCESSOR)),
    "bypass_inbound": (
        CaptureConfig(),
        Target(uid="u1", name="shop/cart", netns_fd=-1, bypass_inbound=True),
        (LEAF,),
    ),
    "udp_deny": (
        CaptureConfig(),
        Target(uid="u1", name="shop/cart", netns_fd=-1, udp_deny=True),
        (LEAF,),
    ),
    "virtual_interfaces": (
        CaptureConfig(),
        Target(uid="u1", name="shop/vm", netns_fd=-1, virtual_interfaces=("tap0", "k6t-eth0")),
        (LEAF,),
    ),
    "dns_on": (
        CaptureConfig(ports=Ports(dns=15053)),
        Target(uid="u1", name="shop/cart", netns_fd=-1, dns=True),
        (LEAF,),
    ),
    "other_ports_no_probes": (
        CaptureConfig(
            ports=Ports(outbound=25001, inbound_plaintext=25006, inbound_hbone=25008),
            mark=0x53A,
            probe_addresses=(),
        ),
        POD,
        (LEAF,),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_rules_are_as_reviewed(name: str) -> None:
    text = render(*VARIANTS[name])
    file = GOLDEN / f"{name}.nft"
    if os.environ.get("UNDERPASS_WRITE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", ["default_cgroup", "dns_on"])
def test_rules_of_a_draining_pod_are_as_reviewed(name: str) -> None:
    config, target, _ = VARIANTS[name]
    text = render_draining(config, target)
    file = GOLDEN / f"draining_{name}.nft"
    if os.environ.get("UNDERPASS_WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_draining_pod_has_no_rule_that_redirects_or_refuses(name: str) -> None:
    config, target, _ = VARIANTS[name]
    text = render_draining(config, target)
    assert "redirect" not in text
    assert "reject" not in text
    # Translation goes on for connections that are open.
    assert text.count("type nat hook") == 2


def test_every_rule_counts_and_has_a_name_of_its_own() -> None:
    for config, target, exempt in VARIANTS.values():
        for chain in render(config, target, exempt).split("\tchain ")[1:]:
            rules = [line for line in chain.splitlines()[1:] if line.startswith("\t\t")]
            rules = [rule for rule in rules if not rule.startswith("\t\ttype ")]
            assert all("counter " in rule for rule in rules)
            names = [rule.partition(' comment "')[2] for rule in rules]
            assert all(names)
            assert len(set(names)) == len(names)


def test_a_pod_that_wants_dns_gets_none_while_nothing_listens() -> None:
    wanting = Target(uid="u1", name="shop/cart", netns_fd=-1, dns=True)
    assert render(CaptureConfig(), wanting, ()) == render(CaptureConfig(), POD, ())


def test_a_listener_for_dns_captures_none_of_a_pod_that_does_not_want_it() -> None:
    assert "15053" not in render(CaptureConfig(ports=Ports(dns=15053)), POD, ())


def test_probe_addresses_can_be_left_out_or_be_others() -> None:
    assert "169.254" not in render(CaptureConfig(probe_addresses=()), POD, ())
    other = CaptureConfig(probe_addresses=(IPv4Address("192.0.2.1"),))
    assert "saddr 192.0.2.1" in render(other, POD, ())


def test_a_replacement_begins_by_deleting_the_table() -> None:
    assert render(CaptureConfig(), POD, ()).startswith(delete())


@pytest.mark.parametrize("name", ["lo", "", "a b", 'x"', "tap*", "a/b", "sixteen-letters-", "x\n"])
def test_an_interface_name_that_could_change_a_rule_is_refused(name: str) -> None:
    target = Target(uid="u1", name="shop/vm", netns_fd=-1, virtual_interfaces=(name,))
    with pytest.raises(NotRetryable, match="shop/vm"):
        render(CaptureConfig(), target, ())
