"""Which network namespaces hold our rules, on disk. An agent that starts finds there what it has to
take away: rules of pods that left the list while no agent looked."""

import json
import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agent.errors import PodError
from agent.pods.netns import NetnsId, NetnsPath, netns_id
from agent.pods.source import Pod

log = logging.getLogger("underpass.pods")


@dataclass(frozen=True)
class Held:
    """A pod as it was captured, and the very namespace it was captured in."""

    pod: Pod
    netns: NetnsId
    # It left the mesh, and only its open connections use what is left there, no longer than this.
    drains_until: datetime | None = None
    # By what it was captured, several while it moves; who captures it comes first.
    ways: tuple[str, ...] = ()

    def open(self) -> int | None:
        """None when the path names no such namespace any more: then the rules went with it."""
        try:
            fd = self.pod.netns.open()
        except PodError:
            return None
        if netns_id(fd) == self.netns:
            return fd
        os.close(fd)
        return None


class LedgerUnreadable(Exception):
    """The list can't be used; the text names the file."""


def read(path: Path) -> list[Held]:
    """[] where there is none. Raises LedgerUnreadable."""
    try:
        return list(map(_held, json.loads(path.read_text())))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as exc:
        raise LedgerUnreadable(f"{path}: {exc}") from exc


class Ledger:
    """Written before rules come and after they went, so that it never names too few.

    State: `_held` by uid, the same as in the file, and `_texts`, its lines. Without a path nothing
    outlives the agent.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._held: dict[str, Held] = {}
        self._texts: dict[str, str] = {}

    def load(self) -> list[Held]:
        """What an earlier agent left. A file that can't be read is as none, but told."""
        if self._path is None:
            return []
        try:
            self._held = {held.pod.uid: held for held in read(self._path)}
            self._texts = {uid: _text(held) for uid, held in self._held.items()}
        except LedgerUnreadable as exc:
            fields = {"file": self._path, "error": exc}
            log.error(
                "pods of an earlier agent unknown; rules of removed ones may stay", extra=fields
            )
        return list(self._held.values())

    def add(
        self,
        pod: Pod,
        netns: NetnsId,
        drains_until: datetime | None = None,
        ways: tuple[str, ...] = (),
    ) -> None:
        held = Held(pod, netns, drains_until, ways)
        if self._held.get(pod.uid) != held:
            self._held[pod.uid], self._texts[pod.uid] = held, _text(held)
            self._write()

    def ways(self, uid: str, netns: NetnsId) -> tuple[str, ...]:
        """By what the pod was captured in this very namespace, as far as is known."""
        held = self._held.get(uid)
        return held.ways if held is not None and held.netns == netns else ()

    def discard(self, uid: str) -> None:
        if self._held.pop(uid, None) is not None:
            del self._texts[uid]
            self._write()

    def _write(self) -> None:
        """In one step; no sync, for after a crash of the machine no namespace is left either."""
        if self._path is None:
            return
        scratch = self._path.with_suffix(".new")
        try:
            if self._held:
                # Made once for each pod: a node that starts writes this for every pod it captures.
                scratch.write_text("[" + ",\n".join(self._texts.values()) + "]")
                scratch.replace(self._path)
            else:
                self._path.unlink(missing_ok=True)
        except OSError as exc:
            log.error("captured pods not noted", extra={"file": self._path, "error": exc})


def _text(held: Held) -> str:
    pod, netns = held.pod, held.netns
    entry = {
        "uid": pod.uid,
        "name": pod.name,
        "namespace": pod.namespace,
        "serviceAccount": pod.service_account,
        "netns": str(pod.netns),
        "follow": pod.netns.follow,
        "inode": netns.inode,
        "device": netns.device,
        "drainsUntil": held.drains_until.timestamp() if held.drains_until else None,
        "ways": list(held.ways),
    }
    return json.dumps(entry)


def _held(entry: dict[str, object]) -> Held:
    def text(name: str) -> str:
        value = entry[name]
        if not isinstance(value, str):
            raise TypeError(f"{name}: a text is wanted")
        return value

    inode, device = entry["inode"], entry["device"]
    if not isinstance(inode, int) or not isinstance(device, int):
        raise TypeError("inode, device: numbers are wanted")
    # Notes of earlier releases don't have these two.
    until = entry.get("drainsUntil")
    if not isinstance(until, int | float | None):
        raise TypeError("drainsUntil: a number is wanted")
    ways = entry.get("ways", [])
    if not isinstance(ways, list) or not all(isinstance(way, str) for way in ways):
        raise TypeError("ways: texts are wanted")
    path = NetnsPath(Path(text("netns")), follow=bool(entry["follow"]))
    pod = Pod(text("uid"), text("name"), text("namespace"), text("serviceAccount"), path)
    drains_until = None if until is None else datetime.fromtimestamp(until, UTC)
    return Held(pod, NetnsId(inode, device), drains_until, tuple(ways))
