"""`underpass trace` as its user runs it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Self

from tests.support.eventually import eventually

if TYPE_CHECKING:
    from types import TracebackType

    from agent.cli.demo.mesh import Mesh


class Trace:
    """The command on a node of the mesh, and the rows it has printed so far."""

    def __init__(self, mesh: Mesh, *arguments: str, node: int = 0) -> None:
        name = mesh.world.nodes[node].name
        self._command = [sys.executable, "-m", "agent.cli.main", f"--run-dir={mesh.run_dir}"]
        self._command += [f"--node={name}", "trace", *arguments, "-o", "json"]
        self.rows: list[dict[str, Any]] = []
        self.notes = ""

    async def __aenter__(self) -> Self:
        self.started = time.monotonic()
        self.process = await asyncio.create_subprocess_exec(
            *self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._readers = [asyncio.create_task(self._rows()), asyncio.create_task(self._notes())]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(20):
            await self.process.wait()
            await asyncio.gather(*self._readers)

    async def ready(self) -> None:
        await eventually(lambda: "Tracing" in self.notes, within=20, what=lambda: self.notes)

    async def row(self, **wanted: object) -> dict[str, Any]:
        """The first one with these values, once it is there."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [row for row in self.rows if wanted.items() <= row.items()]
            return bool(found)

        await eventually(there, what=lambda: (wanted, self.rows, self.notes))
        return found[0]

    async def _rows(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.rows.append(json.loads(line))

    async def _notes(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.notes += line.decode()
