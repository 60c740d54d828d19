"""Asks the data plane's binary whether a node can capture by eBPF."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

from tests.support.binary import dataplane_binary

if TYPE_CHECKING:
    from pathlib import Path


def probe(pods: Path, leaves: Path, folder: str) -> tuple[int, dict[str, str]]:
    """The exit code, and of the requirements that aren't met why and what to do."""
    options = (f"--pods-cgroup={pods}", f"--leaf-parent={leaves}", f"--folder={folder}")
    command = [dataplane_binary(), "capture", "probe", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    found = json.loads(done.stdout)["requirements"]
    assert all(bool(entry["reason"]) == bool(entry["remedy"]) for entry in found)
    missing = {
        entry["name"]: f"{entry['reason']}; {entry['remedy']}" for entry in found if entry["reason"]
    }
    return done.returncode, missing
