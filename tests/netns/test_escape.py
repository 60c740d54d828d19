"""What a process in a captured pod can do to get past the mesh, with the rights that pods have by
default (NET_RAW among them) and with NET_ADMIN.

Each attempt ends as the table says: `carried` by the mesh all the same, `refused`, or `past` it,
seen in clear on the wire between the nodes.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo.manifests import Pod
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE
from agent.cli.demo.story import greets
from agent.cli.demo.world import cgroup2_mounts
from tests.support.intruder import NET_ADMIN, NET_RAW, run
from tests.support.leaks import Leaks
from tests.support.policies import applied, becomes, policy, source
from tests.support.proof import new_marker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop
    from tests.support.intruder import Heard
    from tests.support.leaks import Seen

pytestmark = pytest.mark.asyncio(loop_scope="module")

CARRIED, REFUSED, PAST = "carried", "refused", "past"
HELD = (CARRIED, REFUSED)


@dataclass(frozen=True)
class Attempt:
    """How a case of tests/attacks/escape.py ends in each mode."""

    case: str
    rights: str
    nftables: Sequence[str]
    ebpf: Sequence[str]
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.case}-{self.rights}"


ATTEMPTS = [
    # By default pods may not change their network.
    Attempt("flush", "raw", [CARRIED], [CARRIED]),
    Attempt("untrack", "raw", [CARRIED], [CARRIED]),
    Attempt("translate", "raw", [REFUSED], [REFUSED]),
    Attempt("route_local", "raw", [CARRIED], [CARRIED]),
    Attempt("route_by_mark", "raw", [CARRIED], [CARRIED]),
    Attempt("rename_link", "raw", [CARRIED], [CARRIED]),
    Attempt("move_link", "raw", [CARRIED], [CARRIED], argument="node's pid"),
    Attempt("user_namespace", "raw", [CARRIED], [CARRIED]),
    Attempt("enter_namespace", "raw", [CARRIED], [CARRIED], argument="node's namespace"),
    # A raw socket's packets pass the output hook, where rules catch them, and the cgroup's. A
    # packet socket's pass neither. Open in both modes, as is UDP other than DNS.
    Attempt("raw_socket", "raw", [REFUSED], [REFUSED]),
    Attempt("raw_icmp_socket", "raw", [REFUSED], [REFUSED]),
    Attempt("raw_fragment", "raw", [REFUSED], [REFUSED]),
    Attempt("raw_v6", "raw", [REFUSED], [REFUSED], argument="db by IPv6"),
    Attempt("raw_v6_extensions", "raw", [REFUSED], [REFUSED], argument="db by IPv6"),
    Attempt("packet_socket", "raw", [PAST], [PAST]),
    Attempt("datagram", "raw", [PAST], [PAST]),
    # The pod's rules are the pod's to change with NET_ADMIN, ours among them; upstream's too.
    Attempt("flush", "admin", [PAST], [CARRIED]),
    Attempt("untrack", "admin", [REFUSED], HELD),
    Attempt("translate", "admin", [PAST], [PAST]),
    Attempt("translate_listener", "admin", [CARRIED], HELD),
    Attempt("route_local", "admin", [REFUSED], HELD),
    Attempt("route_by_mark", "admin", [CARRIED], [CARRIED]),
    # Rules know calls of a pod to itself by the name of the loopback, as upstream's do.
    Attempt("rename_link", "admin", [PAST], HELD),
    Attempt("move_link", "admin", [REFUSED], HELD, argument="node's pid"),
    Attempt("user_namespace", "admin", [CARRIED], [CARRIED]),
    Attempt("enter_namespace", "admin", [CARRIED], [CARRIED], argument="node's namespace"),
]
RIGHTS = {"raw": NET_RAW, "admin": NET_ADMIN}


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=str)
async def test_escape_ends_as_the_table_says(
    mesh: Mesh, shop: Shop, capture: str, guest: Pod, attempt: Attempt
) -> None:
    node = shop.web.sandbox.node
    arguments: dict[str, object] = {
        "": "",
        "node's pid": mesh.processes[node.name].pid,
        "node's namespace": node.path,
        "db by IPv6": shop.db.sandbox.ipv6,
    }
    async with AsyncExitStack() as ruins:
        if attempt.rights == "raw":
            pod = guest
        else:
            pod = await ruins.enter_async_context(intruder(mesh, shop))
        seen = await attacked(
            mesh, shop, pod, attempt.case, arguments[attempt.argument], RIGHTS[attempt.rights]
        )
        assert seen.outcome in getattr(attempt, capture), seen
        assert await greets(shop.web, shop.db), "a neighbour pays for it"


async def test_cgroup_files_as_a_pod_sees_them_let_nobody_into_the_data_planes_leaf(
    mesh: Mesh, shop: Shop
) -> None:
    mount = cgroup2_mounts()[0]
    script = f'mount -o remount,bind,ro {mount} && exec "$@"'
    view = ("unshare", "--mount", "--cgroup", "sh", "-c", script, "sh")
    async with intruder(mesh, shop) as pod:
        seen = await attacked(mesh, shop, pod, "move_cgroup", "", NET_ADMIN, view)
        moved = next(one for one in seen.said if one.name == "moved")
        assert moved.facts["tried"] > 0
        assert not moved.facts["moved"]
        assert seen.outcome == CARRIED, seen


async def test_a_pod_that_may_write_the_hosts_cgroups_is_as_mighty_as_the_data_plane(
    mesh: Mesh, shop: Shop
) -> None:
    """With the host's cgroup files mounted for writing, which only privileged pods have."""
    leaf = next(
        leaf
        for mount in cgroup2_mounts()
        for leaf in (mount / "underpass" / shop.web.sandbox.node.name).glob("dataplane-*")
    )
    async with intruder(mesh, shop) as pod:
        seen = await attacked(mesh, shop, pod, "move_cgroup", leaf, NET_RAW)
        assert seen.outcome == PAST, seen


async def test_raw_sockets_ping(mesh: Mesh, shop: Shop, guest: Pod) -> None:
    seen = await attacked(mesh, shop, guest, "ping", shop.db.sandbox.ipv6, NET_RAW)
    assert [one.name for one in seen.said] == ["answer by ICMP 1", "answer by ICMP 58"]


async def test_flushed_rules_are_missed_and_put_back(mesh: Mesh, shop: Shop, capture: str) -> None:
    node = shop.web.sandbox.node
    async with intruder(mesh, shop) as pod:
        await attacked(mesh, shop, pod, "flush", "", NET_ADMIN)

        async def carried() -> bool:
            seen = await attacked(mesh, shop, pod, "flush", "", NET_RAW)
            return seen.outcome == CARRIED

        await mesh.until("the rules are back", carried, node.name, seconds=30)
        if capture == "nftables":
            told = [
                line
                for line in mesh.log(node.name).read_text().splitlines()
                if "rules were changed, repairing" in line and pod.name in line
            ]
            assert told
        await mesh.settled(node)


async def test_what_gets_past_the_mesh_has_no_identity_at_the_destination(
    mesh: Mesh, shop: Shop
) -> None:
    content = policy("meshed", "ALLOW", [source(principals=["*"])])
    async with intruder(mesh, shop) as pod, applied(mesh, shop, "meshed", content):
        await becomes(mesh, shop.legacy, shop.db, allowed=False)
        assert await greets(pod, shop.db)
        for case in ("flush", "rename_link"):
            seen = await attacked(mesh, shop, pod, case, "", NET_ADMIN)
            assert seen.outcome in (REFUSED, PAST, CARRIED)
            if seen.outcome != CARRIED:
                assert not any(one.greeting for one in seen.said), seen


@dataclass(frozen=True)
class Outcome:
    outcome: str
    said: list[Heard]
    wire: set[Seen]


async def attacked(
    mesh: Mesh,
    shop: Shop,
    pod: Pod,
    case: str,
    argument: object,
    rights: Sequence[str],
    before: Sequence[str] = (),
) -> Outcome:
    """Runs a case against db and judges by the wire first: what was seen there is past the mesh,
    whatever the attacker was told."""
    host, marker = shop.db.sandbox.ipv4, new_marker()
    tap = Leaks(pod.sandbox.node.namespace, "wire", marker)
    with tap:
        arguments = (case, host, ECHO_PORT, marker, argument)
        said = await run(pod, "escape", *arguments, rights=rights, before=before)
    talks = [one for one in said if one.name == "talk"]
    wire = {
        seen
        for seen in tap.seen
        if (seen.source, seen.destination) == (pod.sandbox.ipv4, host)
        and seen.destination_port == ECHO_PORT
    }
    if wire or tap.sightings:
        outcome = PAST
    elif talks and all(talk.echoed for talk in talks):
        outcome = CARRIED
        assert {talk.greeting for talk in talks} == {f"{shop.db.name} sees {pod.sandbox.ipv4}"}
    else:
        outcome = REFUSED
    return Outcome(outcome, said, wire)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(mesh: Mesh, shop: Shop) -> AsyncIterator[Pod]:
    """For all that has no right to leave traces."""
    async with intruder(mesh, shop, "guest") as pod:
        yield pod


@asynccontextmanager
async def intruder(mesh: Mesh, shop: Shop, name: str = "mallory") -> AsyncIterator[Pod]:
    """A pod of its own for an attempt that may leave it in ruins."""
    pod = Pod(mesh.world.add_pod(shop.web.sandbox.node, name), NAMESPACE, name)
    mesh.add(pod)
    await mesh.settled(pod.sandbox.node)
    await mesh.until(f"{name} reaches db", lambda: greets(pod, shop.db))
    try:
        yield pod
    finally:
        mesh.remove(pod)
        mesh.world.remove_pod(pod.sandbox)
        await mesh.settled(pod.sandbox.node)
