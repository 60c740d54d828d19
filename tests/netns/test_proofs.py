"""Capture proved by traffic: what stands in its way shows at the pod and is repaired, strangers on
the proofs' port learn and change nothing, and proofs are no traffic of anybody."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from agent.cli.demo.clients import http_get
from agent.cli.demo.netns import inside
from agent.cli.demo.shop import HTTP_PORT
from tests.support.vitals import counted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="module")

PORT = 15007
ARRIVALS = "underpass_proof_connections_total"
OUTBOUND = "192.0.2.107"
# Refuses what comes in for the proofs' port, before any rule of ours.
NO_WAY_IN = f"""table inet intruder {{
  chain first {{ type filter hook prerouting priority -400;
    iifname "eth0" tcp dport {PORT} reject with tcp reset
  }}
}}"""
# Takes connections out of the pod before our rules do, which stay as they are.
ANOTHER_WAY_OUT = """table inet intruder {
  chain first { type nat hook output priority -150;
    ip daddr 192.0.2.0/24 meta l4proto tcp redirect to :9
  }
}"""


@pytest.fixture(scope="module", autouse=True)
def often(capture: str) -> Iterator[None]:
    """Before the agents start."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("UNDERPASS_PROVE_INTERVAL", "500ms")
        yield


async def row(mesh: Mesh, pod: Pod) -> dict[str, Any]:
    rows = await mesh.admin(pod.sandbox.node, "pods")
    found: dict[str, Any] = next(one for one in rows if one["uid"] == pod.uid)
    return found


async def until(mesh: Mesh, pod: Pod, proof: str, *, after: datetime | None = None) -> Any:
    async def told() -> bool:
        found = await row(mesh, pod)
        at = found["proof_at"] and datetime.fromisoformat(found["proof_at"])
        return found["proof"] == proof and (after is None or (at is not None and at > after))

    await mesh.until(f"{pod.name} is {proof}", told, pod.sandbox.node.name)
    return await row(mesh, pod)


@contextlib.contextmanager
def intruder(pod: Pod, rules: str) -> Iterator[None]:
    enter = ["nsenter", f"--net=/run/netns/{pod.sandbox.namespace}", "nft"]
    subprocess.run([*enter, "-f", "-"], input=rules, text=True, check=True)
    try:
        yield
    finally:
        subprocess.run([*enter, "delete", "table", "inet", "intruder"], check=True)


async def test_proofs_are_told_and_are_no_traffic(mesh: Mesh, shop: Shop) -> None:
    for pod in (shop.web, shop.api):
        # Again and again, not only once.
        await until(mesh, pod, "proved", after=datetime.now(UTC))
    node = shop.web.sandbox.node
    status = await mesh.admin(node, "status")
    assert status["pods"]["proved"] == status["pods"]["total"] > 0
    pods = "underpass_agent_pods_proved"
    assert await counted(node, pods, state="proved") == status["pods"]["proved"]
    assert await counted(node, pods, state="not_proved") == 0
    assert await counted(node, "underpass_agent_proofs_total", result="proved") > 0
    assert await counted(node, ARRIVALS, outcome="arrived") > 0
    assert await counted(node, "underpass_refusals_total") == 0
    for word in (OUTBOUND, str(PORT)):
        assert word not in mesh.log(node.name).read_text()
        assert word not in str(await mesh.admin(node, "connections"))
        assert word not in str(await mesh.admin(node, "verdicts"))


async def _disproved(mesh: Mesh, pod: Pod, way: AbstractContextManager[None], reason: str) -> None:
    node = pod.sandbox.node
    with way:
        found = await until(mesh, pod, "not proved")
        assert reason in found["proof_reason"]
        assert not found["verified"]
        assert not found["enforced"]
        assert reason in found["problem"]
        assert found["remedy"]
        assert await counted(node, "underpass_agent_pods_proved", state="not_proved") == 1
        log = mesh.log(node.name).read_text()
        assert "capture not proved" in log
        assert pod.name in next(line for line in log.splitlines() if "capture not proved" in line)
    await until(mesh, pod, "proved")
    assert not (await row(mesh, pod))["problem"]


async def test_a_pod_that_somebody_cuts_off_from_us_is_not_proved(mesh: Mesh, shop: Shop) -> None:
    way = intruder(shop.web, NO_WAY_IN)
    await _disproved(mesh, shop.web, way, "a connection to the pod (IPv4) went past us")


@pytest.mark.modes("nftables")
async def test_rules_before_ours_that_lead_elsewhere_are_found(mesh: Mesh, shop: Shop) -> None:
    way = intruder(shop.db, ANOTHER_WAY_OUT)
    await _disproved(mesh, shop.db, way, "a connection out of the pod (IPv4) went past us")


async def test_strangers_on_the_proofs_port_change_nothing(mesh: Mesh, shop: Shop) -> None:
    node = shop.api.sandbox.node
    outcomes = ("unexpected", "incomplete")
    before = [await counted(node, ARRIVALS, outcome=outcome) for outcome in outcomes]
    host = shop.api.sandbox.ipv4

    def garbage() -> list[bytes]:
        said = []
        for bytes_ in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(16), b"\0" * 4000):
            with socket.create_connection((host, PORT), 5) as stranger:
                stranger.sendall(bytes_)
                # It may be reset already.
                with contextlib.suppress(OSError):
                    stranger.shutdown(socket.SHUT_WR)
                    said.append(stranger.recv(1))
        return said

    # From the node, which no capture touches.
    assert set(await asyncio.to_thread(inside, node.namespace, garbage)) <= {b""}
    after = [await counted(node, ARRIVALS, outcome=outcome) for outcome in outcomes]
    assert [now - then for now, then in zip(after, before, strict=True)] == [3, 1]
    assert str(PORT) not in mesh.log(node.name).read_text()
    assert await http_get(shop.web, host, HTTP_PORT, "/")
    await until(mesh, shop.api, "proved", after=datetime.now(UTC))


async def test_without_a_data_plane_nothing_is_proved(mesh: Mesh, shop: Shop) -> None:
    node = shop.web.sandbox.node
    pid = (await mesh.admin(node, "status"))["dataplane"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    killed = datetime.now(UTC)
    await until(mesh, shop.web, "proved", after=killed)
    assert (await row(mesh, shop.web))["verified"]
    log = mesh.log(node.name).read_text()
    assert "data plane lost" in log
