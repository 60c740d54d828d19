"""Where the SPIRE agent is and how long it may think."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class SpireConfig:
    # Its admin socket.
    socket: Path
    # The first answer of a subscription: SPIRE may have to fetch a certificate for it.
    patience: timedelta = timedelta(seconds=10)
