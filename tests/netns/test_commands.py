"""Commands against a real mesh: what they say is what its traffic shows."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from agent.cli.demo.clients import Conversation
from agent.cli.demo.mesh import access_lines
from agent.cli.demo.shop import ECHO_PORT
from agent.cli.demo.story import greets
from agent.cli.dump import SECTIONS
from tests.support.operator import ask, rows

if TYPE_CHECKING:
    from pathlib import Path

    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.shop import Shop

# facts ztunnel 13.1
VERSION = (
    *("version", "gitRevision", "rustVersion", "buildProfile", "buildStatus"),
    *("istioVersion", "cryptoProvider"),
)
pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_levels_change_live_and_return(mesh: Mesh, shop: Shop) -> None:
    node = shop.web.sandbox.node

    def lines() -> int:
        return len(access_lines(mesh.log(node.name), 'direction="outbound"', 'dst.workload="db"'))

    said = await ask(mesh.run_dir, node.name, "log", "set", "access=off")
    assert (said.code, said.text.splitlines()[0]) == (0, "info,access=off")
    before = lines()
    assert await greets(shop.web, shop.db)
    assert await greets(shop.web, shop.db)
    assert (await ask(mesh.run_dir, node.name, "log", "reset")).text.strip() == "info"
    assert await greets(shop.web, shop.db)
    await mesh.until("the line of the last one alone", lambda: lines() == before + 1)
    refused = await ask(mesh.run_dir, node.name, "log", "set", "loud")
    assert refused.code == 1
    assert refused.tells("'loud' is no directive", "for example underpass=debug")


async def test_follow_shows_a_connection_come_and_go(mesh: Mesh, shop: Shop) -> None:
    node = shop.web.sandbox.node
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent.cli.main", f"--run-dir={mesh.run_dir}"),
        *(f"--node={node.name}", "connections", "--follow", "--pod", "web", "-o", "json"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:

        async def event(what: str, source: str) -> dict[str, Any]:
            assert process.stdout is not None
            async with asyncio.timeout(20):
                while True:
                    line: dict[str, Any] = json.loads(await process.stdout.readline())
                    if line["event"] == what and line["src"] == source:
                        return line

        async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
            assert await talk.echo("something")
            local = talk._streams[1].get_extra_info("sockname")
            source = f"{local[0]}:{local[1]}"
            opened = await event("opened", source)
            assert opened["dst_workload"] == "db"
            assert opened["direction"] == "outbound"
        assert (await event("closed", source))["id"] == opened["id"]
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_dump_holds_everything_with_and_without_an_agent(
    mesh: Mesh, shop: Shop, tmp_path: Path
) -> None:
    node = shop.db.sandbox.node
    file = tmp_path / "dump.json"
    said = await ask(mesh.run_dir, node.name, "dump", "-f", str(file))
    assert (said.code, said.text) == (0, "")
    whole = json.loads(file.read_text())
    assert tuple(whole) == SECTIONS
    assert {"db", "web"} <= {row["name"] for row in whole["workloads"]}
    assert whole["workloadState"][shop.db.uid]["state"] == "Up"
    assert whole["config"]["localNode"] == node.name
    version = whole["version"]
    assert list(version) == sorted(VERSION)
    assert version["rustVersion"].startswith("rustc ")
    assert version["buildProfile"] in ("debug", "release")
    # A tree without its repository knows no revision.
    assert re.fullmatch("[0-9a-f]{40}|unknown", version["gitRevision"])
    section = await ask(mesh.run_dir, node.name, "dump", "services")
    assert {row["name"] for row in json.loads(section.text)} == {"api", "db"}
    assert "PRIVATE KEY" not in file.read_text()

    await mesh.kill(node.name)
    said = await ask(mesh.run_dir, node.name, "dump", "-f", str(file))
    assert said.code == 0
    assert said.tells(f"The agent of {node.name} is away", "left out", "config, staticConfig")
    without = json.loads(file.read_text())
    assert without["workloads"] == whole["workloads"]
    assert without["version"] == version
    await mesh.start_agent(node)
    await mesh.settled()


async def test_wide_services_name_each_endpoint(mesh: Mesh, shop: Shop) -> None:
    node = shop.web.sandbox.node
    found = await rows(mesh.run_dir, node.name, "services")
    assert {row["name"] for row in found} == {"api", "db"}
    said = await ask(mesh.run_dir, node.name, "services", "-o", "wide")
    assert said.tells(f"shop/db {shop.db.sandbox.ipv4}, {shop.db.sandbox.ipv6} healthy")
