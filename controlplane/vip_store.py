"""Assigned VIPs, remembered across restarts."""

import json
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from controlplane import state_files
from controlplane.model.vips import Assigned, Assignment, Ranges, assign
from controlplane.sources.fields import Ip

FILE = "vips.json"


class VipStoreError(Exception):
    """The file can't be used; the text says what to do."""


class VipStore:
    """What is assigned is on disk before anybody is told."""

    def __init__(self, path: Path, ranges: Ranges, assigned: Mapping[str, Assigned]) -> None:
        self._path = path
        self._ranges = ranges
        self.assigned = assigned

    @classmethod
    def load(cls, state: Path, ranges: Ranges) -> "VipStore":
        """Raises VipStoreError rather than give services new addresses unasked."""
        path = state / FILE
        try:
            stored = json.loads(path.read_text()) if path.exists() else {}
            assigned = {
                str(name): (
                    IPv4Address(pair[0]) if pair[0] else None,
                    IPv6Address(pair[1]) if pair[1] else None,
                )
                for name, pair in stored.items()
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise VipStoreError(
                f"{path}: can't be read ({error}): restore it, or remove it, which may give "
                "services new addresses"
            ) from error
        return cls(path, ranges, assigned)

    def ensure(self, wanted: Iterable[str], taken: frozenset[Ip]) -> Assignment:
        """Addresses for all of `wanted` that fit. Raises VipStoreError."""
        found = assign(wanted, taken, self.assigned, self._ranges)
        if found.vips != self.assigned:
            texts = {
                name: [str(v4) if v4 else "", str(v6) if v6 else ""]
                for name, (v4, v6) in sorted(found.vips.items())
            }
            try:
                data = json.dumps(texts, indent=1).encode()
                state_files.write(self._path, data, state_files.PUBLIC)
            except OSError as error:
                raise VipStoreError(f"{self._path}: {error.strerror}") from error
            self.assigned = found.vips
        return found
