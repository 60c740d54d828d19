"""Runs the programs of tests/attacks inside pods, with the rights a pod would have."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

from agent.cli.demo.manifests import Pod

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from agent.cli.demo.world import Node

ROOT = Path(__file__).parents[2]
# What a container runtime gives to a container that asks for nothing. NET_RAW is among it.
POD_DEFAULT = (
    *("chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap"),
    *("net_bind_service", "net_raw", "sys_chroot", "mknod", "audit_write", "setfcap"),
)
NET_RAW = POD_DEFAULT
NET_ADMIN = (*POD_DEFAULT, "net_admin")
# Who attacks from a node.
HOST = (*NET_ADMIN, "sys_admin")


@dataclass(frozen=True)
class Heard:
    """What a program told of one attempt."""

    name: str
    facts: dict[str, Any]

    @property
    def greeting(self) -> str:
        return str(self.facts.get("greeting", ""))

    @property
    def error(self) -> str:
        return str(self.facts.get("error", ""))

    @property
    def echoed(self) -> bool:
        return bool(self.facts.get("echoed"))


async def finished(process: asyncio.subprocess.Process, seconds: float = 60) -> list[Heard]:
    """Closes a started program's input and waits for what it still tells."""
    assert process.stdin is not None
    process.stdin.close()
    async with asyncio.timeout(seconds):
        out, _ = await process.communicate()
    return [heard(line) for line in out.splitlines()]


async def run(
    where: Pod | Node,
    program: str,
    *arguments: object,
    rights: Sequence[str] = POD_DEFAULT,
    before: Sequence[str] = (),
    seconds: float = 60,
) -> list[Heard]:
    """Starts `tests.attacks.PROGRAM` in a pod's or node's namespace and waits for its end, which
    must be a good one. `before` is a command that runs the program and still has all rights."""
    process = await asyncio.create_subprocess_exec(
        *_command(where, program, arguments, rights, before), stdout=PIPE, stderr=PIPE, cwd=ROOT
    )
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, f"{program} {arguments}: {err.decode()}{out.decode()}"
    return [heard(line) for line in out.splitlines()]


@asynccontextmanager
async def started(
    where: Pod | Node,
    program: str,
    *arguments: object,
    rights: Sequence[str] = POD_DEFAULT,
    seconds: float = 60,
) -> AsyncIterator[tuple[Heard, asyncio.subprocess.Process]]:
    """A program that runs for the length of the block, beginning when it has told its first line;
    it is killed at the end. Ends by itself, in most programs, when its input is closed."""
    process = await asyncio.create_subprocess_exec(
        *_command(where, program, arguments, rights, ()), stdin=PIPE, stdout=PIPE, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(seconds):
            first = await process.stdout.readline()
        assert first, f"{program} ended at once"
        yield heard(first), process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def heard(line: bytes) -> Heard:
    facts = json.loads(line)
    return Heard(facts.pop("name"), facts)


def _command(
    where: Pod | Node,
    program: str,
    arguments: Sequence[object],
    rights: Sequence[str],
    before: Sequence[str],
) -> list[str]:
    namespace = where.sandbox.path if isinstance(where, Pod) else where.path
    bounds = ",".join(["-all", *(f"+{right}" for right in rights)])
    return [
        *("nsenter", f"--net={namespace}", *before),
        *("setpriv", f"--bounding-set={bounds}", "--inh-caps=-all", "--ambient-caps=-all"),
        *("--pdeathsig", "KILL"),
        *(sys.executable, "-m", f"tests.attacks.{program}", *map(str, arguments)),
    ]
