"""`--capture auto` takes eBPF where the node can and says why not elsewhere; a program of somebody
else that runs before ours is told, whenever it comes."""

from __future__ import annotations

import asyncio
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from agent.cli.demo.clients import http_get
from agent.cli.demo.manifests import Pod, namespace
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.shop import HTTP_PORT, NAMESPACE, serve_http
from agent.cli.demo.world import BPF_FOLDER, World, cgroup2_mounts
from tests.support.foreign_program import NAME, foreign_program
from tests.support.probe import probe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from agent.cli.demo.world import Node

pytestmark = pytest.mark.asyncio(loop_scope="module")

DRAIN = "--dataplane-drain-deadline=500ms"
REMEDY = "attach it to the root cgroup, where it runs after ours, or capture by nftables"


@pytest.fixture(scope="module")
def pods_cgroup(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue("_pods_cgroup")
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    new_prefix: Callable[[], str], pods_cgroup: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    """One node with a client and a server; its agent isn't started yet."""
    folder = tmp_path_factory.mktemp("choice")
    world = World(new_prefix(), nodes=1)
    world.up()
    options = (f"--pods-cgroup={pods_cgroup}", "--verify-interval=500ms", DRAIN)
    made = Mesh(world, folder, folder / "run", agent_options=options)
    made.prepare()
    (node,) = world.nodes
    pods = [Pod(world.add_pod(node, name), NAMESPACE, name) for name in ("web", "api")]
    made.apply("namespace", namespace(NAMESPACE))
    made.add(*pods)
    await serve_http(made, pods[1])
    await made.start_control_plane()
    yield made
    world.down()
    for process in made.processes.values():
        await process.wait()


@pytest.fixture(scope="module")
def node(mesh: Mesh) -> Node:
    return mesh.world.nodes[0]


async def answered(mesh: Mesh) -> bool:
    web, api = mesh.pods
    return "api sees" in await http_get(web, api.sandbox.ipv4, HTTP_PORT)


async def ended(mesh: Mesh, node: Node) -> str:
    """The log of an agent that can't start."""
    async with asyncio.timeout(20):
        code = await mesh.processes.pop(node.name).wait()
    assert code == 1
    return mesh.log(node.name).read_text()


async def captured_by(mesh: Mesh, node: Node) -> dict[str, Any]:
    found: dict[str, Any] = (await mesh.admin(node, "status"))["capture"]
    return found


async def test_behind_somebody_elses_program_auto_takes_nftables_and_says_why(
    mesh: Mesh, node: Node, pods_cgroup: Path
) -> None:
    with foreign_program(pods_cgroup):
        await mesh.start_agent(node)
        await mesh.settled()
        found = await captured_by(mesh, node)
        assert found["mode"] == "nftables"
        assert found["reason"].startswith("not by eBPF: no other program first: the program")
        assert f"{NAME} (id " in found["reason"]
        assert f" on {pods_cgroup} runs before ours at connect4" in found["reason"]
        assert REMEDY in found["reason"]
        assert found["notes"] == []
        assert "mode=nftables why=" in mesh.log(node.name).read_text()
        assert await answered(mesh)
    # The next agent is to find a node that nobody captured on.
    pods = [*mesh.pods]
    for pod in pods:
        mesh.remove(pod)
    await mesh.settled()
    await mesh.kill(node.name, signal.SIGTERM)
    mesh.add(*pods)


async def test_auto_takes_ebpf_where_the_node_can(mesh: Mesh, node: Node) -> None:
    await mesh.start_agent(node)
    await mesh.settled()
    found = await captured_by(mesh, node)
    assert (found["mode"], found["reason"]) == ("ebpf", "the node has all that it needs")
    assert await answered(mesh)


async def test_a_program_after_ours_is_fine_one_below_is_told_at_the_pods(
    mesh: Mesh, node: Node, pods_cgroup: Path
) -> None:
    (mount, *_) = cgroup2_mounts()
    own = str(BPF_FOLDER / node.name)
    below = pods_cgroup / "a-pod"
    below.mkdir()

    async def problems() -> list[str]:
        pods = await mesh.admin(node, "pods")
        return [row["problem"] for row in pods if not row["verified"]]

    async def told() -> bool:
        return len(await problems()) == 2

    async def proved() -> bool:
        return not await problems()

    with foreign_program(pods_cgroup):
        # An agent that starts now keeps its programs' places; another node's would come too late.
        for folder, code in ((own, 0), (f"{own}-other", 69)):
            assert probe(pods_cgroup, mount / "underpass" / node.name, folder)[0] == code
        with foreign_program(below):
            await mesh.until("both pods to be not proved", told, node.name, seconds=15)
            (problem, _) = await problems()
            assert f"the program {NAME} (id " in problem
            assert f" on {below} runs before ours at connect4" in problem
            assert REMEDY in problem
        await mesh.until("both pods to be proved again", proved, node.name, seconds=15)
    below.rmdir()


async def test_asked_for_it_refuses_to_start_and_says_why(
    mesh: Mesh, node: Node, pods_cgroup: Path
) -> None:
    await mesh.kill(node.name, signal.SIGTERM)
    # Or its programs would come first, by the links that an earlier data plane left.
    shutil.rmtree(BPF_FOLDER / node.name)
    mesh.agent_options = (*mesh.agent_options, "--capture=ebpf")
    with foreign_program(pods_cgroup):
        await mesh.start_agent(node)
        said = await ended(mesh, node)
    assert "agent can't run" in said
    assert f"ebpf: no other program first: the program {NAME} (id " in said
    assert REMEDY in said
