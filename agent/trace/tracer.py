"""The tracing child as its parent sees it: started, told of namespaces, read, ended."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import agent

# Debian's bcc is importable by this one, whatever runs us.
SYSTEM_PYTHON = Path("/usr/bin/python3")
_ROOT = Path(agent.__file__).parents[1]
# It looks at its input every 100 ms, and frees its programs when it ends.
_PATIENCE = 3.0
_LINE = 1 << 16

Record = dict[str, Any]


class TraceError(Exception):
    """Tracing isn't possible or broke off; the text says why and what to install or do."""


class Tracer:
    """`async with`: starts the child; its programs are gone from the kernel at the end of the
    block. Raises TraceError."""

    def __init__(self, program: str, dns_port: int, *, dialled: bool = False) -> None:
        """`dialled`: also what was asked for, where capture leads a socket elsewhere."""
        more = ("dialled",) if dialled else ()
        self._arguments = (program, str(os.getpid()), str(dns_port), *more)

    async def __aenter__(self) -> "Tracer":
        self._child = await asyncio.create_subprocess_exec(
            interpreter(),
            # Not the folder that the user happens to be in.
            "-P",
            "-m",
            "agent.trace.child",
            *self._arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            limit=_LINE,
            # Ctrl-C is for us; we end it.
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(_ROOT)},
        )
        # What the compiler says, for the case that it fails.
        self._stderr = asyncio.create_task(_tail(self._child.stderr))
        return self

    async def __aexit__(self, *_: object) -> None:
        child = self._child
        assert child.stdin is not None  # asked for above
        with contextlib.suppress(OSError):
            child.stdin.close()
        try:
            async with asyncio.timeout(_PATIENCE):
                # It may wait for us to read.
                while await self._read(1 << 16):
                    pass
                await child.wait()
        except (TimeoutError, asyncio.CancelledError):
            child.kill()
            await child.wait()
        finally:
            self._stderr.cancel()

    @property
    def pid(self) -> int:
        return self._child.pid

    def watch(self, inodes: Iterable[int]) -> None:
        """From now on these namespaces only."""
        assert self._child.stdin is not None  # asked for above
        with contextlib.suppress(OSError):
            self._child.stdin.write(f"{json.dumps(sorted(inodes))}\n".encode())

    async def records(self) -> AsyncIterator[Record]:
        """{"ready": true} first, {"now": ns} and {"lost": n} between the records (see child.py).
        Never ends by itself. Raises TraceError."""
        assert self._child.stdout is not None  # asked for above
        while line := await self._child.stdout.readline():
            record: Record = json.loads(line)
            if "error" in record:
                raise TraceError(record["error"] + await self._said())
            yield record
        code = await self._child.wait()
        raise TraceError(f"the tracing process ended with {code}" + await self._said())

    async def _said(self) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                return await asyncio.shield(self._stderr)
        return ""

    async def _read(self, size: int) -> bytes:
        assert self._child.stdout is not None  # asked for above
        return await self._child.stdout.read(size)


def interpreter() -> str:
    """One that can import bcc, if there is any: what is missing the child tells."""
    if find_spec("bcc") is None and SYSTEM_PYTHON.exists():
        return str(SYSTEM_PYTHON)
    return sys.executable


async def _tail(stream: asyncio.StreamReader | None) -> str:
    """The end of what it says; compilers say much."""
    assert stream is not None  # asked for above
    kept = b""
    while piece := await stream.read(_LINE):
        kept = (kept + piece)[-2000:]
    text = kept.decode(errors="replace").strip()
    return f"\n{text}" if text else ""
