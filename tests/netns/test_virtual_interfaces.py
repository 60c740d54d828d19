"""A virtual machine behind an interface of a pod: past the mesh while nobody declared it, which
`underpass pods` shows, and with the pod's identity from then on."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from agent.cli.demo import manifests
from agent.cli.demo.clients import Conversation
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.netns import inside
from agent.cli.demo.shop import ECHO_PORT
from agent.cli.demo.story import greets, spiffe
from tests.support.meshes import mesh_of, stocked
from tests.support.operator import ask
from tests.support.policies import applied, becomes, policy, source
from tests.support.proof import new_marker, nothing_in_clear

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import Node, World

pytestmark = pytest.mark.asyncio(loop_scope="module")

INTERFACE = "vm0"


class Host(Mesh):
    """Of its pods one says by which interfaces others send through it."""

    declared: tuple[str, list[str]] = ("", [])

    def write_pods(self, node: Node) -> None:
        name, interfaces = self.declared
        mine = [p for p in self.pods if p.ambient and p.sandbox.node is node]
        said = {"virtualInterfaces": interfaces}
        manifests.write_list(
            self.pods_file(node), [p.entry() | (said if p.name == name else {}) for p in mine]
        )

    async def declare(self, pod: Pod, *interfaces: str) -> None:
        self.declared = pod.name, list(interfaces)
        self.write_pods(pod.sandbox.node)

    async def row(self, pod: Pod) -> dict[str, Any]:
        rows = await self.admin(pod.sandbox.node, "pods")
        return next(row for row in rows if row["name"] == pod.name)

    async def forwards(self, pod: Pod, *interfaces: str, capture: str) -> None:
        async def as_wanted() -> bool:
            row = await self.row(pod)
            return (row["forwards"], row["capture"]) == (list(interfaces), capture)

        await self.until(f"{pod.name} forwards {interfaces}", as_wanted, pod.sandbox.node.name)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Host]:
    folder = tmp_path_factory.mktemp("mesh")
    async with mesh_of(Host, world, capture, folder, "--verify-interval=300ms") as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(mesh: Host) -> Shop:
    made = await stocked(mesh)
    await mesh.start()
    return made


@pytest.fixture(scope="module")
def guest(shop: Shop) -> Iterator[Pod]:
    """A machine behind web, whose addresses web translates to its own, as a hypervisor's network
    for pods does."""
    host = shop.web.sandbox.namespace
    # By this prefix the world finds it after a crash.
    name = f"{host}-vm"
    for line in (
        f"netns add {name}",
        f"-n {host} link add {INTERFACE} type veth peer name eth0 netns {name}",
        f"-n {host} addr add 10.0.2.1/24 dev {INTERFACE}",
        f"-n {host} addr add fd00:2::1/64 dev {INTERFACE} nodad",
        f"-n {host} link set {INTERFACE} up",
        f"-n {name} addr add 10.0.2.2/24 dev eth0",
        f"-n {name} addr add fd00:2::2/64 dev eth0 nodad",
        f"-n {name} link set eth0 up",
        f"-n {name} route add default via 10.0.2.1",
        f"-n {name} -6 route add default via fd00:2::1",
    ):
        subprocess.run(["ip", *line.split()], check=True)
    rules = (
        "table inet hypervisor { chain post { type nat hook postrouting priority 100;"
        ' oifname "eth0" masquerade; }; }'
    )

    def forward() -> None:
        for switch in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            (Path("/proc/sys/net") / switch).write_text("1")
        subprocess.run(["nft", rules], check=True)

    inside(host, forward)
    yield replace(shop.web, sandbox=replace(shop.web.sandbox, namespace=name))
    subprocess.run(["ip", "netns", "del", name], check=True)


async def test_undeclared_machine_is_shown_as_going_past_the_mesh(
    mesh: Host, shop: Shop, guest: Pod, capture: str
) -> None:
    assert (await mesh.row(shop.web))["forwards"] == []
    async with Conversation(guest, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("hello")
    await mesh.forwards(shop.web, INTERFACE, capture=capture)
    (note,) = (await mesh.row(shop.web))["notes"]
    assert note.startswith("partly captured")
    assert f"{INTERFACE} goes past the mesh" in note
    assert "virtualInterfaces" in note
    shown = await ask(mesh.run_dir, shop.web.sandbox.node.name, "pods")
    assert "(partly)" in shown.text


async def test_declared_machine_speaks_with_the_pods_identity(
    mesh: Host, shop: Shop, guest: Pod, capture: str
) -> None:
    async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as own:
        await mesh.declare(shop.web, INTERFACE)
        # No hook of sockets sees what is forwarded.
        await mesh.forwards(shop.web, capture="nftables")
        marker = new_marker()
        async with nothing_in_clear(mesh, marker):
            for where in (shop.db.sandbox.ipv4, shop.db.sandbox.ipv6):
                async with Conversation(guest, where, ECHO_PORT) as talk:
                    assert await talk.echo(marker)
                    own_address = shop.web.sandbox.ipv6 if ":" in where else shop.web.sandbox.ipv4
                    assert talk.greeting == f"db sees {own_address}"
            # The pod's own go on as before, what was open too.
            assert await greets(shop.web, shop.db)
            assert await own.echo("the pod's own")
        principal = spiffe(shop.web).removeprefix("spiffe://")
        content = policy("no-web", "DENY", [source(principals=[principal])])
        async with applied(mesh, shop, "no-web", content):
            await becomes(mesh, guest, shop.db, allowed=False)
            assert await greets(shop.batch, shop.db)
    await mesh.declare(shop.web)
    await mesh.forwards(shop.web, INTERFACE, capture=capture)
