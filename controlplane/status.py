"""`status.json` in the state folder: what is served, to whom, and what is wrong with the input."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from controlplane import state_files
from controlplane.log import fact
from controlplane.nodes import Nodes
from controlplane.pipeline import Pipeline
from controlplane.sources.manifests import Manifests
from controlplane.wds.encoding import ADDRESS, AUTHORIZATION
from controlplane.wds.index import Index

FILE = "status.json"
# Fifty nodes that connect at once make one write, not fifty.
_QUIET = 0.2

_log = logging.getLogger(__name__)


def view(
    manifests: Manifests, pipeline: Pipeline, index: Index, nodes: Nodes, addresses: list[str]
) -> Mapping[str, object]:
    return {
        "addresses": addresses,
        "generation": index.generation,
        "resources": {
            "addresses": index.count(ADDRESS),
            "authorizations": index.count(AUTHORIZATION),
        },
        "files": manifests.files,
        "problems": [{**asdict(p), "message": str(p)} for p in manifests.problems],
        "notices": list(pipeline.notices),
        "nodes": [asdict(node) for node in nodes.list()],
        "written": time.time(),
    }


class StatusFile:
    """Rewrites the file some moments after `touch`; a full disk stops nothing else."""

    def __init__(self, state: Path) -> None:
        self.path = state / FILE
        self._dirty = asyncio.Event()
        self._dirty.set()

    def touch(self) -> None:
        self._dirty.set()

    async def run(self, view: Callable[[], Mapping[str, object]]) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            self.write(view())
            await asyncio.sleep(_QUIET)

    def write(self, content: Mapping[str, object]) -> None:
        data = json.dumps(content, indent=1, ensure_ascii=False).encode()
        try:
            state_files.write(self.path, data + b"\n", state_files.PUBLIC)
        except OSError as error:
            fact(_log, logging.ERROR, "status not written", file=self.path, reason=error.strerror)

    def remove(self) -> None:
        """A file that is there belongs to a control plane that runs, or was killed."""
        self.path.unlink(missing_ok=True)
