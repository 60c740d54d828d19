"""A watched folder of manifests. A file that can't be used keeps its last good state."""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from controlplane.log import fact
from controlplane.sources import documents, kinds
from controlplane.sources.fields import Field, FieldError
from controlplane.sources.objects import Object, Pod
from controlplane.sources.world import Problem, World

_SUFFIXES = (".yaml", ".yml", ".json")
_INTERVAL = 0.1  # of a second: a change is read within 0.3, settling included
# Of the time between scans at most this part goes into scanning, however large the folder.
_SCAN_SHARE = 0.2
# A file written to this short ago may be half written: it is read when it has settled.
_SETTLE = 0.1

_log = logging.getLogger(__name__)

# Modification and change time (a chmod makes a file readable), size, inode.
Signature = tuple[int, int, int, int]


@dataclass
class _Parsed:
    """One document: its object, or what is wrong with it; lines are relative to the chunk."""

    made: Object | None
    mistake: FieldError | None
    subject: str
    document: Field | None


@dataclass
class _File:
    signature: Signature | None = None
    seen: Signature | None = None
    chunks: dict[str, list[_Parsed]] = field(default_factory=dict)
    good: list[tuple[Object, int]] | None = None
    substitutes: list[tuple[Object, int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def objects(self) -> list[tuple[Object, int]]:
        return self.substitutes if self.good is None else self.good


class Manifests:
    """Scans the folder; `world` and `problems` are replaced whole, never changed in place."""

    def __init__(self, folder: Path) -> None:
        self.world = World(())
        self.problems: tuple[Problem, ...] = ()
        self._world = self.world
        self.files = 0
        self._folder = folder
        self._files: dict[str, _File] = {}
        self._ignored: set[tuple[str, str]] = set()
        self._scan_time = 0.0
        self._scans = 0
        self._scanned = asyncio.Condition()

    async def load(self) -> None:
        """Reads everything once, settled or not."""
        await self._scan(settle=0.0)

    async def run(self, changed: Callable[[], None]) -> None:
        """Watches for ever; `changed` is called after `world` or `problems` were replaced."""
        while True:
            await asyncio.sleep(max(_INTERVAL, self._scan_time / _SCAN_SHARE))
            if await self._scan(settle=_SETTLE):
                changed()

    async def scanned_again(self, limit: float) -> None:
        """Returns once what is on disk now has been read, or after `limit` seconds."""
        # Two scans may pass over a file that is settling; the third has read it.
        target = self._scans + 3
        try:
            async with asyncio.timeout(limit), self._scanned:
                await self._scanned.wait_for(lambda: self._scans >= target)
        except TimeoutError:
            return

    async def _scan(self, *, settle: float) -> bool:
        started = time.monotonic()
        changed = await asyncio.to_thread(self._read_folder, settle)
        self._scan_time = 0.0 if changed else time.monotonic() - started
        async with self._scanned:
            self._scans += 1
            self._scanned.notify_all()
        return changed

    def _read_folder(self, settle: float) -> bool:
        try:
            found = dict(_walk(self._folder))
        except OSError as error:
            problem = Problem(str(self._folder), 0, "", "", _os_text(error))
            return self._replace((problem,), rebuild=False)
        changed = False
        for name in self._files.keys() - found.keys():
            fact(_log, logging.INFO, "manifest removed", file=name)
            del self._files[name]
            changed = True
        now = time.time_ns()
        for name, signature in sorted(found.items()):
            file = self._files.setdefault(name, _File())
            if file.signature == signature:
                continue
            settled = file.seen == signature or now - signature[0] >= settle * 1e9
            file.seen = signature
            if settled:
                file.signature = signature
                self._read_file(name, file)
                changed = True
        self.files = len(self._files)
        if not changed and not (self.problems and self.problems[0].file == str(self._folder)):
            return False
        return self._replace(self._collect(), rebuild=True)

    def _collect(self) -> tuple[Problem, ...]:
        problems = [problem for file in self._files.values() for problem in file.problems]
        objects: dict[tuple[str, str, str], str] = {}
        uids: dict[str, str] = {}
        kept: list[Object] = []
        for name, file in sorted(self._files.items()):
            for item, line in file.objects:
                meta = item.meta
                here = f"{name}:{line}"
                first = objects.setdefault((meta.kind, meta.namespace, meta.name), here)
                same_uid = uids.setdefault(meta.uid, here) if isinstance(item, Pod) else here
                if first == here and same_uid == here:
                    kept.append(item)
                    continue
                what = "metadata.name" if first != here else "metadata.uid"
                other = first if first != here else same_uid
                subject = f"{meta.kind} {meta.key}"
                text = f"is already used at {other}, which counts: remove one"
                problems.append(Problem(name, line, subject, what, text))
        self._world = World(kept)
        return tuple(problems)

    def _replace(self, problems: tuple[Problem, ...], *, rebuild: bool) -> bool:
        for problem in problems:
            if problem not in self.problems:
                fact(_log, logging.ERROR, "manifest refused", problem=problem)
        for problem in self.problems:
            if problem not in problems:
                fact(_log, logging.INFO, "manifest problem solved", problem=problem)
        changed = rebuild or problems != self.problems
        self.problems = problems
        if rebuild:
            self.world = self._world
        return changed

    def _read_file(self, name: str, file: _File) -> None:
        try:
            text = Path(name).read_bytes().decode()
        except OSError as error:
            file.problems = [Problem(name, 0, "", "", _os_text(error))]
            return
        except UnicodeDecodeError:
            file.problems = [Problem(name, 0, "", "", "is not UTF-8 text: save it as UTF-8")]
            return
        if name.endswith(".json"):
            # JSON allows tabs between tokens and nowhere else; YAML doesn't.
            text = text.replace("\t", " ")
        chunks: dict[str, list[_Parsed]] = {}
        good: list[tuple[Object, int]] = []
        substitutes: list[tuple[Object, int]] = []
        problems: list[Problem] = []
        for chunk in documents.split(text):
            parsed = file.chunks.get(chunk.text)
            if parsed is None or chunk.text in chunks:
                parsed = self._parse(chunk.text)
            chunks[chunk.text] = parsed
            for item in parsed:
                if item.mistake is not None:
                    mistake = item.mistake
                    problems.append(
                        Problem(
                            name,
                            chunk.line + mistake.line + 1,
                            item.subject,
                            mistake.path,
                            mistake.text,
                        )
                    )
                    stand_in = kinds.substitute(item.document) if item.document else None
                    if stand_in is not None:
                        substitutes.append((stand_in, chunk.line + mistake.line + 1))
                elif item.made is not None:
                    line = chunk.line + item.made.meta.line + 1
                    good.append((item.made, line))
        file.chunks = chunks
        file.problems = problems
        if not problems:
            file.good = good
        file.substitutes = substitutes
        kept = "last good" if problems and file.good is not None else "new"
        fact(_log, logging.INFO, "manifest read", file=name, objects=len(good), state=kept)

    def _parse(self, text: str) -> list[_Parsed]:
        try:
            found = documents.compose(text)
        except FieldError as mistake:
            return [_Parsed(None, mistake, "", None)]
        return [self._read_document(document) for document in found]

    def _read_document(self, document: Field) -> _Parsed:
        try:
            kind = kinds.kind_of(document)
            reader = kinds.READERS.get(kind)
            if reader is None:
                if kind not in self._ignored:
                    self._ignored.add(kind)
                    fact(_log, logging.INFO, "kind ignored", group=kind[0], kind=kind[1])
                return _Parsed(None, None, "", None)
            return _Parsed(reader(document), None, "", None)
        except FieldError as mistake:
            return _Parsed(None, mistake, kinds.name_of(document), document)


def _walk(folder: Path) -> list[tuple[str, Signature]]:
    """Hidden names are editors' and mounts' business. Raises OSError when the folder is away."""
    found: list[tuple[str, Signature]] = []
    pending = [str(folder)]
    while pending:
        current = pending.pop()
        try:
            entries = list(os.scandir(current))
        except OSError:
            if current == str(folder):
                raise
            continue  # removed while we looked
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            elif entry.name.endswith(_SUFFIXES):
                try:
                    stat = entry.stat()
                except OSError:
                    continue
                found.append((entry.path, _signature(stat)))
    return found


def _signature(stat: os.stat_result) -> Signature:
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


def _os_text(error: OSError) -> str:
    return f"can't be read: {error.strerror}: restore it or its permissions"
