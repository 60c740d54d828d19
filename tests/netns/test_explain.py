"""`underpass explain` agrees with what a real connection then does, and `why` names the rule."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from agent.cli.demo import manifests
from agent.cli.demo.clients import Conversation, refused
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE
from agent.cli.demo.story import greets, spiffe
from tests.support.operator import Said, ask
from tests.support.policies import applied, becomes, policy, source

if TYPE_CHECKING:
    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import Node

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALLOWED, REFUSED, UNKNOWN = 0, 1, 2


async def explain(
    mesh: Mesh, node: Node, client: Pod, destination: str, *options: str
) -> tuple[int, Said]:
    name = f"{client.namespace}/{client.name}"
    said = await ask(mesh.run_dir, node.name, "explain", name, destination, *options)
    return said.code, said


async def explained(
    mesh: Mesh, node: Node, client: Pod, destination: str, code: int, *parts: str
) -> None:
    """What the control plane sends reaches each node in its own time."""
    last: list[Said] = []

    async def so() -> bool:
        found, said = await explain(mesh, node, client, destination)
        last[:] = [said]
        return found == code and said.tells(*parts)

    try:
        await mesh.until("the explanation", so, seconds=15)
    except Exception as exc:
        raise AssertionError(f"{last[0].code}, not {code} with {parts}: {last[0].text}") from exc


async def vip(mesh: Mesh, name: str) -> str:
    """The IPv4 address that the control plane gave a service."""
    found: list[str] = []

    async def published() -> bool:
        for row in await mesh.admin(mesh.world.nodes[0], "services"):
            if row["name"] == name:
                found[:] = [v.rpartition("/")[2] for v in row["vips"] if ":" not in v]
        return bool(found)

    await mesh.until(f"service {name}", published)
    return found[0]


def echo_at(host: str) -> str:
    return f"{host}:{ECHO_PORT}"


async def test_allowed_by_address_service_and_name(mesh: Mesh, shop: Shop) -> None:
    one, two = mesh.world.nodes
    service = await vip(mesh, "db")
    ipv6 = f"[{shop.db.sandbox.ipv6}]:{ECHO_PORT}"
    for dialled in (echo_at(shop.db.sandbox.ipv4), ipv6, echo_at(service), echo_at("db")):
        code, said = await explain(mesh, one, shop.web, dialled)
        assert code == ALLOWED, said.text
        assert said.tells("over mutual TLS to shop/db", spiffe(shop.db), "valid for"), said.text
    for host in (shop.db.sandbox.ipv4, service):
        assert not await refused(shop.web, host, ECHO_PORT)
    # The destination's node can't know whether the client's has a certificate.
    code, said = await explain(mesh, two, shop.web, echo_at(shop.db.sandbox.ipv4))
    assert code == UNKNOWN, said.text
    assert said.tells(f"on node {one.name}"), said.text


async def test_deny_by_identity_is_explained_refused_and_kept(mesh: Mesh, shop: Shop) -> None:
    one, two = mesh.world.nodes
    rules = [source(serviceAccounts=["nobody"]), source(serviceAccounts=["batch"])]
    content = policy("no-batch", "DENY", rules)
    destination = echo_at(shop.db.sandbox.ipv4)
    async with applied(mesh, shop, "no-batch", content):
        parts = ("explicitly denied by: shop/no-batch", "its rule 1 matches")
        for node in (one, two):
            await explained(mesh, node, shop.batch, destination, REFUSED, *parts)
        assert await refused(shop.batch, shop.db.sandbox.ipv4, ECHO_PORT)
        await explained(mesh, one, shop.web, destination, ALLOWED, "rule 1: serviceAccounts")
        assert await greets(shop.web, shop.db)

        _, said = await explain(mesh, one, shop.batch, destination, "--why-not")
        assert said.tells("shop/no-batch", "what to do: change that rule"), said.text
        assert not said.tells("certificate"), said.text

        kept = await why(mesh, two, "db")
        (row,) = [row for row in kept if row["policy"] == "shop/no-batch"]
        assert (row["rule"], row["flag"], row["direction"]) == (1, "DENY", "inbound")
        assert row["src_identity"] == spiffe(shop.batch)
        assert row["src_workload"] == "shop/batch"
        assert row["count"] >= 1
        said = await ask(mesh.run_dir, two.name, "why", "shop/batch")
        assert said.tells("by shop/no-batch (rule 1)", "do change that rule"), said.text
        at_client = [row for row in await why(mesh, one, "batch") if "401" in row["cause"]]
        assert "underpass why on the destination's node" in at_client[0]["remedy"]

        said = await ask(mesh.run_dir, two.name, "policies", "-o", "json")
        (hits,) = [p["hits"] for p in json.loads(said.text) if p["name"] == "no-batch"]
        assert hits["decided"] >= row["count"]
        assert hits["last"] is not None


async def why(mesh: Mesh, node: Node, pod: str) -> list[dict[str, Any]]:
    said = await ask(mesh.run_dir, node.name, "why", pod, "-o", "json")
    assert said.code == 0, said.text
    found: list[dict[str, Any]] = json.loads(said.text)
    return found


async def test_not_allowed_by_any_allow_policy(mesh: Mesh, shop: Shop) -> None:
    principal = spiffe(shop.web).removeprefix("spiffe://")
    content = policy("only-web", "ALLOW", [source(principals=[principal])])
    one, destination = mesh.world.nodes[0], echo_at(shop.db.sandbox.ipv4)
    async with applied(mesh, shop, "only-web", content):
        difference = f"principals [{principal}] don't include cluster.local/ns/shop/sa/batch"
        parts = ("none allowed", f"rule 0: {difference}", "add a rule for this source")
        await explained(mesh, one, shop.batch, destination, REFUSED, *parts)
        await becomes(mesh, shop.batch, shop.db, allowed=False)
        await explained(mesh, one, shop.web, destination, ALLOWED, "ALLOW, its rule 0 matches")
        assert await greets(shop.web, shop.db)


async def test_a_dry_run_is_told_and_lets_pass(mesh: Mesh, shop: Shop) -> None:
    principal = spiffe(shop.batch).removeprefix("spiffe://")
    content = manifests.deny("trial", NAMESPACE, app="db", principals=[principal], dry_run=True)
    one, two = mesh.world.nodes
    async with applied(mesh, shop, "trial", content):
        destination = echo_at(shop.db.sandbox.ipv4)
        for node, code in ((one, ALLOWED), (two, UNKNOWN)):
            await explained(mesh, node, shop.batch, destination, code, "would deny, in dry-run")
        assert await greets(shop.batch, shop.db)

        async def counted() -> bool:
            said = await ask(mesh.run_dir, two.name, "policies", "-o", "json")
            hits = [p["hits"] for p in json.loads(said.text) if p["name"] == "trial"]
            return bool(hits) and hits[0]["dryRun"] >= 1 and hits[0]["decided"] == 0

        await mesh.until("the hit of the policy in dry-run", counted)


async def test_a_port_that_the_service_does_not_declare(mesh: Mesh, shop: Shop) -> None:
    service = await vip(mesh, "db")
    parts = ("no healthy endpoint of service shop/db", f"ports {ECHO_PORT}")
    await explained(mesh, mesh.world.nodes[0], shop.web, f"{service}:81", REFUSED, *parts)
    assert await refused(shop.web, service, 81)
    kept = await why(mesh, mesh.world.nodes[0], "web")
    assert kept[0]["flag"] == "NO_ROUTE"
    assert kept[0]["dst_service"] == "db.shop.svc.cluster.local"


async def test_a_service_without_endpoints(mesh: Mesh, shop: Shop) -> None:
    mesh.apply("void", manifests.service("void", NAMESPACE, ECHO_PORT, 1, {"app": "nobody"}))
    service = await vip(mesh, "void")
    one = mesh.world.nodes[0]
    await explained(mesh, one, shop.web, echo_at("void"), REFUSED, "it has 0 endpoints")
    assert await refused(shop.web, service, ECHO_PORT)
    mesh.withdraw("void")


async def test_plaintext_under_strict(mesh: Mesh, shop: Shop) -> None:
    one, destination = mesh.world.nodes[0], echo_at(shop.db.sandbox.ipv4)
    await explained(mesh, one, shop.legacy, destination, ALLOWED, "in clear to shop/db")
    assert await greets(shop.legacy, shop.db)
    async with applied(mesh, shop, "strict", manifests.strict(NAMESPACE)):
        await explained(mesh, one, shop.legacy, destination, REFUSED, "outside the mesh")
        await becomes(mesh, shop.legacy, shop.db, allowed=False)
        await explained(mesh, one, shop.web, destination, ALLOWED)
        assert await greets(shop.web, shop.db)


async def test_an_unknown_address_is_passed_through(mesh: Mesh, shop: Shop) -> None:
    one, two = mesh.world.nodes
    arguments = [sys.executable, "-m", "agent.cli.demo.echo", "outside", str(ECHO_PORT)]
    await mesh.spawn("outside", arguments, two.namespace)
    await explained(
        mesh, one, shop.web, echo_at(two.ipv4), ALLOWED, "nothing is known of this address"
    )

    async def reached() -> bool:
        return not await refused(shop.web, two.ipv4, ECHO_PORT)

    await mesh.until("the server outside the mesh", reached)
    async with Conversation(shop.web, two.ipv4, ECHO_PORT) as talk:
        assert talk.greeting.startswith("outside sees")


async def test_a_question_that_cannot_be_answered_is_no_verdict(mesh: Mesh, shop: Shop) -> None:
    run_dir, node = mesh.run_dir, mesh.world.nodes[0].name
    for source_name, destination, part in (
        ("shop/nobody", "10.0.0.1:80", "shop/nobody: no pod here"),
        ("shop/web", "10.0.0.1", "IP:PORT or HOSTNAME:PORT"),
    ):
        said = await ask(run_dir, node, "explain", source_name, destination)
        assert said.code == 3, said.text
        assert said.tells(part), said.text


async def test_the_data_plane_answers_while_its_agent_is_away(mesh: Mesh, shop: Shop) -> None:
    one = mesh.world.nodes[0]
    assert await refused(shop.web, await vip(mesh, "db"), 81)
    await mesh.kill(one.name)
    code, said = await explain(mesh, one, shop.web, echo_at(shop.db.sandbox.ipv4))
    assert code == ALLOWED, said.text
    assert said.tells("its data plane still serves"), said.text
    said = await ask(mesh.run_dir, one.name, "why", "web")
    assert said.tells("its data plane still serves", "outbound NO_ROUTE"), said.text
    await mesh.start_agent(one)
    await mesh.settled()
