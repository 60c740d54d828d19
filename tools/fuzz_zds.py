#!/usr/bin/env python3
"""Fuzzes the client of ZDS, the one parser of foreign bytes that is Python: sessions of odd packets
over a real socket, through `agent.pods.zds_link` and `agent.pods.zds`.

Inputs that reach new lines are kept and mutated further. A failure is: an exception outside of what
the client documents, a packet without exactly one answer that its server can read, a descriptor
left open, a hang, or growing memory. It leaves its input and ends with 1.
"""

import argparse
import asyncio
import hashlib
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agent.errors import NetnsRefused
from agent.pods import netns, zds, zds_link
from agent.pods.source import PodEvent
from proto.gen import zds_pb2

# As the targets of libFuzzer have it.
HANG = 10
LONGEST = 4096
# A session holds a few kilobytes; this is a leak.
GROWTH = 64 << 20
# What the server reads at once (facts istio-ambient 4).
ANSWER = 1024
TRACED = {str(Path(module.__file__ or "").resolve()) for module in (zds, zds_link, netns)}

# Of which function, from line, to line.
Edge = tuple[int, int, int]


class Failed(Exception):
    """What the fuzzer looks for."""


@dataclass(frozen=True)
class Frame:
    """One packet. `fds`: how many; bit 7: they are no namespaces."""

    fds: int
    data: bytes


def unpack(raw: bytes) -> Iterator[Frame]:
    """Any bytes are a session: `fds`, length, data, and so on."""
    at = 0
    while at + 3 <= len(raw):
        fds, length = struct.unpack_from("!BH", raw, at)
        data = raw[at + 3 : at + 3 + length]
        at += 3 + length
        # An empty packet is how the server hangs up.
        yield Frame(fds & 0x83, data)


def pack(frames: list[Frame]) -> bytes:
    head = struct.Struct("!BH")
    return b"".join(head.pack(f.fds, len(f.data)) + f.data for f in frames)[:LONGEST]


def seeds() -> list[bytes]:
    add = zds_pb2.AddWorkload(
        uid="a",
        workload_info=zds_pb2.WorkloadInfo(name="n", namespace="s", service_account="d"),
    )
    gone = zds_pb2.WorkloadRequest()
    getattr(gone, "del").uid = "a"
    requests = [
        (1, zds_pb2.WorkloadRequest(add=add)),
        (0, zds_pb2.WorkloadRequest(keep=zds_pb2.KeepWorkload(uid="k"))),
        (0, zds_pb2.WorkloadRequest(snapshot_sent=zds_pb2.SnapshotSent())),
        (0, gone),
    ]
    frames = [Frame(fds, request.SerializeToString()) for fds, request in requests]
    return [pack(frames), *(pack([frame]) for frame in frames)]


class Target:
    """The client in a loop of its own, with its coverage. Raises Failed."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._files = [folder / "namespace", folder / "other"]
        for file in self._files:
            file.touch()
        other = self._files[1].stat().st_ino
        self._edges: set[Edge] = set()

        def check(fd: int, name: str, **_: object) -> None:
            if os.fstat(fd).st_ino == other:
                raise NetnsRefused(f"{name}: not a network namespace")

        netns.check = check

    def run(self, raw: bytes) -> set[Edge]:
        """The edges that the input reaches."""
        self._edges = set()
        before = len(os.listdir("/proc/self/fd"))
        signal.alarm(HANG)
        sys.settrace(self._trace)
        try:
            self._loop.run_until_complete(self._session(list(unpack(raw))))
        finally:
            sys.settrace(None)
            signal.alarm(0)
        if len(os.listdir("/proc/self/fd")) > before:
            raise Failed("a descriptor was left open")
        return self._edges

    def close(self) -> None:
        self._loop.close()

    async def _session(self, frames: list[Frame]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        link, source = zds_link.Link(ours), zds.ZdsSource(Path("/nowhere"))
        client = asyncio.ensure_future(_client(source, link))
        try:
            await self._server(theirs, frames, client)
        finally:
            theirs.close()
            ended = await asyncio.gather(client, return_exceptions=True)
        (error,) = ended
        if error is not None and not isinstance(error, zds_link.ProtocolError | OSError):
            raise Failed(f"{type(error).__name__}: {error}") from error

    async def _server(
        self, sock: socket.socket, frames: list[Frame], client: "asyncio.Future[None]"
    ) -> None:
        loop = asyncio.get_running_loop()
        hello = await loop.sock_recv(sock, ANSWER)
        if zds_pb2.ZdsHello.FromString(hello).version != zds_pb2.V1:
            raise Failed("no hello")
        for frame in frames:
            file = self._files[bool(frame.fds & 0x80)]
            fds = [os.open(file, os.O_RDONLY | os.O_CLOEXEC) for _ in range(frame.fds & 3)]
            try:
                socket.send_fds(sock, [frame.data], fds)
            except OSError:
                return
            finally:
                for fd in fds:
                    os.close(fd)
            answer = await loop.sock_recv(sock, 1 << 16)
            if not answer:
                # Ended without an answer: by an empty packet alone.
                await asyncio.wait({client})
                if frame.data or client.exception() is not None:
                    raise Failed("a packet was not answered")
                return
            if len(answer) > ANSWER:
                raise Failed(f"an answer of {len(answer)} bytes, which the server can't read")
            if not zds_pb2.WorkloadResponse.FromString(answer).HasField("ack"):
                raise Failed("an answer that is no acknowledgement")

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in TRACED:
            return None
        last = 0
        number = hash((code.co_filename, code.co_firstlineno))

        def line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            self._edges.add((number, last, frame.f_lineno))
            last = frame.f_lineno
            return line

        return line


async def _client(source: zds.ZdsSource, link: zds_link.Link) -> None:
    try:
        async for event in source._session(link):
            _served(event)
    finally:
        link.close()


def _served(event: PodEvent) -> None:
    outcome = getattr(event, "outcome", None)
    if outcome is not None and not outcome.done():
        outcome.set_result(None)


class Mutations:
    """Small changes to sessions, drawn from one source of chance."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._words = [frame for seed in seeds() for frame in unpack(seed)]

    def of(self, raw: bytes, other: bytes) -> bytes:
        frames = list(unpack(raw))
        for _ in range(self._chance.randint(1, 4)):
            frames = self._one(frames, list(unpack(other)))
        return pack(frames)

    def _one(self, frames: list[Frame], other: list[Frame]) -> list[Frame]:
        chance = self._chance
        at = chance.randrange(len(frames) + 1)
        kind = chance.randrange(7)
        if kind == 0 or not frames:
            return [*frames[:at], chance.choice(self._words), *frames[at:]]
        at = min(at, len(frames) - 1)
        frame = frames[at]
        if kind == 1:
            return frames[:at] + frames[at + 1 :]
        if kind == 2:
            return [*frames[: at + 1], *other[chance.randrange(len(other) + 1) :]]
        if kind == 3:
            fds = chance.choice((0, 1, 2, 3, 0x80, 0x81, 0x82))
            return [*frames[:at], Frame(fds, frame.data), *frames[at + 1 :]]
        return [*frames[:at], Frame(frame.fds, self._bytes(frame.data)), *frames[at + 1 :]]

    def _bytes(self, data: bytes) -> bytes:
        chance = self._chance
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
            case 1:
                return data[:at] + chance.randbytes(chance.randint(1, 8)) + data[at:]
            case 2:
                return data[:at] + data[at + chance.randint(1, 8) :]
            case 3:
                # A uid of any length, near the bounds of a packet too.
                length = chance.choice((0, 1, 127, 128, 960, 1000, 1015, 1021, 1022, 1030))
                text = chance.choice(("u", "\u00fc", "\0", "\n"))
                uid = text * (length // len(text.encode()))
                request = zds_pb2.WorkloadRequest()
                kind = chance.choice(("add", "del", "keep"))
                getattr(request, kind).uid = uid
                return request.SerializeToString()
            case _:
                return data * chance.randint(2, 4)


class Corpus:
    """Inputs by what they reach; new ones go into the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs: list[bytes] = []
        self._known: set[Edge] = set()

    def offer(self, raw: bytes, edges: set[Edge]) -> None:
        if edges <= self._known:
            return
        self._known |= edges
        self.inputs.append(raw)
        (self.folder / hashlib.sha1(raw).hexdigest()[:16]).write_bytes(raw)


def fuzz(target: Target, corpus: Corpus, crashes: Path, seconds: float) -> int:
    """How many inputs were tried. Raises Failed; the input lies in `crashes` then."""
    chance = random.Random()
    mutations = Mutations(chance)
    raw, count = b"", 0

    def hung(*_: object) -> None:
        raise Failed(f"it hangs for {HANG} s")

    signal.signal(signal.SIGALRM, hung)
    try:
        kept = sorted(corpus.folder.iterdir(), key=lambda path: path.stat().st_size)
        for raw in [*seeds(), *(path.read_bytes() for path in kept)]:
            corpus.offer(raw, target.run(raw))
        # The first sessions fill caches.
        for _ in range(200):
            raw = chance.choice(corpus.inputs)
            target.run(raw)
        memory, end = _memory(), time.monotonic() + seconds
        while time.monotonic() < end:
            raw = mutations.of(chance.choice(corpus.inputs), chance.choice(corpus.inputs))
            corpus.offer(raw, target.run(raw))
            count += 1
            if count % 1000 == 0 and _memory() - memory > GROWTH:
                raise Failed(f"memory grew by {(_memory() - memory) >> 20} MiB")
    except Exception as exc:
        place = crashes / f"zds-{hashlib.sha1(raw).hexdigest()[:16]}"
        place.write_bytes(raw)
        why = exc if isinstance(exc, Failed) else f"{type(exc).__name__}: {exc}"
        raise Failed(f"{why}; the input lies in {place}") from exc
    return count


def _memory() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def smallest(target: Target, folder: Path, into: Path) -> None:
    """Those of the folder that reach all that it reaches, small ones first."""
    corpus = Corpus(into)
    for path in sorted(folder.iterdir(), key=lambda path: (path.stat().st_size, path.name)):
        raw = path.read_bytes()
        corpus.offer(raw, target.run(raw))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="Folder of inputs, or with --once one input.")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--crashes", type=Path, default=Path())
    parser.add_argument("--merge", type=Path, help="Only writes the smallest set of inputs here.")
    parser.add_argument("--once", action="store_true", help="Only runs one input again.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        target = Target(Path(scratch))
        try:
            if given.once:
                target.run(given.corpus.read_bytes())
            elif given.merge is not None:
                smallest(target, given.corpus, given.merge)
            else:
                corpus = Corpus(given.corpus)
                print(fuzz(target, corpus, given.crashes, given.seconds))
        except Failed as exc:
            print(f"fuzz: zds: {exc}", file=sys.stderr)
            return 1
        finally:
            target.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
