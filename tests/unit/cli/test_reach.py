"""Finding a node, and what is said when there is none, several, or only a data plane."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import pytest

from proto.gen import control_pb2
from tests.support.fake_dataplane import FakeConnection, FakeDataplane
from tests.unit.cli.node import agent, background, underpass

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def test_without_any_agent_it_says_how_to_start_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        result = underpass(folder, "pods")
        assert result.exit_code == 1
        assert f"no agent is running below {folder}" in result.stderr
        assert "underpass agent --node" in result.stderr
        assert "--run-dir" in result.stderr
        assert "Traceback" not in result.output


def test_the_only_agent_is_found_by_itself(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"pods": []}):
        assert underpass(tmp_path, "pods").exit_code == 0


def test_sockets_left_by_the_dead_do_not_count(tmp_path: Path) -> None:
    leave_socket(tmp_path, "old-node")
    result = underpass(tmp_path, "pods")
    assert result.exit_code == 1
    assert "stopped: old-node" in result.stderr
    with agent(tmp_path, "node-a", {"pods": []}):
        assert underpass(tmp_path, "pods").exit_code == 0


def test_of_several_one_must_be_chosen(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"pods": []}), agent(tmp_path, "node-b", {"policies": []}):
        result = underpass(tmp_path, "pods")
        assert result.exit_code == 1
        assert "--node" in result.stderr
        assert "node-a" in result.stderr
        assert "node-b" in result.stderr
        assert underpass(tmp_path, "pods", "--node", "node-a").exit_code == 0
        assert underpass(tmp_path, "--node", "node-b", "policies").exit_code == 0


def test_a_node_that_is_not_here_is_named_with_those_that_are(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"pods": []}):
        result = underpass(tmp_path, "pods", "--node", "node-z")
    assert result.exit_code == 1
    assert "no agent of node node-z is running" in result.stderr
    assert "node-a" in result.stderr


def test_an_error_of_the_agent_is_shown_and_fails(tmp_path: Path) -> None:
    with agent(tmp_path, "node-a", {"pods": 503}):
        result = underpass(tmp_path, "pods")
    assert result.exit_code == 1
    assert "answered 503 to pods: not today" in result.stderr


# ---- the agent is away


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[Path]:
    """A run dir in which only a data plane answers; the agent's socket file is still there."""
    leave_socket(tmp_path, "node-a")

    def dataplane() -> FakeDataplane:
        fake = FakeDataplane(tmp_path / "node-a" / "dataplane.sock", answer)
        fake.hello.CopyFrom(HELLO)
        return fake

    with background(dataplane):
        yield tmp_path


WEB = control_pb2.PodStatus(
    pod=control_pb2.Pod(uid="u1", name="web", namespace="shop"),
    state=control_pb2.PodStatus.UP,
    identity="spiffe://cluster.local/ns/shop/sa/web",
    outbound_connections=3,
)
HELLO = control_pb2.HelloReply(
    version=1,
    instance_id="i1",
    pid=77,
    config=control_pb2.InstanceConfig(node="node-a"),
    pods=[WEB],
    certificates=[
        control_pb2.CertificateStatus(
            identity="spiffe://cluster.local/ns/shop/sa/web",
            not_before=1,
            not_after=4_000_000_000,
            serial="12",
        )
    ],
    types=[control_pb2.TypeState(type_url="t", rejected={"shop/bad": "unknown action"})],
)


async def answer(connection: FakeConnection, request: control_pb2.Request, fds: list[int]) -> None:
    kind = request.WhichOneof("body")
    if kind == "list_pods":
        await connection.reply(request, pods=control_pb2.PodsReply(pods=[WEB]))
    elif kind == "list_connections":
        row = control_pb2.Connection(
            direction=control_pb2.Connection.OUTBOUND, src="10.1.0.2:41000", dst_workload="api"
        )
        await connection.reply(request, connections=control_pb2.ConnectionsReply(connections=[row]))
    elif kind == "explain":
        text = f"{request.explain.source} to {request.explain.destination}"
        await connection.reply(
            request, explain=control_pb2.ExplainReply(allowed=True, verdict=text)
        )
    elif kind == "list_verdicts":
        await connection.reply(
            request,
            verdicts=control_pb2.VerdictsReply(
                verdicts=[control_pb2.Verdict(time_ms=1, flag="DENY", rule=-1, count=1)]
            ),
        )
    elif kind == "list_policy_hits":
        hits = control_pb2.PolicyHits(name="shop/policies", decided=4711, last_ms=1)
        await connection.reply(request, policy_hits=control_pb2.PolicyHitsReply(policies=[hits]))
    else:
        whole = json.dumps([{"name": request.dump.section, "namespace": "shop"}]).encode()
        await connection.reply(request, more=True, chunk=control_pb2.Chunk(data=whole[:9]))
        await connection.reply(request, chunk=control_pb2.Chunk(data=whole[9:]))


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ("pods", "shop/web"),
        ("connections", "10.1.0.2:41000"),
        ("certificates", "Available"),
        ("workloads", "shop/workloads"),
        ("services", "shop/services"),
        ("policies", "4711"),
        ("why", "DENY"),
    ],
)
def test_a_data_plane_answers_for_its_absent_agent(orphan: Path, section: str, part: str) -> None:
    result = underpass(orphan, section)
    assert result.exit_code == 0, result.output
    assert part in result.stdout
    assert "data plane still serves" in result.stderr
    machine = underpass(orphan, section, "-o", "json")
    assert len(json.loads(machine.stdout)) == 1


def test_a_data_plane_explains_for_its_absent_agent(orphan: Path) -> None:
    result = underpass(orphan, "explain", "shop/web", "10.1.0.2:80")
    assert result.exit_code == 0, result.output
    assert "shop/web to 10.1.0.2:80" in result.stdout
    assert "data plane still serves" in result.stderr


def test_pods_of_an_absent_agent_are_not_claimed_to_be_verified(orphan: Path) -> None:
    assert "unknown" in underpass(orphan, "pods").stdout
    assert json.loads(underpass(orphan, "pods", "-o", "json").stdout)[0]["verified"] is None


def test_status_says_that_only_the_data_plane_serves_and_fails(orphan: Path) -> None:
    result = underpass(orphan, "status")
    assert result.exit_code == 1
    for part in (
        "Node node-a: agent away, data plane serving",
        "pid 77",
        "1 of 1 available",
        "1 served",
        "3 outbound",
        "rejected shop/bad: unknown action",
        "start the agent again",
    ):
        assert part in result.stdout


def leave_socket(run_dir: Path, node: str) -> None:
    """What a killed process leaves: a socket file that nobody listens on."""
    (run_dir / node).mkdir(parents=True)
    for name in ("admin.sock", "dataplane.sock") if node != "node-a" else ("admin.sock",):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(run_dir / node / name))
