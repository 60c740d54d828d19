"""What a person at the node would do: run the command, look at the readiness port."""

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.cli.demo.netns import connect


@dataclass(frozen=True)
class Said:
    """How a command ended and everything it printed."""

    code: int
    text: str

    def tells(self, *parts: str) -> bool:
        """Wherever the table folded its lines."""
        squeezed = "".join(self.text.split())
        return all("".join(part.split()) in squeezed for part in parts)


async def command(*arguments: str, env: dict[str, str] | None = None) -> Said:
    process = await asyncio.create_subprocess_exec(
        *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=env
    )
    try:
        async with asyncio.timeout(60):
            out, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return Said(process.returncode, out.decode())


async def underpass(*arguments: str) -> Said:
    return await command(sys.executable, "-m", "agent.cli.main", *arguments)


async def ask(run_dir: Path, node: str, *arguments: str) -> Said:
    """`underpass --run-dir … --node … ARGUMENTS`."""
    return await underpass(f"--run-dir={run_dir}", f"--node={node}", *arguments)


async def rows(run_dir: Path, node: str, noun: str) -> Any:
    """A noun's answer as the command prints it for scripts."""
    said = await ask(run_dir, node, noun, "-o", "json")
    assert said.code == 0, said.text
    return json.loads(said.text)


async def readiness(namespace: str) -> str:
    """The body that /healthz/ready answers inside a node; "" while nobody listens there."""
    try:
        reader, writer = await connect(namespace, "127.0.0.1", 15021)
    except OSError:
        return ""
    writer.write(b"GET /healthz/ready HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")
    try:
        async with asyncio.timeout(10):
            answer = (await reader.read()).decode()
    finally:
        writer.close()
    return answer.partition("\r\n\r\n")[2].strip()
