"""How long a node takes to capture very many pods that appear at once.

Each pod is a network namespace with a veth to its node, with addresses and nobody in it. The pod
file names none while the agent starts; the clock runs from the rename that puts all of them into
it until the admin socket shows each captured and verified.
"""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from agent.cli.demo import manifests
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.world import PREFIX, Node, PodSandbox, World, down
from bench import usage

WORLD = "enrol"
NAMESPACE = "bench"
# As on a real node: far fewer identities than pods, whose certificates come meanwhile.
ACCOUNTS = 20
# Seconds between two looks how far it is.
LOOK = 0.25
# Seconds for all of it.
PATIENCE = 300.0
# Milliseconds a pod (the issue of stage 3).
GOALS = {"ebpf": 8.0, "nftables": 25.0}


class EnrolError(Exception):
    """Pods couldn't be made, or weren't captured; the text says what was seen."""


@dataclass(frozen=True)
class Enrolled:
    """Of one capture mode; seconds for all pods, milliseconds for one."""

    mode: str
    pods: int
    seconds: float
    each: float
    goal: float
    # CPU seconds of each process from the rename to the last pod, and of the whole machine.
    agent: float
    dataplane: float
    machine: float
    # Until none is captured any more, after the list was emptied.
    leaving: float


async def measure(modes: Sequence[str], count: int, folder: Path, cgroup: Path) -> list[Enrolled]:
    """The same namespaces for each mode, one mode after the other. Leaves nothing behind."""
    world = World(WORLD, nodes=1)
    mesh = Mesh(world, folder, folder / "run")
    try:
        world.up()
        mesh.prepare()
        pods = list(many(world.nodes[0], count))
        _build(pods)
        mesh.apply("namespace", manifests.namespace(NAMESPACE))
        mesh.apply("pods", *(pod.manifest() for pod in pods))
        await mesh.start_control_plane()
        return [await _mode(mesh, mode, pods, cgroup) for mode in modes]
    finally:
        down(WORLD)
        for process in mesh.processes.values():
            await process.wait()


async def _mode(mesh: Mesh, mode: str, pods: list[Pod], cgroup: Path) -> Enrolled:
    (node,) = mesh.world.nodes
    options = ("--log-filter=info", f"--capture={mode}", f"--pods-cgroup={cgroup}")
    mesh.agent_options = options
    await mesh.start_agent(node)

    async def ready() -> bool:
        try:
            return bool((await mesh.admin(node, "status"))["ready"])
        except OSError:
            return False

    await mesh.until("a node that is ready", ready, node.name)
    pids = (
        mesh.processes[node.name].pid,
        (await mesh.admin(node, "status"))["dataplane"]["pid"],
    )
    file = mesh.pods_file(node)
    coming = file.with_suffix(".coming")
    manifests.write_list(coming, [pod.entry() for pod in pods])
    before, machine = [usage.process_seconds(pid) for pid in pids], usage.machine_seconds()
    began = time.monotonic()
    os.replace(coming, file)
    await _captured(mesh.log(node.name), len(pods))
    await _reach(mesh, node, "verified", len(pods))
    seconds = time.monotonic() - began
    used = [usage.process_seconds(pid) - then for pid, then in zip(pids, before, strict=True)]
    machine = usage.machine_seconds() - machine
    for seen in await mesh.admin(node, "pods"):
        if not seen["captured"] or not seen["verified"]:
            raise EnrolError(f"{seen['name']} isn't captured: {seen['problem']}")
    began = time.monotonic()
    mesh.write_pods(node)
    await _reach(mesh, node, "total", 0)
    leaving = time.monotonic() - began
    await mesh.kill(node.name, signal.SIGTERM)
    return Enrolled(
        mode=mode,
        pods=len(pods),
        seconds=seconds,
        each=seconds / len(pods) * 1000,
        goal=GOALS[mode],
        agent=used[0],
        dataplane=used[1],
        machine=machine,
        leaving=leaving,
    )


async def _captured(log: Path, wanted: int) -> None:
    """Waits for as many lines of the log: asking costs the agent tens of milliseconds with so many
    pods, which they want themselves. Whether it is true is asked afterwards."""
    deadline, seen = time.monotonic() + PATIENCE, 0
    with log.open("rb") as lines:
        while seen < wanted and time.monotonic() < deadline:
            seen += lines.read().count(b"pod captured ")
            await asyncio.sleep(LOOK)


async def _reach(mesh: Mesh, node: Node, what: str, wanted: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            status = await mesh.admin(node, "status")
        except OSError as exc:
            raise EnrolError(f"the agent is gone ({exc}); {mesh.tail(node.name)}") from exc
        if status["pods"][what] == wanted:
            return
        if time.monotonic() > deadline:
            found = {"pods": status["pods"], "problems": status["problems"][:3]}
            raise EnrolError(f"{wanted} pods {what} aren't reached: {found}")
        await asyncio.sleep(LOOK)


def many(node: Node, count: int) -> Iterator[Pod]:
    first4, first6 = IPv4Address("10.98.0.1"), IPv6Address("fd98::1")
    for number in range(count):
        name = f"p{number:05}"
        sandbox = PodSandbox(
            name=name,
            namespace=f"{PREFIX}-{WORLD}-{name}",
            ipv4=str(first4 + number),
            ipv6=str(first6 + number),
            link=f"pod{number}",
            node=node,
        )
        yield Pod(sandbox, NAMESPACE, f"account-{number % ACCOUNTS}")


def _build(pods: list[Pod]) -> None:
    """Links first, in one process; addresses want one in each namespace."""
    lines = []
    for pod in pods:
        box = pod.sandbox
        lines.append(f"netns add {box.namespace}")
        ends = f"{box.link} netns {box.node.namespace} type veth peer name eth0"
        lines.append(f"link add {ends} netns {box.namespace}")
    _ip(lines)
    for pod in pods:
        box = pod.sandbox
        lines = [
            "link set lo up",
            "link set eth0 up",
            f"addr add {box.ipv4}/32 dev eth0",
            f"addr add {box.ipv6}/128 dev eth0 nodad",
        ]
        _ip(lines, box.namespace)


def _ip(lines: list[str], namespace: str | None = None) -> None:
    where = ["-netns", namespace] if namespace else []
    command = ["ip", *where, "-batch", "-"]
    text = "\n".join(lines) + "\n"
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise EnrolError(f"{namespace or 'ip'}: {done.stderr.strip()}")
