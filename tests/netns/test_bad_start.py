"""Agents that can't do their work from the start: capabilities, nft, sockets of somebody else."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from proto.gen import control_pb2
from tests.netns.test_agent_process import Node, alive, node
from tests.support.eventually import eventually
from tests.support.fake_dataplane import FakeDataplane
from tests.support.operator import Said, ask, command

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["node"]


def arguments(node: Node, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "agent.cli.main", "agent"),
        *(f"--node={node.name}", f"--run-dir={node.folder / 'run'}"),
        *(f"--pods=file:{node.folder / 'pods.yaml'}", f"--xds-file={node.mesh}"),
        *("--stats-address=off", "--ready-address=off", "--admin-address=off", *options),
    ]


def without(*capabilities: str) -> list[str]:
    lacking = ",".join(f"-{name}" for name in capabilities)
    return ["setpriv", f"--bounding-set={lacking}", f"--inh-caps={lacking}"]


async def status_that_tells(node: Node, *parts: str) -> Said:
    """The first `underpass status` that holds all parts."""
    end = asyncio.get_running_loop().time() + 40
    while True:
        said = await ask(node.folder / "run", node.name, "status")
        if said.tells(*parts):
            return said
        assert node.processes[-1].returncode is None, node.log.read_text()
        assert asyncio.get_running_loop().time() < end, said.text


@pytest.mark.parametrize("lacking", ["sys_admin", "net_admin"])
async def test_agent_without_a_capability_names_it_and_touches_nothing(
    node: Node, lacking: str
) -> None:
    said = await command(*without(lacking), *arguments(node))
    assert said.code == 1
    assert said.tells(f"CAP_{lacking.upper()}", "not permitted")
    assert "Traceback" not in said.text
    assert node.rules() == ""
    assert node.sockets() == []


@pytest.mark.parametrize("lacking", [("sys_admin",), ("net_admin", "net_raw")])
async def test_data_plane_without_a_capability_does_not_start_and_leaves_the_pod_bare(
    node: Node, lacking: tuple[str, ...]
) -> None:
    wrapper = node.folder / "dataplane"
    wrapper.write_text(f'#!/bin/sh\nexec {" ".join(without(*lacking))} {node.binary} "$@"\n')
    wrapper.chmod(0o755)
    await node.agent(f"--dataplane-bin={wrapper}")
    said = await status_that_tells(node, "exit status 69", "CAP_SYS_ADMIN", "0 of 1 captured")
    assert said.code == 1
    assert said.tells("NOT READY, waiting for data plane", "CAP_NET_ADMIN")
    assert f"CAP_{lacking[0].upper()}" in node.log.read_text()
    assert node.rules() == ""


@pytest.mark.parametrize(
    ("library", "told"),
    [
        ("raise ImportError('no such library')", "python3-nftables"),
        (
            "class Nftables:\n"
            "  def __getattr__(self, name):\n"
            "    return lambda *_: (1, '', 'Error: Could not process rule: '\n"
            "                       'Operation not supported\\n')\n",
            "load nft_chain_nat",
        ),
    ],
)
async def test_node_whose_nftables_does_not_work_is_told_what_to_install(
    node: Node, library: str, told: str
) -> None:
    shim = node.folder / "shim"
    shim.mkdir()
    (shim / "nftables.py").write_text(library)
    path = os.pathsep.join([str(shim), os.environ.get("PYTHONPATH", os.getcwd())])
    said = await command(*arguments(node), env=os.environ | {"PYTHONPATH": path})
    assert said.code == 1
    assert said.tells(told, "--capture none")
    assert "Traceback" not in said.text
    assert node.sockets() == []


async def test_second_agent_of_a_node_names_the_first_and_leaves_it_alone(node: Node) -> None:
    first = await node.agent()
    dataplane = await node.ready()
    second = await command(*arguments(node))
    assert second.code == 1
    assert second.tells(f"another agent of this node runs, process {first.pid}")
    assert first.returncode is None
    assert await node.ready() == dataplane


async def test_files_of_a_dead_agent_and_data_plane_are_no_obstacle(node: Node) -> None:
    first = await node.agent()
    dataplane = await node.ready()
    os.kill(first.pid, signal.SIGKILL)
    await first.wait()
    os.kill(dataplane, signal.SIGKILL)
    await eventually(lambda: not alive(dataplane))
    left = {path.name for path in node.paths.iterdir()}
    assert {"agent.pid", "admin.sock", "dataplane-1.sock"} <= left
    # As after a reboot: the number belongs to somebody else now.
    (node.paths / "agent.pid").write_text("1\n")
    await node.agent()
    assert await node.ready() != dataplane
    assert node.leaves() == ["dataplane-1"]


@pytest.mark.parametrize(
    ("code", "text", "remedy"),
    [
        (
            control_pb2.Error.VERSION,
            "the data plane speaks version 2 of the protocol, the agent 1",
            "agent and data plane of the same release",
        ),
        (
            control_pb2.Error.IN_USE,
            "another agent (pid 4711) is connected; stop it first",
            "stop the other agent",
        ),
    ],
)
async def test_data_plane_that_refuses_this_agent_is_told_with_its_remedy(
    node: Node, code: Any, text: str, remedy: str
) -> None:
    given = node.folder / "given.sock"
    async with FakeDataplane(given) as fake:
        fake.hello_error = control_pb2.Error(code=code, text=text)
        agent = await node.agent(f"--dataplane-socket={given}")
        said = await status_that_tells(node, text, remedy)
        assert said.code == 1
        assert said.tells("NOT READY, waiting for data plane")
        assert node.rules() == ""
        agent.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await agent.wait() == 0


async def greeted_by_a_web_server(given: Path) -> asyncio.Server:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    return await asyncio.start_unix_server(answer, given)


async def test_socket_of_another_program_is_told_apart(node: Node) -> None:
    given = node.folder / "given.sock"
    async with await greeted_by_a_web_server(given):
        await node.agent(f"--dataplane-socket={given}")
        said = await status_that_tells(node, "no data plane listens there", str(given))
        assert said.code == 1
    assert given.exists()


@pytest.mark.parametrize("moment", ["start", "replacement"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
async def test_signal_in_the_middle_of_a_change_leaves_no_data_plane_behind(
    node: Node, moment: str, number: signal.Signals
) -> None:
    agent = await node.agent()
    if moment == "start":
        await eventually(lambda: node.sockets() != [], within=30, what=node.log.read_text)
    else:
        await node.ready()
        agent.send_signal(signal.SIGHUP)
        await eventually(lambda: len(node.sockets()) == 2, within=30, what=node.log.read_text)
    agent.send_signal(number)
    async with asyncio.timeout(30):
        assert await agent.wait() == 0
    if number == signal.SIGTERM:
        assert node.sockets() == []
        assert node.leaves() == []
    else:
        await node.agent()
        await node.ready()
        await eventually(lambda: len(node.leaves()) == 1, within=30, what=node.leaves)
        assert len(node.sockets()) == 1


async def test_second_signal_cuts_what_still_drains(node: Node) -> None:
    agent = await node.agent("--dataplane-drain-deadline=60s")
    dataplane = await node.ready()
    # One that doesn't react to a request to drain.
    os.kill(dataplane, signal.SIGSTOP)
    agent.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.3)
    assert agent.returncode is None
    for repeated in (signal.SIGHUP, signal.SIGUSR2, signal.SIGTERM):
        agent.send_signal(repeated)
    async with asyncio.timeout(15):
        assert await agent.wait() == 0
    assert not alive(dataplane)
    assert node.leaves() == []


async def test_data_plane_that_hangs_is_told_at_once(node: Node) -> None:
    await node.agent()
    dataplane = await node.ready()
    os.kill(dataplane, signal.SIGSTOP)
    try:
        said = await status_that_tells(node, "the data plane doesn't answer", "end it if it hangs")
        assert said.code == 1
    finally:
        os.kill(dataplane, signal.SIGCONT)
    assert await node.ready() == dataplane


@pytest.mark.parametrize("victim", ["dataplane-1", "dataplane-2"])
async def test_data_plane_that_dies_during_a_replacement_costs_no_patience(
    node: Node, victim: str
) -> None:
    agent = await node.agent()
    old = await node.ready()
    agent.send_signal(signal.SIGHUP)
    await eventually(lambda: node.processes_of(victim) and len(node.leaves()) == 2, within=30)
    for pid in node.processes_of(victim):
        os.kill(pid, signal.SIGKILL)
    # Whoever of the two is left, or their successor, has the pod; nobody waits for the dead.
    await eventually(lambda: not node.processes_of(victim), within=15)
    async with asyncio.timeout(20):
        while not alive(serving := await node.ready()):
            await asyncio.sleep(0.02)
    await eventually(lambda: len(node.leaves()) == 1, within=15, what=node.leaves)
    if victim == "dataplane-1":
        assert serving != old
    assert (await status_that_tells(node, "1 verified")).tells("serving")
