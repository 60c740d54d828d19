"""Tells the data plane how peers are judged: CRL, trust-domain aliases, compliance policy, and the
roots that count while these rotate.

It is the first that a data plane hears after Hello. A CRL that can't be read leaves the last good
one in force, also across a restart of the agent, whose copy lies in the run folder.
"""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from agent.errors import AgentError
from agent.identity.crl_file import CrlFile, CrlUnreadable
from agent.identity.roots import KnownRoots
from proto.gen import control_pb2

# As fast as an operator who has just revoked something expects; upstream waits as long.
LOOK_EVERY = timedelta(seconds=2)

log = logging.getLogger("underpass.identity")


@dataclass(frozen=True, kw_only=True)
class TrustConfig:
    # None: nothing is revoked.
    crl: Path | None = None
    aliases: tuple[str, ...] = ()
    # "" or "pqc".
    compliance_policy: str = ""
    # How long a root that the CA's answers leave out still counts.
    overlap: timedelta = timedelta(minutes=10)
    # Where roots and the last good CRL are kept across restarts of the agent.
    folder: Path


@dataclass(frozen=True)
class TrustStatus:
    # None: none is configured.
    crl: Path | None
    # Seconds since the epoch when the CRL in force was sent; None while none was.
    crl_since: float | None
    # Why the file isn't what is in force, else "".
    crl_error: str
    # Why the data plane didn't take the rest, else "".
    error: str
    roots: int
    # Of these, left out by the CA's newest answers.
    retiring: int
    aliases: tuple[str, ...] = ()


class TrustTarget(Protocol):
    """The data plane, as the judge of peers."""

    async def set_trust(self, trust: control_pb2.SetTrust) -> None: ...


class Refused(AgentError):
    """The data plane can't read what it was sent; the text names the field."""


@dataclass
class TrustKeeper:
    """State: what is wanted (`_crl`, `_roots`), what was sent, and what keeps them apart."""

    config: TrustConfig
    clock: Callable[[], float] = time.time
    _target: TrustTarget | None = None
    # What the target has been told; None when it isn't known.
    _told: bytes | None = None
    # The last one that a data plane took, or the newest that none has seen yet.
    _crl: bytes = b""
    _good: bytes = b""
    # The file's content as of the last look; None while it can't be read.
    _read: bytes | None = None
    # That hasn't been taken by a data plane yet.
    _new: bool = False
    _crl_since: float | None = None
    _crl_error: str = ""
    _error: str = ""
    _sending: asyncio.Lock = field(default_factory=asyncio.Lock)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._roots = KnownRoots(self.config.overlap.total_seconds())
        self._file = CrlFile(self.config.crl) if self.config.crl is not None else None
        self._load()

    async def attach(self, target: TrustTarget) -> None:
        """A (new) data plane: told before this returns, or again and again by `run`."""
        async with self._sending:
            self._target = target
            self._told = None
            await self._look()
            await self._tell()

    def detach(self) -> None:
        self._target = None
        self._told = None

    async def answered(self, roots: Sequence[str]) -> bool:
        """Before a certificate with these roots is installed: from then on old and new count beside
        each other. True when they are others than before, and all certificates should be renewed.
        """
        async with self._sending:
            known = dict(self._roots.retiring)
            changed = self._roots.answered(roots, self.clock())
            if known != self._roots.retiring:
                await asyncio.to_thread(self._save)
                await self._tell()
        if changed:
            log.info("roots rotate", extra={"roots": len(self._roots.all)})
            self._changed.set()
        return changed

    async def run(self) -> None:
        """Follows the file and the clock, for ever. Ends only by cancellation."""
        while True:
            self._changed.clear()
            async with self._sending:
                if self._roots.expire(self.clock()):
                    log.info("old roots end", extra={"roots": len(self._roots.all)})
                    await asyncio.to_thread(self._save)
                await self._look()
                await self._tell()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY.total_seconds()):
                    await self._changed.wait()

    def status(self) -> TrustStatus:
        ends = self._roots.retiring.values()
        return TrustStatus(
            crl=self.config.crl,
            crl_since=self._crl_since,
            crl_error=self._crl_error,
            error=self._error,
            roots=len(self._roots.all),
            retiring=sum(end is not None for end in ends),
            aliases=self.config.aliases,
        )

    # ---- each called with `_sending` held

    async def _look(self) -> None:
        if self._file is None:
            return
        try:
            content = await self._file.changed()
        except CrlUnreadable as exc:
            self._read = None
            self._complain(str(exc))
            return
        if content is not None:
            self._crl = self._read = content
            self._new = True
            self._told = None

    async def _tell(self) -> None:
        """What the target lacks. A lost one is told anew when it is back."""
        target = self._target
        if target is None:
            return
        message = self._message(self._crl)
        if message.SerializeToString() == self._told:
            return
        try:
            await self._send(target, message)
        except Refused as exc:
            self._error = str(exc)
            log.error("trust not set", extra={"error": exc})
        except AgentError as exc:
            # Its end is met where its connection is watched.
            log.warning("trust not delivered", extra={"error": exc})
            return
        else:
            self._error = ""
        self._told = self._message(self._crl).SerializeToString()

    async def _send(self, target: TrustTarget, message: control_pb2.SetTrust) -> None:
        try:
            await target.set_trust(message)
        except AgentError as exc:
            if exc.retryable:
                raise
            if not str(exc).startswith("crl:"):
                raise Refused(str(exc)) from exc
            self._complain(f"{self.config.crl}: {str(exc).removeprefix('crl: ')}")
            self._crl = self._good
            try:
                await target.set_trust(self._message(self._good))
            except AgentError as again:
                raise again if again.retryable else Refused(str(again)) from again
            return
        if self._crl != self._good:
            await asyncio.to_thread(self._keep_crl, self._crl)
        self._good = self._crl
        if self._read == self._crl and (self._crl_since is None or self._crl_error or self._new):
            self._crl_since = self.clock()
            self._crl_error = ""
            self._new = False
            log.info("CRL in force", extra={"path": self.config.crl})

    def _complain(self, text: str) -> None:
        if text != self._crl_error:
            self._crl_error = text
            kept = "the last good one stays in force" if self._good else "nothing is revoked"
            log.error("CRL not read", extra={"error": text, "meanwhile": kept})

    def _message(self, crl: bytes) -> control_pb2.SetTrust:
        return control_pb2.SetTrust(
            crl=crl,
            trust_domain_aliases=self.config.aliases,
            compliance_policy=self.config.compliance_policy,
            additional_roots=self._roots.all,
        )

    # ---- across restarts

    @property
    def _roots_file(self) -> Path:
        return self.config.folder / "roots.json"

    @property
    def _crl_file(self) -> Path:
        return self.config.folder / "crl.last"

    def _load(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            saved = json.loads(self._roots_file.read_text(encoding="utf-8"))
            if isinstance(saved, dict):
                self._roots.load(saved)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._crl = self._good = self._crl_file.read_bytes()

    def _save(self) -> None:
        _replace(self._roots_file, json.dumps(self._roots.retiring).encode())

    def _keep_crl(self, crl: bytes) -> None:
        _replace(self._crl_file, crl)


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all. A full disk costs what a restart would need, nothing now."""
    temporary = path.with_suffix(".new")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as exc:
        log.warning("not kept for a restart", extra={"path": path, "error": exc})
