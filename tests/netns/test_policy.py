"""Authorization as applications and operators notice it: who gets through, who is cut, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agent.cli.demo import manifests
from agent.cli.demo.clients import Conversation, refused
from agent.cli.demo.mesh import access_lines
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE
from agent.cli.demo.story import greets, spiffe
from tests.support.policies import applied, becomes, policy, source

if TYPE_CHECKING:
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_allow_by_principal_lets_only_that_one_in(mesh: Mesh, shop: Shop) -> None:
    principal = spiffe(shop.web).removeprefix("spiffe://")
    content = policy("only-web", "ALLOW", [source(principals=[principal])])
    async with applied(mesh, shop, "only-web", content):
        await becomes(mesh, shop.batch, shop.db, allowed=False)
        await becomes(mesh, shop.legacy, shop.db, allowed=False)
        assert await greets(shop.web, shop.db)
        log = mesh.log(mesh.world.nodes[1].name)
        needles = (spiffe(shop.batch), "allow policies exist, but none allowed")
        await mesh.until("the refusal in the log", lambda: bool(access_lines(log, *needles)))


async def test_deny_names_the_policy_that_decided(mesh: Mesh, shop: Shop) -> None:
    content = policy("no-batch", "DENY", [source(serviceAccounts=["batch"])])
    async with applied(mesh, shop, "no-batch", content):
        await becomes(mesh, shop.batch, shop.db, allowed=False)
        assert await greets(shop.web, shop.db)
        log = mesh.log(mesh.world.nodes[1].name)
        needles = (spiffe(shop.batch), "explicitly denied by: shop/no-batch")
        await mesh.until("the refusal in the log", lambda: bool(access_lines(log, *needles)))


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
async def test_deny_by_source_address_sees_the_real_one(
    mesh: Mesh, shop: Shop, family: str
) -> None:
    blocks = [getattr(shop.batch.sandbox, family)]
    content = policy("no-address", "DENY", [source(ipBlocks=blocks)])
    host = getattr(shop.db.sandbox, family)
    async with applied(mesh, shop, "no-address", content):

        async def out() -> bool:
            return await refused(shop.batch, host, ECHO_PORT)

        await mesh.until("batch's address is refused", out, seconds=15)
        async with Conversation(shop.web, host, ECHO_PORT) as talk:
            assert await talk.echo("others go on")


async def test_deny_by_port_leaves_other_ports(mesh: Mesh, shop: Shop) -> None:
    rule = {"to": [{"operation": {"ports": [str(ECHO_PORT)]}}]}
    async with applied(mesh, shop, "no-port", policy("no-port", "DENY", [rule])):
        await becomes(mesh, shop.web, shop.db, allowed=False)
        await becomes(mesh, shop.legacy, shop.db, allowed=False)
        assert await greets(shop.web, shop.cart)


async def test_policy_change_closes_only_what_it_forbids(mesh: Mesh, shop: Shop) -> None:
    host = shop.db.sandbox.ipv4
    async with (
        Conversation(shop.batch, host, ECHO_PORT) as batch,
        Conversation(shop.web, host, ECHO_PORT) as web,
        Conversation(shop.legacy, host, ECHO_PORT) as plaintext,
    ):
        content = policy("late", "DENY", [source(serviceAccounts=["batch"])])
        async with applied(mesh, shop, "late", content):
            assert await batch.ended(15)
            assert await web.echo("still here")
            assert await plaintext.echo("still here")


async def test_workload_change_that_attaches_a_policy_closes_connections(
    mesh: Mesh, shop: Shop
) -> None:
    content = policy("guard", "DENY", [source(serviceAccounts=["batch"])], app=None)
    content["spec"]["selector"] = {"matchLabels": {"guarded": "yes"}}
    async with applied(mesh, shop, "guard", content):
        assert await greets(shop.batch, shop.db)
        async with Conversation(shop.batch, shop.db.sandbox.ipv4, ECHO_PORT) as batch:
            labelled = manifests.Pod(
                shop.db.sandbox, NAMESPACE, shop.db.service_account, {"guarded": "yes"}
            )
            mesh.write_manifest(labelled)
            assert await batch.ended(15)
        mesh.write_manifest(shop.db)


async def test_dry_run_denies_nothing_but_is_logged(mesh: Mesh, shop: Shop) -> None:
    principal = spiffe(shop.batch).removeprefix("spiffe://")
    content = manifests.deny("trial", NAMESPACE, app="db", principals=[principal], dry_run=True)
    async with applied(mesh, shop, "trial", content):
        node = mesh.world.nodes[1]

        async def published() -> bool:
            return any(p["name"] == "trial" for p in await mesh.admin(node, "policies"))

        await mesh.until("the policy on the node", published)
        assert await greets(shop.batch, shop.db)

        def logged() -> bool:
            lines = mesh.log(node.name).read_text().splitlines()
            return any("shop/trial" in line and "would deny" in line for line in lines)

        await mesh.until("the dry-run outcome in the log", logged)


async def test_strict_refuses_plaintext_and_keeps_the_mesh(mesh: Mesh, shop: Shop) -> None:
    host = shop.db.sandbox.ipv4
    async with (
        Conversation(shop.legacy, host, ECHO_PORT) as plaintext,
        applied(mesh, shop, "strict", manifests.strict(NAMESPACE)),
    ):
        assert await plaintext.ended(15)
        await becomes(mesh, shop.legacy, shop.db, allowed=False)
        assert await greets(shop.web, shop.db)


async def test_broken_policy_manifest_keeps_the_last_good_one(mesh: Mesh, shop: Shop) -> None:
    content = policy("kept", "DENY", [source(serviceAccounts=["batch"])])
    async with applied(mesh, shop, "kept", content):
        await becomes(mesh, shop.batch, shop.db, allowed=False)
        broken = policy("kept", "DENY", [source(ipBlocks=["10.0.0.0/99"])])
        mesh.apply("kept", broken)
        log = mesh.log("controlplane")
        await mesh.until(
            "the control plane names file and field",
            lambda: "kept.yaml" in (text := log.read_text()) and "10.0.0.0/99" in text,
        )
        assert not await greets(shop.batch, shop.db)
        assert await greets(shop.web, shop.db)
