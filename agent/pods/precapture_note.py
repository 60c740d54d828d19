"""Which connections were older than their pod's capture, on disk: an agent that starts anew can't
tell all of them from captured ones any more."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.pods.netns import NetnsId

log = logging.getLogger("underpass.pods")

# Each by family and id (sock_diag): no other socket has it until the machine starts anew.
Sockets = Sequence[tuple[int, bytes]]


@dataclass(frozen=True)
class Noted:
    netns: NetnsId
    sockets: Sockets


class Note:
    """Without a path nothing outlives the agent."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    def load(self) -> dict[str, Noted]:
        """By uid of the pod. A file that can't be read is as none, but told."""
        if self._path is None:
            return {}
        try:
            content = json.loads(self._path.read_text())
            return {uid: _noted(entry) for uid, entry in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
            log.warning(
                "older connections noted by an earlier agent unknown",
                extra={"file": self._path, "error": exc},
            )
            return {}

    def write(self, noted: Mapping[str, Noted]) -> None:
        if self._path is None:
            return
        scratch = self._path.with_suffix(".new")
        try:
            if noted:
                scratch.write_text(json.dumps({uid: _entry(one) for uid, one in noted.items()}))
                scratch.replace(self._path)
            else:
                self._path.unlink(missing_ok=True)
        except OSError as exc:
            fields = {"file": self._path, "error": exc}
            log.error("older connections not noted", extra=fields)


def _entry(noted: Noted) -> dict[str, object]:
    return {
        "inode": noted.netns.inode,
        "device": noted.netns.device,
        "sockets": [[family, id.hex()] for family, id in noted.sockets],
    }


def _noted(entry: dict[str, list[tuple[int, str]]]) -> Noted:
    inode, device = entry["inode"], entry["device"]
    if not isinstance(inode, int) or not isinstance(device, int):
        raise TypeError("inode, device: numbers are wanted")
    sockets = tuple((int(family), bytes.fromhex(id)) for family, id in entry["sockets"])
    return Noted(NetnsId(inode, device), sockets)
