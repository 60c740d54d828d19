"""The kubelet's probes under capture by eBPF: what its cgroup dials from the node reaches declared
ports of STRICT pods as if there were no mesh, and nothing else does."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent.cli.demo.cgroup import folder
from agent.cli.demo.mesh import Mesh, access_lines
from agent.cli.demo.netns import inside
from agent.cli.demo.shop import ECHO_PORT
from agent.cli.demo.world import remove_cgroup
from tests.netns.test_traffic import metrics
from tests.support.intruder import run
from tests.support.meshes import mesh_of
from tests.support.probed import FAMILIES, UNDECLARED_PORT, dial, probed_pod
from tests.support.sysctl import always_cookies

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.world import Node, World

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.modes("ebpf")]

FIXED_PORT = 41_007


@pytest.fixture(scope="module")
def kubelet() -> Iterator[Path]:
    """A cgroup beside the pods'."""
    made = folder(f"underpass-tests-kubelet-{os.getpid()}")
    assert made is not None, "no cgroup2 is mounted"
    made.mkdir()
    yield made
    remove_cgroup(made)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, kubelet: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    options = (f"--kubelet-cgroup={kubelet}", "--verify-interval=500ms")
    async with mesh_of(Mesh, world, capture, tmp_path_factory.mktemp("mesh"), *options) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def probed(mesh: Mesh) -> Pod:
    return await probed_pod(mesh)


def passed(node: Node) -> float:
    """Connections that were let past as the kubelet's."""
    text = inside(node.namespace, lambda: metrics("127.0.0.1", 15020))
    lines = (line for line in text.splitlines() if line.startswith("underpass_capture_exits_total"))
    return sum(float(line.split()[-1]) for line in lines if 'reason="probe"' in line)


@FAMILIES
async def test_the_kubelet_reaches_a_declared_port_by_its_own_address_past_the_mesh(
    mesh: Mesh, probed: Pod, kubelet: Path, family: str
) -> None:
    node = mesh.world.nodes[0]
    before = passed(node)
    said = await dial(node, probed, ECHO_PORT, family, kubelet)
    address, port = said.facts["local"]
    assert said.greeting == f"probed sees {address}"
    assert said.echoed
    assert access_lines(mesh.log(node.name), f"{address}:{port}") == []
    assert passed(node) > before


@FAMILIES
async def test_it_reaches_no_other_port(
    mesh: Mesh, probed: Pod, kubelet: Path, family: str
) -> None:
    said = await dial(mesh.world.nodes[0], probed, UNDECLARED_PORT, family, kubelet)
    assert not said.greeting
    assert said.error


@FAMILIES
async def test_no_other_process_of_the_node_does(mesh: Mesh, probed: Pod, family: str) -> None:
    said = await dial(mesh.world.nodes[0], probed, ECHO_PORT, family)
    assert not said.greeting
    assert said.error


@FAMILIES
async def test_a_process_of_its_cgroup_in_another_namespace_does_not(
    mesh: Mesh, probed: Pod, kubelet: Path, family: str
) -> None:
    said = await dial(mesh.world.nodes[1], probed, ECHO_PORT, family, kubelet)
    assert not said.greeting
    assert said.error


async def test_who_uses_the_port_of_a_closed_probe_does_not(
    mesh: Mesh, probed: Pod, kubelet: Path
) -> None:
    node, target = mesh.world.nodes[0], f"{probed.sandbox.ipv4}:{ECHO_PORT}=probed"
    join = ("sh", "-c", f'echo $$ > {kubelet}/cgroup.procs; exec "$@"', "-")
    (probe,) = await run(node, "same_port", FIXED_PORT, 3, target, before=join)
    assert probe.facts["right"] == {"probed": 3}
    (other,) = await run(node, "same_port", FIXED_PORT, 3, target)
    assert other.facts["right"] == {}
    assert other.facts["wrong"] or other.facts["errors"]


async def test_it_needs_no_data_plane(mesh: Mesh, probed: Pod, kubelet: Path) -> None:
    node = mesh.world.nodes[0]
    agent = mesh.processes[node.name]
    dataplane = (await mesh.admin(node, "status"))["dataplane"]["pid"]
    # So that none is started in its place.
    agent.send_signal(signal.SIGSTOP)
    try:
        os.kill(dataplane, signal.SIGKILL)
        said = await dial(node, probed, ECHO_PORT, "ipv4", kubelet)
        other = await dial(node, probed, ECHO_PORT, "ipv4")
    finally:
        agent.send_signal(signal.SIGCONT)
    assert said.echoed
    assert not other.greeting
    await mesh.settled(node)


async def test_a_handshake_by_cookies_is_let_past_too(
    mesh: Mesh, probed: Pod, kubelet: Path
) -> None:
    with always_cookies(probed):
        said = await dial(mesh.world.nodes[0], probed, ECHO_PORT, "ipv4", kubelet)
    assert said.echoed


async def test_a_port_that_is_no_longer_declared_is_the_meshs_again(
    mesh: Mesh, probed: Pod, kubelet: Path
) -> None:
    node = mesh.world.nodes[0]

    async def reached() -> bool:
        return bool((await dial(node, probed, ECHO_PORT, "ipv4", kubelet)).greeting)

    async def refused() -> bool:
        return not await reached()

    mesh.pods[:] = [dataclasses.replace(probed, probe_ports=())]
    mesh.write_pods(node)
    await mesh.until("the port to be taken back", refused, node.name)
    mesh.pods[:] = [probed]
    mesh.write_pods(node)
    await mesh.until("the port to be declared again", reached, node.name)


async def test_a_kubelet_that_is_started_anew_is_known_by_its_new_cgroup(
    mesh: Mesh, probed: Pod, kubelet: Path
) -> None:
    node = mesh.world.nodes[0]
    kubelet.rmdir()
    line = "the kubelet isn't known by its cgroup"
    log = mesh.log(node.name)
    await mesh.until("the loss in the log", lambda: line in log.read_text(), node.name)
    kubelet.mkdir()

    async def reached() -> bool:
        return bool((await dial(node, probed, ECHO_PORT, "ipv4", kubelet)).greeting)

    await mesh.until("the kubelet to be known again", reached, node.name)
