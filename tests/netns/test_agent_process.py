"""The agent as a process over the real data plane: signals, adoption, refusals, what is left."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from agent.config import cgroup2_mount, load
from agent.dataplane import Dataplane
from agent.errors import ConfigErrors
from proto.gen import control_pb2
from tests.support.eventually import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_numbers = itertools.count(1)


def binary() -> Path:
    """Where the agent itself would find it."""
    try:
        found = load({"pods": "file:/x", "xds_file": "/x"}, os.environ).dataplane.binary
    except ConfigErrors as errors:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no data plane is built: {errors}")
    assert found is not None
    return found


class Node:
    """A network namespace with one pod in it, a local mesh file, and whoever runs there."""

    def __init__(self, folder: Path) -> None:
        self.name = f"up-agent-{os.getpid()}-{next(_numbers)}"
        self.folder = folder
        self.paths = folder / "run" / self.name
        self.log = folder / "log"
        self.processes: list[asyncio.subprocess.Process] = []
        self.binary = binary()
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        subprocess.run(["ip", "-n", self.name, "link", "set", "lo", "up"], check=True)
        pod = {"uid": "uid-a", "name": "a", "namespace": "shop", "netns": f"/run/netns/{self.name}"}
        (folder / "pods.yaml").write_text(json.dumps([pod]))
        workload = {
            "uid": "uid-a",
            "name": "a",
            "namespace": "shop",
            "serviceAccount": "default",
            "node": self.name,
            "workloadIps": ["10.0.0.1"],
            "protocol": "HBONE",
        }
        self.mesh = folder / "mesh.yaml"
        self.mesh.write_text(json.dumps({"workloads": [workload]}))
        # Where configuration comes from.
        self.source = [f"--xds-file={self.mesh}"]

    async def agent(self, *options: str) -> asyncio.subprocess.Process:
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "agent.cli.main",
                "agent",
                f"--node={self.name}",
                f"--run-dir={self.folder / 'run'}",
                f"--pods=file:{self.folder / 'pods.yaml'}",
                *self.source,
                "--stats-address=off",
                "--ready-address=off",
                "--admin-address=off",
                *options,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    async def status(self) -> dict[str, Any]:
        """{} while no agent answers."""
        connector = aiohttp.UnixConnector(str(self.paths / "admin.sock"))
        try:
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.get("http://agent/v1/status") as answer,
            ):
                found: dict[str, Any] = await answer.json()
                return found
        except (aiohttp.ClientError, OSError):
            return {}

    async def ready(self) -> int:
        """The data plane's pid, once the pod is captured and verified."""
        async with asyncio.timeout(30):
            while True:
                status = await self.status()
                if status.get("ready") and status["pods"]["verified"] == 1:
                    pid: int = status["dataplane"]["pid"]
                    return pid
                assert self.processes[-1].returncode is None, self.log.read_text()
                await asyncio.sleep(0.02)

    def leaves(self) -> list[str]:
        mount = cgroup2_mount()
        assert mount is not None
        parent = mount / "underpass" / self.name
        return sorted(entry.parent.name for entry in parent.glob("*/cgroup.procs"))

    def processes_of(self, leaf: str) -> list[int]:
        mount = cgroup2_mount()
        assert mount is not None
        try:
            found = (mount / "underpass" / self.name / leaf / "cgroup.procs").read_text()
        except OSError:
            return []
        return [int(pid) for pid in found.split()]

    def sockets(self) -> list[str]:
        return sorted(path.name for path in self.paths.glob("dataplane-*.sock"))

    def rules(self) -> str:
        enter = ["nsenter", f"--net=/run/netns/{self.name}", "nft", "list", "ruleset"]
        return subprocess.run(enter, capture_output=True, text=True, check=True).stdout

    def exempt(self) -> int:
        """Leaves that the pod's rules exempt."""
        return self.rules().count("socket cgroupv2")

    async def close(self) -> None:
        for process in self.processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
        mount = cgroup2_mount()
        assert mount is not None
        parent = mount / "underpass" / self.name
        for leaf in parent.glob("*/cgroup.procs"):
            for pid in leaf.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            await eventually(lambda leaf=leaf: _removed(leaf.parent))  # type: ignore[misc]
        with contextlib.suppress(OSError):
            parent.rmdir()
            parent.parent.rmdir()
        self._delete()

    def _delete(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=True)


def _removed(leaf: Path) -> bool:
    """A cgroup is busy until the last thread of a killed process is gone."""
    try:
        leaf.rmdir()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module", autouse=True)
def _sweep_crashed_runs() -> None:
    """Namespaces of test processes that are gone belong to nobody."""
    for path in Path("/run/netns").glob("up-agent-*-*"):
        if not Path(f"/proc/{path.name.split('-')[2]}").exists():
            subprocess.run(["ip", "netns", "del", path.name], check=True)


@pytest.fixture
async def node(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Node]:
    # Not named by the test: a socket's path has 107 bytes, and parallel runs have longer folders.
    made = Node(tmp_path_factory.mktemp("node"))
    yield made
    await made.close()


def alive(pid: int) -> bool:
    """A zombie whose parent was killed may be left to the reaper of this machine."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


async def test_term_ends_both_and_leaves_nothing_but_the_rules(node: Node) -> None:
    agent = await node.agent()
    pid = await node.ready()
    assert node.leaves() == ["dataplane-1"]
    agent.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(agent.wait(), 20) == 0
    assert not alive(pid)
    # What it says of rules outlives the agent as these do.
    assert [path.name for path in node.paths.iterdir()] == ["captured.json"]
    # Without a data plane a captured pod is closed, not bare.
    assert node.exempt() > 0


async def test_usr2_ends_the_agent_alone_and_the_next_one_finds_the_data_plane(node: Node) -> None:
    agent = await node.agent()
    pid = await node.ready()
    agent.send_signal(signal.SIGUSR2)
    assert await asyncio.wait_for(agent.wait(), 20) == 0
    assert alive(pid)
    observer = await Dataplane.connect(node.paths / "dataplane.sock", role="observer")
    assert [pod.pod.uid for pod in observer.hello.pods] == ["uid-a"]
    await observer.close()
    await node.agent()
    assert await node.ready() == pid


async def test_term_spares_a_data_plane_that_somebody_else_started(node: Node) -> None:
    socket = node.folder / "given.sock"
    dataplane = await asyncio.create_subprocess_exec(str(node.binary), "--socket", str(socket))
    try:
        agent = await node.agent(f"--dataplane-socket={socket}")
        assert await node.ready() == dataplane.pid
        problems = (await node.status())["problems"]
        assert any("no cgroup of its own" in problem["what"] for problem in problems)
        agent.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(agent.wait(), 20) == 0
        assert dataplane.returncode is None
        second = await node.agent(f"--dataplane-socket={socket}", "--ports-outbound=16001")
        await eventually(lambda: "outbound_port" in node.log.read_text(), what=node.log.read_text)
        second.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(second.wait(), 20) == 0
    finally:
        dataplane.kill()
        await dataplane.wait()


async def test_pod_that_leaves_while_no_agent_runs_is_set_free_by_the_next_one(node: Node) -> None:
    agent = await node.agent()
    await node.ready()
    agent.kill()
    await agent.wait()
    assert node.exempt() > 0
    (node.folder / "pods.yaml").write_text("[]")
    await node.agent()
    await eventually(lambda: node.rules() == "", what=node.log.read_text)
    await eventually(lambda: not (node.paths / "captured.json").exists())


async def test_hup_replaces_the_data_plane_and_the_old_exemption_goes(node: Node) -> None:
    agent = await node.agent()
    old = await node.ready()
    exempt = node.exempt()
    agent.send_signal(signal.SIGHUP)
    async with asyncio.timeout(30):
        while await node.ready() == old:
            await asyncio.sleep(0.02)
    await eventually(lambda: not alive(old), within=30)
    await eventually(lambda: node.leaves() == ["dataplane-2"], what=node.leaves)
    assert node.sockets() == ["dataplane-2.sock"]
    assert node.exempt() == exempt
    assert (node.paths / "dataplane.sock").readlink() == Path("dataplane-2.sock")


async def test_replacement_without_a_control_plane_is_refused_and_nothing_changes(
    node: Node,
) -> None:
    agent = await node.agent()
    old = await node.ready()
    node.mesh.unlink()
    async with asyncio.timeout(20):
        while not any("mesh.yaml" in p["what"] for p in (await node.status())["problems"]):
            await asyncio.sleep(0.02)
    agent.send_signal(signal.SIGHUP)
    await eventually(lambda: "data plane not replaced" in node.log.read_text(), within=20)
    assert await node.ready() == old
    assert node.leaves() == ["dataplane-1"]
    assert node.sockets() == ["dataplane-1.sock"]


async def test_of_two_data_planes_after_a_crash_the_one_that_serves_is_kept(node: Node) -> None:
    agent = await node.agent()
    serving = await node.ready()
    agent.kill()
    await agent.wait()
    mount = cgroup2_mount()
    assert mount is not None
    stray = await asyncio.create_subprocess_exec(
        str(node.binary),
        "--socket",
        str(node.paths / "dataplane-2.sock"),
        "--cgroup",
        str(mount / "underpass" / node.name / "dataplane-2"),
    )
    await eventually(lambda: (node.paths / "dataplane-2.sock").exists())
    await node.agent()
    assert await node.ready() == serving
    assert await asyncio.wait_for(stray.wait(), 30) == 0
    await eventually(lambda: node.leaves() == ["dataplane-1"], what=node.leaves)
    assert node.sockets() == ["dataplane-1.sock"]


async def test_binary_that_ends_at_once_is_named_and_not_started_without_pause(
    node: Node,
) -> None:
    await node.agent("--dataplane-bin=/bin/false")
    async with asyncio.timeout(20):
        while not (status := await node.status()):
            await asyncio.sleep(0.02)
        while not status["dataplane"]["error"]:
            await asyncio.sleep(0.02)
            status = await node.status()
    assert "/bin/false ended at start (exit status 1)" in status["dataplane"]["error"]
    assert status["ready"] is False
    problem = next(p for p in status["problems"] if "data plane" in p["what"])
    assert problem["remedy"]


async def test_dead_data_plane_comes_back_with_its_pods_and_the_absence_is_told(
    node: Node,
) -> None:
    await node.agent()
    first = await node.ready()
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(30):
        while (status := await node.status())["dataplane"]["seconds_without_service"] == 0:
            await asyncio.sleep(0.02)
    assert status["dataplane"]["restarts"] == 1
    second = await node.ready()
    assert second != first
    observer = await Dataplane.connect(node.paths / "dataplane.sock", role="observer")
    (pod,) = observer.hello.pods
    assert pod.state == control_pb2.PodStatus.UP
    await observer.close()
    assert node.leaves() == ["dataplane-1"]
