"""The demo's story: each chapter makes one claim, proves it on the running mesh, and says with
what. A claim that doesn't hold ends the story with an error."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from agent.cli.demo import manifests
from agent.cli.demo.clients import Conversation, Load, http_get, refused
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.shop import ECHO_PORT, HTTP_PORT, NAMESPACE, build, serve_echo, serve_http
from agent.cli.demo.wiretap import Wiretap
from agent.cli.demo.world import Node

MARKER = "underpass-marker-7f3a"
TLS_HANDSHAKE = b"\x16\x03"

Evidence = list[str]


class ClaimFailed(Exception):
    """A claim of the demo doesn't hold; the text says what was seen instead."""


class Story:
    """The chapters in order. Each may be called once, after those before it."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.one, self.two = mesh.world.nodes
        self.vips: dict[str, str] = {}

    def chapters(self) -> Sequence[tuple[str, Callable[[], Awaitable[Evidence]]]]:
        return (
            ("two nodes, six pods, one wire", self.build),
            ("without a mesh the wire shows everything", self.plaintext_before),
            ("control plane and agents come up, every pod is captured and verified", self.mesh_up),
            ("now the wire carries only TLS on port 15008", self.encrypted_after),
            ("servers still see the client's real address", self.real_addresses),
            ("both ends are known by certificate", self.identities),
            ("a service address leads to its pods", self.service_vip),
            ("a DENY by identity cuts a live connection", self.deny_cuts),
            ("a pod comes and goes", self.pod_added_and_removed),
            ("STRICT refuses a plaintext client from outside the mesh", self.strict_refuses),
            ("the agent killed with -9 and started again: nothing fails", self.agent_killed),
            ("the data plane replaced: no new request fails", self.dataplane_replaced),
        )

    async def build(self) -> Evidence:
        self.mesh.prepare()
        self.shop = shop = build(self.mesh)
        await serve_http(self.mesh, shop.api)
        for pod in (shop.db, shop.cart):
            await serve_echo(self.mesh, pod)
        await self.mesh.until("nginx answers", lambda: answers(shop.legacy, shop.api), "api")
        for pod in (shop.db, shop.cart):
            await self.mesh.until(
                f"{pod.name} answers", partial(greets, shop.legacy, pod), pod.name
            )
        return [
            f"{node.name}: {', '.join(f'{p.name} {p.ipv4}' for p in node.pods)}"
            for node in self.mesh.world.nodes
        ]

    async def plaintext_before(self) -> Evidence:
        with self.tap() as tap:
            await self.ask_api(self.shop.web)
        claim(tap.sightings > 0, "the marker wasn't seen on the wire, so the tap proves nothing")
        return [f"the marker crossed {tap.sightings} times in clear; TCP ports {sorted(tap.ports)}"]

    async def mesh_up(self) -> Evidence:
        await self.mesh.start()
        for entry in await self.mesh.admin(self.one, "services"):
            self.vips[entry["name"]] = next(
                v.rpartition("/")[2] for v in entry["vips"] if ":" not in v
            )
        evidence = []
        for node in self.mesh.world.nodes:
            pods = await self.mesh.admin(node, "pods")
            names = ", ".join(sorted(p["name"] for p in pods))
            capture = (await self.mesh.admin(node, "status"))["capture"]
            way = f"captured by {capture['mode']} ({capture['reason']})"
            evidence.append(f"{node.name}: {names} proved; {way}")
        return evidence

    async def encrypted_after(self) -> Evidence:
        shop = self.shop
        with self.tap() as tap:
            for host in (shop.api.sandbox.ipv4, shop.api.sandbox.ipv6):
                await self.ask_api(shop.web, host)
            async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
                claim(await talk.echo(MARKER), "db doesn't echo")
                claim((await talk.finish()) == "bye\n", "half-close doesn't reach db")
        claim(tap.sightings == 0, f"the marker crossed the wire {tap.sightings} times in clear")
        foreign = set(tap.ports) - {15008, 15012}
        claim(not foreign, f"TCP ports other than HBONE's and the control plane's: {foreign}")
        claim(tap.ports[15008] > 0, "nothing on port 15008 at all")
        plain = [b for b in tap.first_bytes.values() if not b.startswith(TLS_HANDSHAKE)]
        # A tunnel that was open before shows no handshake; the first ones must.
        claim(bool(tap.first_bytes) and not plain, f"no TLS handshake on 15008: {plain}")
        return [
            f"{tap.ports[15008]} bytes on 15008, {len(tap.first_bytes)} tunnels, each begins with"
            " a TLS handshake; the marker was never seen",
            "IPv4, IPv6, a server that speaks first, half-close",
        ]

    async def real_addresses(self) -> Evidence:
        evidence = []
        for host, expected in (
            (self.shop.api.sandbox.ipv4, self.shop.web.sandbox.ipv4),
            (self.shop.api.sandbox.ipv6, self.shop.web.sandbox.ipv6),
        ):
            answer = await http_get(self.shop.web, host, HTTP_PORT)
            claim(f"sees {expected} " in answer, f"nginx answered {answer!r}, not {expected}")
            evidence.append(f"nginx: {answer.strip()}")
        return evidence

    async def identities(self) -> Evidence:
        shop = self.shop
        async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
            claim(await talk.echo("hello"), "db doesn't echo")
            evidence = []
            for node, direction in ((self.one, "outbound"), (self.two, "inbound")):
                rows = await self.connections(node, direction, shop.db)
                seen = {(r["src_identity"], r["dst_identity"]) for r in rows}
                wanted = {(spiffe(shop.web), spiffe(shop.db))}
                claim(seen == wanted, f"{node.name} says {seen}, not {wanted}")
                evidence.append(f"{node.name} {direction}: {spiffe(shop.web)} → {spiffe(shop.db)}")
        return evidence

    async def service_vip(self) -> Evidence:
        answer = await http_get(self.shop.web, self.vips["api"], 80)
        claim(self.shop.web.sandbox.ipv4 in answer, f"nginx answered {answer!r}")
        async with Conversation(self.shop.web, self.vips["db"], ECHO_PORT) as talk:
            claim(talk.greeting.startswith("db sees"), f"db greeted {talk.greeting!r}")
        return [f"api {self.vips['api']}:80 → {answer.strip()}", f"db {self.vips['db']}: answers"]

    async def deny_cuts(self) -> Evidence:
        shop, loop = self.shop, asyncio.get_running_loop()
        db = shop.db.sandbox.ipv4
        async with (
            Conversation(shop.batch, db, ECHO_PORT) as denied,
            Conversation(shop.web, db, ECHO_PORT) as allowed,
        ):
            claim(await denied.echo("before"), "batch can't talk to db before the policy")
            started = loop.time()
            principal = spiffe(shop.batch).removeprefix("spiffe://")
            policy = manifests.deny("no-batch", NAMESPACE, app="db", principals=[principal])
            self.mesh.apply("no-batch", policy)
            claim(await denied.ended(10), "the live connection was not cut within 10 s")
            took = loop.time() - started
            claim(await allowed.echo("after"), "the policy cut web's connection too")
        claim(await refused(shop.batch, db, ECHO_PORT), "batch got a new connection to db")
        self.mesh.withdraw("no-batch")
        await self.mesh.until(
            "batch is let in again", lambda: greets(shop.batch, shop.db), seconds=10
        )
        return [
            f"batch's open connection was cut {took * 1000:.0f} ms after the manifest was written;"
            " web's went on",
            "new ones of batch were refused, and allowed again once the policy was gone",
        ]

    async def pod_added_and_removed(self) -> Evidence:
        mesh = self.mesh
        pod = Pod(mesh.world.add_pod(self.two, "coupon"), NAMESPACE, "coupon")
        await serve_echo(mesh, pod)
        mesh.add(pod)
        await mesh.settled()
        await mesh.until("coupon answers", lambda: greets(self.shop.web, pod), "coupon")
        async with Conversation(self.shop.web, pod.sandbox.ipv4, ECHO_PORT) as talk:
            rows = await self.connections(self.two, "inbound", pod)
            claim(
                {r["src_identity"] for r in rows} == {spiffe(self.shop.web)},
                f"coupon was reached without mTLS: {rows}",
            )
            mesh.remove(pod)
            mesh.world.remove_pod(pod.sandbox)
            await mesh.settled()
            claim(await talk.ended(10), "the connection to a pod that is gone stays open")
        return ["coupon was captured, reached over mTLS, removed; its connection ended with it"]

    async def strict_refuses(self) -> Evidence:
        shop, mesh = self.shop, self.mesh
        api = shop.api.sandbox.ipv4
        before = await http_get(shop.legacy, api, HTTP_PORT)
        mesh.apply("strict", manifests.strict(NAMESPACE))
        await mesh.until("STRICT to take effect", lambda: not_answers(shop.legacy, shop.api))
        await self.ask_api(shop.web)
        mesh.withdraw("strict")
        await mesh.until("plaintext allowed again", lambda: answers(shop.legacy, shop.api))
        return [f"permissive: {before.strip()}", "strict: legacy is refused, web goes on"]

    async def agent_killed(self) -> Evidence:
        shop, mesh = self.shop, self.mesh
        async with (
            Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk,
            Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load,
        ):
            await progress(load, 20)
            for node in (self.one, self.two):
                before = (await mesh.admin(node, "status"))["dataplane"]["pid"]
                await mesh.kill(node.name)
                await progress(load, 20)
                claim(await talk.echo("without an agent"), "the live connection broke")
                await mesh.start_agent(node)
                await mesh.settled()
                after = (await mesh.admin(node, "status"))["dataplane"]["pid"]
                claim(before == after, "the new agent did not adopt the running data plane")
            await progress(load, 20)
            claim(await talk.echo("with new agents"), "the live connection broke")
        claim(not load.failures, f"{len(load.failures)} requests failed: {load.failures[:3]}")
        return [f"{load.done} requests meanwhile, 0 failed; the live connection goes on"]

    async def dataplane_replaced(self) -> Evidence:
        shop, mesh, loop = self.shop, self.mesh, asyncio.get_running_loop()
        async with (
            Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk,
            Load(shop.web, shop.api.sandbox.ipv4, HTTP_PORT) as load,
        ):
            await progress(load, 20)
            before = (await mesh.admin(self.one, "status"))["dataplane"]["pid"]
            mesh.processes[self.one.name].send_signal(signal.SIGHUP)

            async def replaced() -> bool:
                status = await mesh.admin(self.one, "status")
                return status["dataplane"]["pid"] not in (0, before)

            started = loop.time()
            await mesh.until("a new data plane", replaced, self.one.name)
            await progress(load, 20)
            claim(await talk.ended(30), "an established connection outlived the drain deadline")
            drained = loop.time() - started
            await mesh.settled()
            await progress(load, 20)
        claim(not load.failures, f"{len(load.failures)} requests failed: {load.failures[:3]}")
        return [
            f"{load.done} requests on new connections, 0 failed",
            f"the established connection ended {drained:.1f} s later, at the drain deadline",
        ]

    # ---- means ---------------------------------------------------------------------------

    def tap(self) -> Wiretap:
        return Wiretap(self.one.namespace, "wire", MARKER.encode())

    async def ask_api(self, pod: Pod, host: str | None = None) -> str:
        host = host or self.shop.api.sandbox.ipv4
        return await http_get(pod, host, HTTP_PORT, f"/{MARKER}")

    async def connections(self, node: Node, direction: str, server: Pod) -> list[dict[str, Any]]:
        """Rows of `underpass connections` towards a server."""
        rows = await self.mesh.admin(node, "connections")
        return [
            row
            for row in rows
            if row["direction"] == direction and row["dst_workload"] == server.name
        ]


def claim(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ClaimFailed(otherwise)


def spiffe(pod: Pod) -> str:
    return f"spiffe://cluster.local/ns/{pod.namespace}/sa/{pod.service_account}"


async def answers(client: Pod, server: Pod) -> bool:
    try:
        await http_get(client, server.sandbox.ipv4, HTTP_PORT, timeout=2)
    except Exception:  # any failure means the same here: not yet
        return False
    return True


async def not_answers(client: Pod, server: Pod) -> bool:
    return not await answers(client, server)


async def greets(client: Pod, server: Pod) -> bool:
    return not await refused(client, server.sandbox.ipv4, ECHO_PORT)


async def progress(load: Load, more: int, seconds: float = 30) -> None:
    """Waits for further successful requests. Raises ClaimFailed when they don't come."""
    target = load.done + more
    try:
        async with asyncio.timeout(seconds):
            while load.done < target:
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise ClaimFailed(f"requests stopped coming through: {load.failures[-3:]}") from None
