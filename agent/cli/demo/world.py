"""Nodes and pods made of network namespaces, joined by a wire; nothing of it touches the host's
own network.

Every link lies between two of the world's namespaces, so worlds may use the same addresses at the
same time. A pod hangs on its node by a point-to-point veth (no bridge), the nodes route.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from agent.cli.demo.netns import FOLDER, inside

# Where agents pin the programs of their nodes.
BPF_FOLDER = Path("/sys/fs/bpf/underpass")
PREFIX = "up"


class WorldError(Exception):
    """A namespace, link or route couldn't be made; the text holds what `ip` said."""


@dataclass(frozen=True)
class PodSandbox:
    """A pod's namespace and addresses."""

    name: str
    namespace: str
    ipv4: str
    ipv6: str
    # The node's end of the pod's veth.
    link: str
    node: "Node"

    @property
    def path(self) -> Path:
        return FOLDER / self.namespace


@dataclass
class Node:
    """A node's namespace; `ipv4` and `ipv6` are its ends of the wire."""

    name: str
    namespace: str
    index: int
    ipv4: str
    ipv6: str
    pods: list[PodSandbox] = field(default_factory=list)
    # Never decreases, so that an address isn't used twice unless a test wants it.
    next_pod: int = 10

    @property
    def path(self) -> Path:
        return FOLDER / self.namespace


class World:
    """Two nodes (or one) under one prefix; `up()` builds, `down()` leaves nothing.

    Raises WorldError from every method that builds.
    """

    def __init__(self, prefix: str, *, nodes: int = 2) -> None:
        self.prefix = prefix
        self.nodes = [
            Node(
                name=f"{prefix}-node{i}",
                namespace=f"{PREFIX}-{prefix}-node{i}",
                index=i,
                ipv4=f"10.99.0.{i}",
                ipv6=f"fd99::{i}",
            )
            for i in range(1, nodes + 1)
        ]

    def up(self) -> None:
        """Builds the nodes and the wire; what a crashed run left under the prefix goes first."""
        down(self.prefix)
        lines = [f"netns add {node.namespace}" for node in self.nodes]
        if len(self.nodes) == 2:
            one, two = (node.namespace for node in self.nodes)
            lines.append(f"link add wire netns {one} type veth peer name wire netns {two}")
        _ip(lines)
        for node in self.nodes:
            inside(node.namespace, _forward)
            lines = ["link set lo up"]
            if len(self.nodes) == 2:
                lines += [
                    "link set wire up",
                    f"addr add {node.ipv4}/24 dev wire",
                    f"addr add {node.ipv6}/64 dev wire nodad",
                ]
                for other in self.nodes:
                    if other is not node:
                        lines += [
                            f"route add 10.99.{other.index}.0/24 via {other.ipv4}",
                            f"route add fd99:{other.index}::/64 via {other.ipv6}",
                        ]
            else:
                lines += [f"addr add {node.ipv4}/32 dev lo", f"addr add {node.ipv6}/128 dev lo"]
            _ip(lines, node.namespace)

    def add_pod(self, node: Node, name: str, *, host_byte: int | None = None) -> PodSandbox:
        """A pod's namespace with one address of each family, reachable from both nodes."""
        number = host_byte if host_byte is not None else node.next_pod
        node.next_pod = max(node.next_pod, number + 1)
        # Interface names hold 15 characters; the number is unique on its node.
        link = f"pod{number}"
        pod = PodSandbox(
            name=name,
            namespace=f"{PREFIX}-{self.prefix}-{name}",
            ipv4=f"10.99.{node.index}.{number}",
            ipv6=f"fd99:{node.index}::{number:x}",
            link=link,
            node=node,
        )
        _ip(
            [
                f"netns add {pod.namespace}",
                f"link add {link} netns {node.namespace} type veth"
                f" peer name eth0 netns {pod.namespace}",
            ]
        )
        _ip(
            [
                f"link set {link} up",
                f"addr add 169.254.1.1/32 dev {link}",
                f"addr add fe80::1/64 dev {link} nodad",
                f"route add {pod.ipv4}/32 dev {link}",
                f"route add {pod.ipv6}/128 dev {link}",
            ],
            node.namespace,
        )
        _ip(
            [
                "link set lo up",
                "link set eth0 up",
                f"addr add {pod.ipv4}/32 dev eth0",
                f"addr add {pod.ipv6}/128 dev eth0 nodad",
                "route add 169.254.1.1/32 dev eth0 scope link",
                f"route add default via 169.254.1.1 dev eth0 src {pod.ipv4}",
                f"route add ::/0 via fe80::1 dev eth0 src {pod.ipv6}",
            ],
            pod.namespace,
        )
        node.pods.append(pod)
        return pod

    def remove_pod(self, pod: PodSandbox) -> None:
        """Ends the pod's processes and its namespace, as a kubelet would."""
        _kill_inside([pod.namespace])
        # A namespace's links live on for a moment after it; the next pod may want the address.
        _ip([f"link del {pod.link}"], pod.node.namespace)
        _delete([pod.namespace])
        pod.node.pods.remove(pod)

    def down(self) -> None:
        down(self.prefix)
        for node in self.nodes:
            node.pods.clear()


def down(prefix: str) -> None:
    """Ends every process inside the namespaces of a prefix, removes these and the nodes' cgroups.

    Works after a crash, for it looks at the machine and not at anybody's memory.
    """
    names = namespaces(prefix)
    _kill_inside(names)
    _delete(names)
    for pins in BPF_FOLDER.glob(f"{prefix}-node*"):
        shutil.rmtree(pins, ignore_errors=True)
    for root in cgroup2_mounts():
        for leaf in (root / "underpass").glob(f"{prefix}-node*"):
            remove_cgroup(leaf)
        with contextlib.suppress(OSError):
            (root / "underpass").rmdir()


def namespaces(prefix: str) -> list[str]:
    return sorted(path.name for path in FOLDER.glob(f"{PREFIX}-{prefix}-*"))


def cgroup2_mounts() -> list[Path]:
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    return [Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"]


def remove_cgroup(top: Path) -> None:
    """Removes a cgroup and those below it; one that still holds processes stays."""
    for folder, _, _ in sorted(os.walk(top), reverse=True):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def _forward() -> None:
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        Path("/proc/sys/net", name).write_text("1")


def _ip(lines: list[str], namespace: str | None = None) -> None:
    where = ["-netns", namespace] if namespace else []
    done = subprocess.run(
        ["ip", *where, "-batch", "-"],
        input="\n".join(lines) + "\n",
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise WorldError(f"{namespace or 'ip'}: {done.stderr.strip()}")


def _delete(names: list[str]) -> None:
    if names:
        _ip([f"netns del {name}" for name in names])


def _kill_inside(names: list[str]) -> None:
    """Kills the processes that live in these namespaces, and waits until they are gone."""
    inodes = set()
    for name in names:
        with contextlib.suppress(OSError):
            inodes.add((FOLDER / name).stat().st_ino)
    deadline = time.monotonic() + 10
    while living := _processes(inodes):
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise WorldError(f"processes {living} survive SIGKILL in {', '.join(names)}")
        time.sleep(0.02)


def _processes(inodes: set[int]) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if (folder / "ns/net").stat().st_ino in inodes and not _is_zombie(folder):
                found.append(int(folder.name))
    return found


def _is_zombie(folder: Path) -> bool:
    return (folder / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"


def forget(folder: Path) -> None:
    """Removes a state folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
