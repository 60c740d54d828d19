"""The demo as a user runs it: it proves its claims, can be kept, and leaves no trace, also after
it was killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.cli.demo.commands import FOLDER, PODS_CGROUP, PREFIX, RUN_DIR, remove
from agent.cli.demo.mesh import UNDERPASS
from agent.cli.demo.world import BPF_FOLDER, cgroup2_mounts, namespaces

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    remove()


def underpass(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*UNDERPASS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)


def traces() -> list[str]:
    """Namespaces, cgroups, files and processes of the demo, and links of the host."""
    found = namespaces(PREFIX)
    for root in cgroup2_mounts():
        found += [str(folder) for folder in (root / "underpass").glob(f"{PREFIX}-*")]
        found += [str(folder) for folder in root.glob(PODS_CGROUP)]
    found += [str(folder) for folder in BPF_FOLDER.glob(f"{PREFIX}-*")]
    found += [str(f) for f in (FOLDER, *RUN_DIR.glob(f"{PREFIX}-*")) if f.exists()]
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(FOLDER) in command or f"{PREFIX}-node" in command:
                found.append(f"{folder.name}: {command}")
    return found


def cgroups_of(word: str) -> set[str]:
    """Of the processes whose command has the word."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                if word in (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                    lines = (folder / "cgroup").read_text().splitlines()
                    found |= {line[3:] for line in lines if line.startswith("0::")}
    return found


def links() -> str:
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("options", "way"), [((), "ebpf"), (("--capture=nftables",), "nftables")])
def test_every_claim_holds_and_no_trace_is_left(options: tuple[str, ...], way: str) -> None:
    before = links()
    done = underpass("demo", "--json", *options)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[-1]["done"] is True
    assert [line["chapter"] for line in lines[:-1]] == list(range(1, 13))
    assert all(line["evidence"] for line in lines[:-1])
    assert all(f"captured by {way}" in node for node in lines[2]["evidence"])
    assert traces() == []
    assert links() == before


def test_kept_mesh_can_be_looked_into_and_taken_down() -> None:
    done = underpass("demo", "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    node = f"{PREFIX}-node1"
    status = underpass("--node", node, "status", "-o", "json")
    assert status.returncode == 0, status.stdout + status.stderr
    assert json.loads(status.stdout)["ready"] is True
    for view, needle in (
        ("pods", "web"),
        ("workloads", "api"),
        ("services", "db"),
        ("certificates", "spiffe://cluster.local/ns/shop/sa/web"),
    ):
        shown = underpass("--node", node, view)
        assert shown.returncode == 0, shown.stderr
        assert needle in shown.stdout
    # Only what runs in pods is in the pods' cgroup, as on a node.
    assert cgroups_of("agent.cli.demo.echo") == {f"/{PODS_CGROUP}"}
    ours = cgroups_of(f"--node={node}") | cgroups_of(str(RUN_DIR / node))
    assert len(ours) == 2, "the agent's and the data plane's"
    assert not any(PODS_CGROUP in path for path in ours | cgroups_of(str(FOLDER / "controlplane")))
    # The commands that it prints work as they stand; a service's address is the data plane's to
    # know, so that this one was captured.
    curl = next(line for line in done.stdout.splitlines() if "curl" in line)
    asked = underpass(*curl.split()[1:])
    assert asked.stdout.count("api sees") == 2, asked.stderr
    refused = underpass("demo", "exec", "nobody", "true")
    assert refused.returncode == 1
    assert "it has api, batch, cart, db, legacy, web" in refused.stderr
    down = underpass("demo", "down")
    assert down.returncode == 0, down.stderr
    assert traces() == []


def test_killed_demo_is_taken_down_without_a_trace() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "agent.cli.main", "demo", "--keep", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["chapter"] == 3:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert traces() != []
    assert underpass("demo", "down").returncode == 0
    assert traces() == []
