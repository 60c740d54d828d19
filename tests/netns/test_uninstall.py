"""`underpass uninstall`: no trace stays, whatever had become of the instance before."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from agent.config import cgroup2_mount
from tests.netns.test_agent_process import Node, alive, node
from tests.netns.test_lifecycle import rules_of
from tests.support.eventually import eventually
from tests.support.operator import Said, ask, command

__all__ = ["node"]


async def uninstall(node: Node, *options: str) -> Said:
    return await ask(node.folder / "run", node.name, "uninstall", *options)


def cgroup(node: Node) -> Path:
    mount = cgroup2_mount()
    assert mount is not None
    return mount / "underpass" / node.name


def traces(node: Node) -> list[str]:
    """Everything that an instance can leave on the machine."""
    left = [rules_of(node.name)] if rules_of(node.name) else []
    return left + [str(path) for path in (node.paths, cgroup(node)) if path.exists()]


async def kill_everything(node: Node) -> None:
    dataplane = await node.ready()
    node.processes[-1].kill()
    await node.processes[-1].wait()
    os.kill(dataplane, signal.SIGKILL)
    await eventually(lambda: not alive(dataplane))


async def test_nothing_is_left_after_everything_was_killed(node: Node) -> None:
    assert traces(node) == []
    await node.agent()
    await kill_everything(node)
    assert len(traces(node)) == 3
    said = await uninstall(node, "--yes")
    assert said.code == 0, said.text
    assert said.tells(
        f"removed capture of shop/a in /run/netns/{node.name}",
        f"removed cgroup {cgroup(node)}/dataplane-1",
        f"removed folder {node.paths}",
    )
    assert traces(node) == []
    again = await uninstall(node, "--yes")
    assert (again.code, again.text.strip()) == (
        0,
        f"Nothing of node {node.name} is on this machine.",
    )


async def test_a_running_node_is_left_alone_unless_forced(node: Node) -> None:
    agent = await node.agent()
    dataplane = await node.ready()
    before = traces(node)
    said = await uninstall(node, "--yes")
    assert said.code == 1
    assert said.tells(f"agent, process {agent.pid}", f"data plane, process {dataplane}", "--force")
    assert await node.ready() == dataplane
    assert traces(node) == before
    said = await uninstall(node, "--yes", "--force")
    assert said.code == 0, said.text
    assert said.tells(f"ended agent, process {agent.pid}")
    assert await asyncio.wait_for(agent.wait(), 5) == 0
    assert not alive(dataplane)
    assert traces(node) == []


async def test_force_ends_a_data_plane_whose_agent_and_socket_are_gone(node: Node) -> None:
    agent = await node.agent()
    dataplane = await node.ready()
    agent.kill()
    await agent.wait()
    (node.paths / "dataplane-1.sock").unlink()
    assert (await uninstall(node, "--yes")).tells(f"data plane, process {dataplane}")
    assert alive(dataplane)
    assert (await uninstall(node, "--yes", "--force")).code == 0
    assert not alive(dataplane)
    assert traces(node) == []


async def test_it_asks_first_and_a_no_changes_nothing(node: Node) -> None:
    await node.agent()
    await kill_everything(node)
    before = traces(node)
    arguments = ["-m", "agent.cli.main", f"--run-dir={node.folder / 'run'}", "uninstall"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments, "--node", node.name),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    out, _ = await process.communicate(b"n\n")
    assert process.returncode == 1
    assert b"capture of shop/a" in out
    assert b"it will be bare" in out
    assert b"Remove all of it?" in out
    assert traces(node) == before


async def test_a_namespace_that_lost_its_name_is_found_by_those_who_live_in_it(node: Node) -> None:
    await node.agent()
    await kill_everything(node)
    enter = ["nsenter", f"--net=/run/netns/{node.name}", "sleep", "300"]
    app = await asyncio.create_subprocess_exec(*enter)
    lives = Path(f"/proc/{app.pid}/ns/net")
    wanted = Path(f"/run/netns/{node.name}").stat().st_ino
    await eventually(lambda: lives.stat().st_ino == wanted)
    try:
        assert (await command("ip", "netns", "del", node.name)).code == 0
        assert (await uninstall(node, "--yes")).code == 0
        assert await command("nsenter", f"--net={lives}", "nft", "list", "ruleset") == Said(0, "")
    finally:
        app.kill()
        await app.wait()
        # The fixture takes it away by its name.
        assert (await command("ip", "netns", "add", node.name)).code == 0


async def test_what_is_not_ours_stays_and_is_named(node: Node) -> None:
    await node.agent()
    await kill_everything(node)
    note = node.paths / "note.txt"
    note.write_text("of the operator")
    guest = await asyncio.create_subprocess_exec("sleep", "300")
    (cgroup(node) / "dataplane-1" / "cgroup.procs").write_text(str(guest.pid))
    try:
        said = await uninstall(node, "--yes", "--force")
        assert said.code == 1
        assert said.tells("dataplane-1: is still in use", "stays, with note.txt")
        assert guest.returncode is None
        assert rules_of(node.name) == ""
        assert [path.name for path in node.paths.iterdir()] == ["note.txt"]
    finally:
        guest.kill()
        await guest.wait()


async def test_a_list_of_pods_that_cannot_be_read_is_no_success(node: Node) -> None:
    await node.agent()
    await kill_everything(node)
    ledger = node.paths / "captured.json"
    ledger.write_text("{ torn")
    said = await uninstall(node, "--yes")
    assert said.code == 1
    assert said.tells(str(ledger), "nft delete table inet underpass")
    assert ledger.exists()
