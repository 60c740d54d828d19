"""A mesh over a world: one embedded control plane, an agent a node, the servers of the pods.

Everything is a real process started through the `underpass` command, inside its node's namespace.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from agent.cli.demo import manifests
from agent.cli.demo.manifests import Manifest, Pod
from agent.cli.demo.world import Node, World

# One command, so that it works from the venv of an installation and from a source tree alike.
UNDERPASS = (sys.executable, "-m", "agent.cli.main")
CONTROL_PLANE_PORT = 15012


class MeshError(Exception):
    """Something didn't come up; the text names it, what it waited for, and its log."""


@dataclass
class Mesh:
    """Processes and files of one mesh. `folder` holds manifests, pod files and logs; `run_dir`
    the sockets of the agents.

    Raises MeshError when something doesn't come up in time.
    """

    world: World
    folder: Path
    run_dir: Path
    # Further options of every `underpass agent`.
    agent_options: Sequence[str] = ()
    # Children end with this process (tests), or outlive it (`demo --keep`).
    tied: bool = True
    # Where agents and control plane live while this process is in the pods' cgroup.
    daemons: Path | None = None
    pods: list[Pod] = field(default_factory=list)
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    @property
    def manifests(self) -> Path:
        return self.folder / "manifests"

    @property
    def control_plane_state(self) -> Path:
        return self.folder / "controlplane"

    def pods_file(self, node: Node) -> Path:
        return self.folder / f"{node.name}.pods.yaml"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def prepare(self) -> None:
        """Makes the folders and an empty pod file a node."""
        self.manifests.mkdir(parents=True, exist_ok=True)
        for node in self.world.nodes:
            self.write_pods(node)

    # ---- processes -------------------------------------------------------------------------

    async def spawn(
        self, name: str, arguments: Sequence[str], namespace: str | None = None
    ) -> asyncio.subprocess.Process:
        """Starts a process in a namespace, its output in `<name>.log`."""
        prefix: list[str] = ["setpriv", "--pdeathsig", "KILL"] if self.tied else []
        if namespace:
            # `ip netns exec` would hide the cgroups.
            prefix += ["nsenter", f"--net=/run/netns/{namespace}"]
        with self.log(name).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *prefix,
                *arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        self.processes[name] = process
        return process

    def apart(self) -> Sequence[str]:
        """Put before a command, moves it into the daemons' cgroup, if they have one."""
        if self.daemons is None:
            return ()
        return ("sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.daemons / "cgroup.procs"))

    async def start_control_plane(self) -> None:
        """In the first node's namespace, reachable by both nodes."""
        node = self.world.nodes[0]
        listen = (f"{node.ipv4}:{CONTROL_PLANE_PORT}", f"[{node.ipv6}]:{CONTROL_PLANE_PORT}")
        await self.spawn(
            "controlplane",
            [
                *self.apart(),
                *UNDERPASS,
                "controlplane",
                f"--manifests={self.manifests}",
                f"--state={self.control_plane_state}",
                *(f"--listen={address}" for address in listen),
                f"--san={node.ipv4}",
                f"--san={node.ipv6}",
            ],
            node.namespace,
        )
        root = self.control_plane_state / "root-cert.pem"
        await self.until("the control plane's root certificate", root.exists, "controlplane")

    async def start_agent(self, node: Node) -> None:
        token = self.folder / f"{node.name}.token"
        if not token.exists():
            await self.make_token(node, token)
        address = f"https://{self.world.nodes[0].ipv4}:{CONTROL_PLANE_PORT}"
        root = self.control_plane_state / "root-cert.pem"
        await self.spawn(
            node.name,
            [
                *self.apart(),
                *UNDERPASS,
                "agent",
                f"--node={node.name}",
                f"--run-dir={self.run_dir}",
                f"--pods=file:{self.pods_file(node)}",
                f"--xds-address={address}",
                f"--xds-root={root}",
                f"--xds-token={token}",
                *self.agent_options,
            ],
            node.namespace,
        )

    async def make_token(self, node: Node, file: Path) -> None:
        process = await asyncio.create_subprocess_exec(
            *UNDERPASS,
            "controlplane",
            "token",
            f"--node={node.name}",
            f"--state={self.control_plane_state}",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = await process.communicate()
        if process.returncode:
            raise MeshError(f"no token for {node.name}: {err.decode().strip()}")
        file.touch(mode=0o600)
        file.write_bytes(out)

    async def start(self) -> None:
        """Control plane and agents; returns when every pod is captured and verified."""
        await self.start_control_plane()
        for node in self.world.nodes:
            await self.start_agent(node)
        await self.settled()

    async def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signals a process that `spawn` started, and waits for its end."""
        process = self.processes.pop(name)
        if process.returncode is None:
            process.send_signal(number)
        async with asyncio.timeout(30):
            await process.wait()

    # ---- pods ------------------------------------------------------------------------------

    def add(self, *pods: Pod) -> None:
        """Tells control plane and agents of pods."""
        self.pods += pods
        for pod in pods:
            self.write_manifest(pod)
        for node in {pod.sandbox.node.name: pod.sandbox.node for pod in pods}.values():
            self.write_pods(node)

    def remove(self, pod: Pod) -> None:
        """Takes a pod away from control plane and agent; its sandbox stays."""
        self.pods.remove(pod)
        (self.manifests / f"pod-{pod.name}.yaml").unlink()
        self.write_pods(pod.sandbox.node)

    def write_manifest(self, pod: Pod) -> None:
        manifests.write(self.manifests / f"pod-{pod.name}.yaml", pod.manifest())

    def write_pods(self, node: Node) -> None:
        mine = [p.entry() for p in self.pods if p.ambient and p.sandbox.node is node]
        manifests.write_list(self.pods_file(node), mine)

    def apply(self, name: str, *content: Manifest) -> None:
        manifests.write(self.manifests / f"{name}.yaml", content)

    def withdraw(self, name: str) -> None:
        (self.manifests / f"{name}.yaml").unlink()

    # ---- observation -----------------------------------------------------------------------

    async def admin(self, node: Node, path: str, *, method: str = "GET") -> Any:
        """The answer of a node's admin socket. Raises aiohttp.ClientError, OSError."""
        connector = aiohttp.UnixConnector(str(self.run_dir / node.name / "admin.sock"))
        timeout = aiohttp.ClientTimeout(total=30)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.request(method, f"http://agent/v1/{path}") as answer,
        ):
            answer.raise_for_status()
            return json.loads(await answer.read() or b"null")

    async def settled(self, *nodes: Node) -> None:
        """Every pod of the nodes, all when none is named, is captured, proved and on record."""
        for node in nodes or self.world.nodes:
            wanted = {p.uid for p in self.pods if p.ambient and p.sandbox.node is node}

            async def ready(node: Node = node, wanted: set[str] = wanted) -> bool:
                try:
                    pods = await self.admin(node, "pods")
                except (aiohttp.ClientError, OSError):
                    return False
                whole = (p for p in pods if p["verified"] and p["proof"] == "proved")
                proved = {p["uid"] for p in whole if p["identity"]}
                return wanted == {p["uid"] for p in pods} and wanted <= proved

            await self.until(f"{len(wanted)} pods proved on {node.name}", ready, node.name)

    async def until(
        self,
        what: str,
        condition: Callable[[], bool | Awaitable[bool]],
        process: str | None = None,
        *,
        seconds: float = 60.0,
    ) -> None:
        """Waits for a condition; fails at once when the process it depends on has ended."""
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            answer = condition()
            if answer if isinstance(answer, bool) else await answer:
                return
            child = self.processes.get(process or "")
            if child is not None and child.returncode is not None:
                raise MeshError(f"{process} ended with {child.returncode}: {self.tail(process)}")
            if asyncio.get_running_loop().time() > deadline:
                raise MeshError(f"waited {seconds:g} s for {what}: {self.tail(process)}")
            await asyncio.sleep(0.05)

    def tail(self, process: str | None, lines: int = 15) -> str:
        if process is None or not self.log(process).exists():
            return ""
        text = self.log(process).read_text(errors="replace").splitlines()
        return "\n".join([f"the end of {self.log(process)}:", *text[-lines:]])


def access_lines(log: Path, *needles: str) -> list[str]:
    """Access log lines of a node that hold all needles."""
    return [line for line in _lines(log) if "access" in line and all(n in line for n in needles)]


def _lines(log: Path) -> Iterable[str]:
    return log.read_text(errors="replace").splitlines() if log.exists() else ()
