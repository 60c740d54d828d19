"""What is known of one identity's certificate, for status screens."""

import enum
from dataclasses import dataclass
from datetime import datetime


class IdentityState(enum.Enum):
    """Vocabulary of facts ztunnel 8.3."""

    INITIALIZING = "Initializing"
    AVAILABLE = "Available"
    UNAVAILABLE = "Unavailable"


@dataclass(frozen=True)
class IdentityStatus:
    """Times are aware and in UTC; None while there is no certificate."""

    identity: str
    state: IdentityState
    not_before: datetime | None
    not_after: datetime | None
    serial: str
    # Of the last attempt, "" after a success; may stand beside a certificate that still serves.
    last_error: str
    # None while an attempt is under way.
    next_attempt: datetime | None
