"""The file with the CRL: noticed by a look at its inode and times, which a ConfigMap's symbolic
links change too."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

# Serials of a million certificates fit; what is larger isn't a CRL.
MOST_BYTES = 64 * 1024 * 1024

Stamp = tuple[int, int, int, int]


class CrlUnreadable(Exception):
    """The text names the file, the cause and what holds meanwhile."""


@dataclass
class CrlFile:
    """Call from one task at a time."""

    path: Path
    _seen: Stamp | None = None
    # Found empty at the last look.
    _emptied: Stamp | None = None

    async def changed(self) -> bytes | None:
        """The content when it isn't the one of the last call, else None. Raises CrlUnreadable."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> bytes | None:
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                stamp = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
                if stamp == self._seen:
                    return None
                content = file.read(MOST_BYTES + 1)
        except OSError as exc:
            self._seen = None
            raise CrlUnreadable(f"{self.path}: {exc.strerror or exc}") from exc
        if len(content) > MOST_BYTES:
            raise CrlUnreadable(f"{self.path}: larger than {MOST_BYTES} bytes")
        if not content and self._seen is not None and stamp != self._emptied:
            # Nothing revoked is what an empty file says, and what one says that is being written.
            self._emptied = stamp
            return None
        self._seen = stamp
        return content
