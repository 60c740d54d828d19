"""The short-lived child that makes proof connections (`underpass-dataplane prove`): what it is
told, and what it met. It says nothing of arrivals: those are the data plane's word."""

import asyncio
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import PodError

# The child's own limits (prove.rs: a second to connect, five to be read), and a busy machine.
PATIENCE = 10.0
_TRIES = 50
_PAUSE = 0.02


class ProofError(PodError):
    """No proof could be tried; says nothing of any pod."""

    retryable = True
    remedy = "see that the underpass-dataplane named by dataplane.bin runs here"


@dataclass(frozen=True)
class Leg:
    """One connection: out of the pod, or into it from the agent's own namespace."""

    outwards: bool
    family: int
    nonce: bytes

    def line(self, fd: int) -> str:
        return f"{'out' if self.outwards else 'in'} {fd} {self.family} {self.nonce.hex()}"


@dataclass(frozen=True)
class Met:
    """`word`: ended, answered, held, refused, unreachable, silent, denied, absent or error."""

    word: str
    text: str = ""


class ProveChild:
    """Implements proofs.Maker. State: `_running`, by its own threads."""

    def __init__(self, binary: Path, cgroup: Path | None) -> None:
        """`cgroup`: a leaf below the pods' cgroup, made for as long as children run."""
        self._binary = binary
        self._cgroup = cgroup
        self._running: set[subprocess.Popen[str]] = set()
        self._calls = 0

    async def make(self, legs: Sequence[tuple[int, Leg]]) -> Mapping[bytes, Met]:
        """Descriptors stay the caller's. Raises ProofError."""
        self._calls += 1
        try:
            return await asyncio.to_thread(self._make, legs)
        finally:
            self._calls -= 1
            if not self._calls:
                await self._remove_cgroup()

    def kill(self) -> None:
        for child in tuple(self._running):
            child.kill()

    def _make(self, legs: Sequence[tuple[int, Leg]]) -> Mapping[bytes, Met]:
        command = [str(self._binary), "prove"]
        try:
            if self._cgroup is not None:
                self._cgroup.mkdir(exist_ok=True)
                command += ["--cgroup", str(self._cgroup)]
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=tuple({fd for fd, _ in legs}),
                # What configures the agent isn't for it.
                env={},
            )
        except OSError as exc:
            raise ProofError(f"{exc.filename or self._binary}: {exc.strerror}") from exc
        self._running.add(child)
        try:
            lines = "".join(f"{leg.line(fd)}\n" for fd, leg in legs)
            out, err = child.communicate(lines, timeout=PATIENCE)
        except subprocess.TimeoutExpired as exc:
            child.kill()
            child.communicate()
            raise ProofError(f"{self._binary} prove hung for {PATIENCE:g} s") from exc
        finally:
            self._running.discard(child)
        if child.returncode:
            # An older binary says that it doesn't know the word; its first line is enough.
            said = err.strip().partition("\n")[0]
            raise ProofError(f"{self._binary} prove ended with {child.returncode}: {said}")
        return dict(map(_met, out.splitlines()))

    async def _remove_cgroup(self) -> None:
        """Busy for a moment after its last process. Stays when somebody else was put there."""
        for _ in range(_TRIES):
            if self._cgroup is None or self._calls:
                return
            try:
                os.rmdir(self._cgroup)
            except FileNotFoundError:
                return
            except OSError:
                await asyncio.sleep(_PAUSE)
            else:
                return


def _met(line: str) -> tuple[bytes, Met]:
    nonce, word, text = line.split(" ", 2)
    return bytes.fromhex(nonce), Met(word, text)
