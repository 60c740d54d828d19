"""One YAML file as a source of configuration, in place of a control plane.

Watched by polling: it works on every file system and for files swapped by symlink, as mounted
config maps are.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from google.protobuf.any_pb2 import Any as AnyMessage

from agent.errors import AgentError
from agent.literal import Literal
from agent.xds.fields import LocalFileError
from agent.xds.manifest import LocalResource, Resources, parse
from agent.xds.progress import Progress
from agent.xds.status import XdsStatus
from agent.xds.target import ApplyTarget, Attachment, AttachPoint
from agent.xds.types import ADDRESS, AUTHORIZATION, TYPES
from proto.gen import control_pb2, discovery_pb2

# An edit should show before its author has switched windows; a stat costs microseconds.
POLL = timedelta(milliseconds=250)
# A defect repeats itself; its traceback needn't fill the log.
_AFTER_DEFECT = timedelta(seconds=10)
_KEPT = "the last good content stays in force"

log = logging.getLogger("underpass.xds")


@dataclass(frozen=True)
class _Stamp:
    """Tells one content of the file from the next without reading it."""

    device: int
    inode: int
    size: int
    modified: int


class LocalFile:
    """Feeds the attached data plane what the file says. A bad file changes nothing."""

    def __init__(self, path: Path | Literal, *, poll: timedelta = POLL) -> None:
        self._path = path
        self._poll = poll
        self._point = AttachPoint()
        self._progress = Progress(str(path))
        self._stamp: _Stamp | None = None
        # Last good content; None until there was one.
        self._resources: Resources | None = None
        # What is wrong with the file now.
        self._error = ""
        self._pushes = 0

    def attach(self, target: ApplyTarget, types: Sequence[control_pb2.TypeState]) -> None:
        """A (new) data plane and what it holds; it is sent the difference."""
        self._progress.restored(types)
        self._point.attach(target, types)

    def detach(self) -> None:
        self._point.detach()

    def wanted(self, target: ApplyTarget, name: str) -> None:
        """Nothing is asked for: the file is sent as a whole."""

    def status(self) -> XdsStatus:
        return self._progress.snapshot(
            note="" if self._point.attached else "waiting for the data plane"
        )

    async def run(self) -> None:
        """For ever. Ends only by cancellation."""
        while True:
            attached = await self._point.current()
            try:
                await self._feed(attached)
            except AgentError as error:
                self._show(str(error))
                await attached.linger(self._poll)
            except Exception as error:
                # A defect here must not end the agent: the data plane serves with what it knows.
                log.exception("local file failed unexpectedly")
                self._show(f"{self._path}: {type(error).__name__}: {error}; {_KEPT}")
                await attached.linger(_AFTER_DEFECT)

    async def _feed(self, attached: Attachment) -> None:
        """Until this data plane is gone. Raises DataplaneError."""
        sent = {state.type_url: dict(state.versions) for state in await attached.take_types()}
        pushed: Resources | None = None
        while not attached.gone.is_set():
            await self._read()
            if self._resources is not None and self._resources is not pushed:
                await self._push(attached.target, sent, self._resources)
                pushed = self._resources
            if self._error:
                self._show(self._error)
            else:
                self._progress.connected()
            await attached.linger(self._poll)

    async def _read(self) -> None:
        """Takes a changed file in; a bad one leaves what was there and sets the error."""
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            text = self._path.read_text(encoding="utf-8")
            # Off the loop: a large file takes seconds.
            self._resources = await asyncio.to_thread(parse, text, str(self._path))
        except OSError as error:
            self._stamp = None
            self._error = f"{self._path}: {error.strerror}; {_KEPT}"
        except UnicodeDecodeError:
            self._stamp = stamp
            self._error = f"{self._path}: not UTF-8 text; {_KEPT}"
        except LocalFileError as error:
            self._stamp = stamp
            self._error = f"{error}; {_KEPT}"
        else:
            self._stamp = stamp
            self._error = ""
            log.info("local file read", extra={"path": self._path})

    async def _push(
        self, target: ApplyTarget, sent: dict[str, dict[str, str]], wanted: Resources
    ) -> None:
        """Brings the data plane from `sent`, which is kept true, to `wanted`.

        Policies arrive before the workloads that list them and leave after. Every type is sent
        once even if empty: that marks it as processed.
        """
        plans = {url: _difference(sent.setdefault(url, {}), wanted[url]) for url in TYPES}
        for type_url, changed, removed in (
            (AUTHORIZATION, plans[AUTHORIZATION].changed, []),
            (ADDRESS, plans[ADDRESS].changed, plans[ADDRESS].removed),
            (AUTHORIZATION, {}, plans[AUTHORIZATION].removed),
        ):
            processed = self._progress.snapshot().types[type_url].processed
            if not changed and not removed and processed:
                continue
            self._pushes += 1
            response = _response(type_url, str(self._pushes), changed, removed)
            reply = await target.apply(response)
            self._progress.applied(response, reply)
            for name in removed:
                del sent[type_url][name]
            # Rejected ones too: they needn't be sent again until they change.
            sent[type_url].update({name: entry.version for name, entry in changed.items()})

    def _show(self, text: str) -> None:
        if self._progress.failed(text):
            log.warning("local file failed", extra={"error": text})


@dataclass(frozen=True)
class _Difference:
    changed: Mapping[str, LocalResource]
    removed: Sequence[str]


def _difference(sent: Mapping[str, str], wanted: Mapping[str, LocalResource]) -> _Difference:
    changed = {name: entry for name, entry in wanted.items() if sent.get(name) != entry.version}
    return _Difference(changed, sorted(sent.keys() - wanted.keys()))


def _response(
    type_url: str, nonce: str, changed: Mapping[str, LocalResource], removed: Sequence[str]
) -> bytes:
    response = discovery_pb2.DeltaDiscoveryResponse(
        type_url=type_url, nonce=nonce, removed_resources=removed
    )
    for name, resource in changed.items():
        packed = AnyMessage(type_url=type_url, value=resource.message.SerializeToString())
        response.resources.add(name=name, version=resource.version, resource=packed)
    return response.SerializeToString()


def _stamp(path: Path | Literal) -> _Stamp:
    if isinstance(path, Literal):
        return _Stamp(0, 0, 0, 0)
    found = path.stat()
    return _Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
