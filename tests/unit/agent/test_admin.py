"""The agent's HTTP faces, its claim on a node, and what it calls wrong."""

import asyncio
import dataclasses
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agent import problems, slices
from agent.admin.metrics import END, joined
from agent.admin.servers import Servers
from agent.claim import claimed
from agent.errors import NodeClaimed, PortInUse, ReplaceRefused
from agent.feed import Feed
from agent.levels import Levels
from agent.pods.choice import PodSourceChoice
from agent.pods.file import FileSource
from agent.pods.reconciler import Reconciler
from agent.report import Report
from agent.slices import RunPaths
from agent.status import (
    CaptureView,
    CertificateView,
    ControlPlaneView,
    DataplaneView,
    PodView,
    TypeView,
    plain,
)
from agent.supervisor import Supervisor
from agent.values import Listen
from agent.xds.local import LocalFile
from proto.gen import control_pb2
from redirect.base import CaptureConfig
from tests.support.fake_dataplane import FakeConnection, FakeDataplane


class Node:
    """An agent's parts over a fake data plane, with its servers bound to free ports."""

    def __init__(self, folder: Path) -> None:
        self.paths = RunPaths(folder)
        self.socket = folder / "given.sock"
        pods = FileSource(folder / "pods.yaml")
        source = LocalFile(folder / "mesh.yaml")
        self.reconciler = Reconciler(None, verify_interval=timedelta(seconds=1))
        self.feed = Feed(source, None, self.reconciler, CaptureConfig())
        self.supervisor = Supervisor(
            slices.DataplaneProcess(socket=self.socket),
            self.paths,
            control_pb2.InstanceConfig(node="n1"),
            self.feed,
        )
        self.report = Report(
            "n1",
            CaptureView("none"),
            pods,
            source,
            None,
            self.reconciler,
            self.feed,
            self.supervisor,
        )
        local = Listen("127.0.0.1", 0)
        self.config = slices.Config(
            node=slices.Node("n1"),
            paths=self.paths,
            pods=PodSourceChoice("file", folder / "pods.yaml"),
            capture=slices.Capture(mode="none"),
            source=slices.Source(file=folder / "mesh.yaml"),
            authority=None,
            dataplane=slices.DataplaneProcess(socket=self.socket),
            servers=slices.Servers(stats=local, ready=local, admin=Listen("localhost", 0)),
            log=slices.Log(),
            limits=slices.Limits(),
        )
        self.ended = asyncio.Event()
        self.servers = self.serving(self.config.servers)

    def serving(self, servers: slices.Servers) -> Servers:
        config = dataclasses.replace(self.config, servers=servers)
        levels = Levels(slices.Log(), self.supervisor)
        replace = self.supervisor.replace
        return Servers(config, self.report, levels, replace, self.ended.set)

    async def admin(self, path: str, method: str = "GET") -> tuple[int, Any]:
        connector = aiohttp.UnixConnector(str(self.paths.admin_socket))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(method, f"http://agent{path}") as answer,
        ):
            return answer.status, await answer.json()

    async def get(self, server: str, path: str, method: str = "GET") -> tuple[int, str]:
        url = f"http://{self.servers.bound[server]}{path}"
        async with aiohttp.ClientSession() as session, session.request(method, url) as answer:
            return answer.status, await answer.text()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path)
    async with made.servers:
        yield made
    await made.reconciler.close()
    await made.feed.close()
    await made.supervisor.close()


async def answer(connection: FakeConnection, request: control_pb2.Request, _: list[int]) -> None:
    """A data plane with some metrics, one connection and one workload."""
    match request.WhichOneof("body"):
        case "get_metrics":
            await connection.reply(request, more=True, chunk=control_pb2.Chunk(data=b"a 1\n# E"))
            await connection.reply(request, chunk=control_pb2.Chunk(data=b"OF\n"))
        case "list_connections":
            one = control_pb2.Connection(id=7, src="10.0.0.1:5", direction="OUTBOUND")
            reply = control_pb2.ConnectionsReply(connections=[one])
            await connection.reply(request, connections=reply)
        case "dump" if request.dump.section == "workloads":
            await connection.reply(request, more=True, chunk=control_pb2.Chunk(data=b'[{"uid":'))
            await connection.reply(request, chunk=control_pb2.Chunk(data=b'"u"}]'))
        case "dump":
            error = control_pb2.Error(code="INVALID", subject="dump", text="no such section")
            await connection.reply(request, error=error)
        case "list_pods":
            await connection.reply(request, pods=control_pb2.PodsReply())
        case _:
            await connection.reply(request, done=control_pb2.Done())


@pytest.fixture
async def served(node: Node) -> AsyncIterator[Node]:
    """The same with a data plane that knows the mesh."""
    async with FakeDataplane(node.socket, answer) as fake:
        fake.hello.synced = True
        running = asyncio.create_task(node.supervisor.run())
        while node.report.dataplane is None:
            await asyncio.sleep(0.01)
        yield node
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_node_without_data_plane_says_what_it_waits_for(node: Node) -> None:
    code, text = await node.get("ready", "/healthz/ready")
    assert (code, text) == (500, "not ready, pending: data plane, control plane, pods\n")
    assert (await node.get("ready", "/healthz/ready", "POST"))[0] == 405


async def test_ready_is_answered_in_upstreams_words(served: Node) -> None:
    (served.paths.root / "pods.yaml").write_text("[]")
    following = asyncio.create_task(served.reconciler.follow(FileSource(
        served.paths.root / "pods.yaml").events()))  # fmt: skip
    while served.report.pending():
        await asyncio.sleep(0.01)
    assert await served.get("ready", "/healthz/ready") == (200, "ready\n")
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def test_metrics_of_both_processes_are_one_document(served: Node) -> None:
    for path in ("/metrics", "/stats/prometheus"):
        code, text = await served.get("stats", path)
        assert code == 200
        assert text.startswith("a 1\n")
        assert "underpass_agent_dataplane_up 1.0" in text
        assert text.count("# EOF") == 1
        assert text.endswith("# EOF\n")


async def test_metrics_go_on_without_a_data_plane(node: Node) -> None:
    code, text = await node.get("stats", "/metrics")
    assert code == 200
    assert "underpass_agent_dataplane_up 0.0" in text


async def test_status_is_one_json_object_with_problems_and_remedies(node: Node) -> None:
    code, status = await node.admin("/v1/status")
    assert code == 200
    assert status["node"] == "n1"
    assert status["ready"] is False
    assert all(set(entry) == {"what", "why", "remedy"} for entry in status["problems"])
    assert any("ca.address" in entry["why"] for entry in status["problems"])


async def test_connections_and_dumps_pass_through(served: Node) -> None:
    code, connections = await served.admin("/v1/connections")
    assert code == 200
    assert [(row["id"], row["direction"]) for row in connections] == [(7, "outbound")]
    assert await served.admin("/v1/workloads") == (200, [{"uid": "u"}])


async def test_refusal_of_the_data_plane_is_told_not_cut_off(served: Node) -> None:
    code, body = await served.admin("/v1/policies")
    assert code == 503
    assert "no such section" in body["error"]


async def test_log_levels_are_shown_changed_and_reset(served: Node) -> None:
    code, shown = await served.admin("/v1/log")
    assert (code, shown["filter"], shown["dataplane"]) == (200, "info", True)
    code, changed = await served.admin("/v1/log?set=access%3Doff", "POST")
    assert (code, changed["filter"]) == (200, "info,access=off")
    code, body = await served.admin("/v1/log?set=loud", "POST")
    assert code == 400
    assert "'loud' is no directive" in body["error"]
    assert (await served.admin("/v1/log"))[1]["filter"] == "info,access=off"
    assert (await served.admin("/v1/log?reset", "POST"))[1]["filter"] == "info"


async def test_replacing_a_given_data_plane_is_refused_with_reason(served: Node) -> None:
    code, body = await served.admin("/v1/dataplane/replace", "POST")
    assert code == 409
    assert "started by somebody else" in body["error"]
    with pytest.raises(ReplaceRefused):
        await served.supervisor.replace()


async def test_admin_socket_is_for_its_owner_and_replaces_a_stale_one(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.paths.admin_socket.write_text("stale")
    async with node.servers:
        assert stat.S_IMODE(node.paths.admin_socket.stat().st_mode) == 0o600
        assert (await node.admin("/v1/pods")) == (200, [])
    assert not node.paths.admin_socket.exists()


async def test_taken_port_is_named_and_nothing_stays_bound(node: Node, tmp_path: Path) -> None:
    host, _, port = node.servers.bound["stats"].rpartition(":")
    second = Node(tmp_path / "second")
    second.paths.root.mkdir()
    taken = slices.Servers(stats=Listen(host, int(port)), ready=None)
    second.servers = second.serving(taken)
    with pytest.raises(PortInUse, match=f"stats on {host}:{port}: Address already in use"):
        async with second.servers:
            pass
    assert not second.paths.admin_socket.exists()


@pytest.mark.parametrize("split", range(len(END) + 5))
async def test_end_mark_is_removed_wherever_chunks_are_split(split: int) -> None:
    text = b"a 1\n" + END

    async def chunks() -> AsyncIterator[bytes]:
        yield text[:split]
        yield text[split:]

    whole = b"".join([chunk async for chunk in joined(chunks(), b"b 2\n" + END)])
    assert whole == b"a 1\nb 2\n" + END


def test_second_agent_of_a_node_is_told_the_pid_of_the_first(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "n1")
    with claimed(paths):
        program = (
            "import sys; from pathlib import Path; from agent.claim import claimed;"
            "from agent.slices import RunPaths\n"
            "with claimed(RunPaths(Path(sys.argv[1]))): pass"
        )
        second = subprocess.run(
            [sys.executable, "-c", program, str(paths.root)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"another agent of this node runs, process {os.getpid()}" in second.stderr
        assert NodeClaimed.__name__ in second.stderr
    with claimed(paths):
        pass


def test_claim_on_a_file_that_its_former_owner_just_removed_is_made_anew(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    real, opened = os.open, []

    def open_and_lose(path: Any, *rest: Any) -> int:
        fd = real(path, *rest)
        opened.append(fd)
        if len(opened) == 1:
            paths.pid_file.unlink()
        return fd

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", open_and_lose)
        with claimed(paths):
            assert paths.pid_file.read_text() == f"{os.getpid()}\n"
    assert len(opened) == 2


def test_problems_name_what_why_and_remedy() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    away = DataplaneView(state="away", error="it ended")
    rejecting = ControlPlaneView(
        "cp:1",
        True,
        types={"type.googleapis.com/istio.security.Authorization": TypeView(True, {"p": "bad"})},
    )
    expiring = CertificateView(
        "spiffe://i", "Available", now, now + timedelta(minutes=5), last_error="503"
    )
    none = CertificateView("spiffe://j", "Unavailable", last_error="denied")
    failed = PodView(
        "u", "a", "shop", "sa", "/x", "failed", False, False, problem="gone", remedy="fix"
    )
    found = [
        *problems.dataplane_problems(away),
        *problems.control_plane_problems(rejecting, synced=True),
        *problems.certificate_problems([expiring, none], now),
        *problems.pod_problems([failed]),
        *problems.control_plane_problems(ControlPlaneView("cp:1", False), synced=False),
    ]
    assert [entry.what for entry in found] == [
        "data plane is away: captured pods' connections are refused",
        "Authorization p was rejected",
        "the certificate of spiffe://i isn't renewed, it serves until 00:05 UTC",
        "no certificate for spiffe://j: its connections are refused",
        "pod shop/a",
        "control plane cp:1",
    ]
    assert all(entry.why and entry.remedy for entry in found)


def test_nothing_is_wrong_when_all_is_well() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    well = DataplaneView(state="serving", instance_id="i", pid=3, cgroup="/c")
    fresh = CertificateView("spiffe://i", "Available", now, now + timedelta(hours=20))
    assert problems.dataplane_problems(well) == []
    assert problems.certificate_problems([fresh], now) == []
    assert problems.control_plane_problems(ControlPlaneView("cp", True), synced=True) == []
    assert problems.dataplane_problems(dataclasses.replace(well, cgroup="")) != []


def test_plain_values_are_what_json_has() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    view = DataplaneView("serving", since=now, draining=(1, 2))
    assert plain(view) == {
        **dataclasses.asdict(view),
        "since": "2026-01-01T00:00:00+00:00",
        "draining": [1, 2],
    }
