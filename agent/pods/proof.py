"""What was last found when a pod's capture was to be proved by traffic."""

from dataclasses import dataclass
from datetime import datetime

PROVED = "proved"
NOT_PROVED = "not proved"
# Nothing could be tried, or the pod can't be reached: no word against its capture.
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Proof:
    state: str
    # "" where it is proved.
    reason: str
    at: datetime
