"""A pod that is probed, and who dials it from where."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo import manifests
from agent.cli.demo.manifests import Pod
from agent.cli.demo.shop import ECHO_PORT, NAMESPACE, serve_echo
from tests.support.intruder import Heard, run
from tests.support.proof import new_marker

if TYPE_CHECKING:
    from pathlib import Path

    from agent.cli.demo.mesh import Mesh
    from agent.cli.demo.world import Node

FAMILIES = pytest.mark.parametrize("family", ["ipv4", "ipv6"])
UNDECLARED_PORT = 9001


async def probed_pod(mesh: Mesh) -> Pod:
    """On the first node of a mesh that this starts, under STRICT, with a declared and an undeclared
    port that greet."""
    sandbox = mesh.world.add_pod(mesh.world.nodes[0], "probed")
    pod = Pod(sandbox, NAMESPACE, "probed", probe_ports=(ECHO_PORT,))
    mesh.apply("namespace", manifests.namespace(NAMESPACE))
    mesh.apply("strict", manifests.strict(NAMESPACE))
    mesh.add(pod)
    await serve_echo(mesh, pod)
    undeclared = [sys.executable, "-m", "agent.cli.demo.echo", "probed", str(UNDECLARED_PORT)]
    await mesh.spawn("undeclared", undeclared, sandbox.namespace)
    await mesh.start()
    return pod


async def dial(
    where: Node | Pod, pod: Pod, port: int, family: str, cgroup: Path | None = None
) -> Heard:
    join = ("sh", "-c", f'echo $$ > {cgroup}/cgroup.procs; exec "$@"', "-") if cgroup else ()
    host = getattr(pod.sandbox, family)
    (said,) = await run(where, "odd_sockets", "plain", host, port, new_marker(), before=join)
    return said
