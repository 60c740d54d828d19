"""What a configuration source tells about itself, for status screens and readiness."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True)
class TypeStatus:
    """One resource type as the data plane took it."""

    # A first response was processed, rejected resources or not.
    processed: bool = False
    # Resource name -> why its newest version was rejected.
    rejected: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class XdsStatus:
    """A snapshot; times are aware and in UTC."""

    source: str
    connected: bool = False
    # Since when `connected` is what it is.
    since: datetime | None = None
    # Why it isn't connected, or what is wrong though it is; "" when all is well.
    last_error: str = ""
    last_push: datetime | None = None
    types: Mapping[str, TypeStatus] = field(default_factory=dict)
    # Type URL -> messages and their bytes.
    messages: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    # Reason (facts ztunnel 12.1) -> streams that ended so.
    terminations: Mapping[str, int] = field(default_factory=dict)

    @property
    def processed(self) -> bool:
        """A first response of every type was processed."""
        return bool(self.types) and all(entry.processed for entry in self.types.values())
